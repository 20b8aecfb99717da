"""The runs that theory is held against, each made when a claim first asks for it.

Time is counted as tau = sigma s t, with s the larger of the two weights' gains along the shift, so that problems
with different delta_w share one axis; so are rates, in units of sigma s.
"""

from __future__ import annotations

import functools
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from lora_flow.adapter import Adapters
from lora_flow.claims.layer_descent_runs import Descents
from lora_flow.claims.layer_regression_runs import Regressions
from lora_flow.claims.layer_runs import OneLayer
from lora_flow.claims.network_runs import Networks
from lora_flow.dynamics.solve import Trajectory, solve
from lora_flow.initialization import initialize
from lora_flow.problems.base import Factorization
from lora_flow.recipes.targets import aligned_problem
from lora_flow.results.phases import phases
from lora_flow.sweeps.sweep import sweep
from lora_flow.theory import gradient_flow as theory

DELTA_W = (1 / 1.05**2, 1 / 4, 1 / 100)
SIDES = ("A", "B")
ALPHAS = tuple(10.0 ** -np.arange(3.0, 6.5, 0.5))
TINY_ALPHAS = (1e-10, 1e-12, 1e-14, 1e-16, 1e-18)
RANK = 4
TAU = np.concatenate([np.linspace(0, 40, 161), np.geomspace(40, 100, 21)[1:]])


class Evidence:
    """Runs on the paper's problem: 10 x 10, h = 100, sigma = 5, rank-one shift along the top pair, r = 4."""

    def __init__(self, seeds: int = 6, progress: bool = True):
        self.seeds = seeds
        self.progress = progress
        self._precise: dict[Any, Trajectory] = {}

    def problem(self, delta_w: float) -> Factorization:
        return self._problems[delta_w]

    @functools.cached_property
    def _problems(self) -> dict[float, Factorization]:
        return {delta_w: aligned_problem(jax.random.key(0), delta_w=delta_w) for delta_w in DELTA_W}

    @functools.cached_property
    def one_layer(self) -> OneLayer:
        """Runs of one layer with white inputs."""
        return OneLayer(self.seeds)

    @functools.cached_property
    def regressions(self) -> Regressions:
        """Runs of one layer on data."""
        return Regressions(self.seeds)

    @functools.cached_property
    def descents(self) -> Descents:
        """Gradient descent on one layer."""
        return Descents(self.one_layer)

    @functools.cached_property
    def networks(self) -> Networks:
        """Linear networks that are trained from scratch."""
        return Networks(self.seeds)

    @functools.cached_property
    def gaussian(self) -> xr.Dataset:
        """Both sides, alpha from 1e-3 to 1e-6, to tau = 100."""
        return self._sweeps(ALPHAS, TAU)

    @functools.cached_property
    def tiny(self) -> xr.Dataset:
        """Both sides, alpha from 1e-10 to 1e-18, where That1 is well above 0; to tau = 17, with details."""
        return self._sweeps(TINY_ALPHAS, np.linspace(0, 17, 86), details=True)

    @functools.cached_property
    def t1(self) -> xr.DataArray:
        """T1 of every run of `gaussian`, in tau."""
        return phases(self.gaussian)["t1"]

    def gains(self, delta_w: float) -> theory.Gains:
        return theory.gains(self.problem(delta_w))

    def precise(
        self, delta_w: float, init: str, side: str, alphas: tuple[float, ...], tau: tuple[float, ...]
    ) -> Trajectory:
        """Trajectories with their adapters at rtol = 1e-10, with leading axes (alpha, seed)."""
        asked = (delta_w, init, side, alphas, tau)
        if asked not in self._precise:
            times = np.array(tau) / self.gains(delta_w).rate
            self._precise[asked] = solve_all(self.problem(delta_w), init, side, alphas, range(self.seeds), times)
        return self._precise[asked]

    @functools.cached_property
    def modes(self) -> dict[float, Modes]:
        """Spectral initialisation at alpha = 1e-4, along the shift's mode, for every delta_w."""
        tau = tuple(np.linspace(0, 40, 801))
        solved = {d: self.precise(d, "spectral", "A", (1e-4,), tau) for d in DELTA_W}
        return {d: Modes.of(self.problem(d), one, np.array(tau)) for d, one in solved.items()}

    def _sweeps(self, alphas: tuple[float, ...], tau: np.ndarray, details: bool = False) -> xr.Dataset:
        parts = []
        for delta_w in DELTA_W:
            problem, rate = self.problem(delta_w), self.gains(delta_w).rate
            swept = sweep(
                problem,
                side=SIDES,
                alpha=alphas,
                rank=RANK,
                seeds=self.seeds,
                t1=tau[-1] / rate,
                saves=tau / rate,
                details=details,
                progress=self.progress,
            )
            _require_success(swept["status"])
            parts.append(swept.assign_coords(time=tau).expand_dims(delta_w=[delta_w]).squeeze(["init", "rank"]))
        gains = ("sigma", "sigma_w1", "sigma_w2", "shift_rank", "aligned")
        with xr.set_options(use_new_combine_kwarg_defaults=True):
            joined = xr.concat([part.drop_vars(gains) for part in parts], "delta_w", combine_attrs="drop_conflicts")
        return joined.assign_coords({name: ("delta_w", [float(part[name]) for part in parts]) for name in gains})


class Modes:
    """One mode's scalars over (seed, time): a1, b1, a2, b2 and their derivatives, and what is off the diagonal."""

    def __init__(self, tau: np.ndarray, state: np.ndarray, speed: np.ndarray, off_diagonal: float, loss: np.ndarray):
        self.tau, self.state, self.speed = tau, state, speed  # (4, seed, time); speed per unit of tau
        self.off_diagonal, self.loss = off_diagonal, loss

    @classmethod
    def of(cls, problem: Factorization, trajectory: Trajectory, tau: np.ndarray) -> Modes:
        c = theory.gains(problem)
        history: Adapters = jax.tree.map(lambda leaf: np.asarray(leaf[0]), trajectory.history)
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[-2:]), history)
        speed = jax.tree.map(
            lambda leaf, like: np.asarray(leaf).reshape(like.shape) / c.rate, jax.vmap(problem.field)(flat), history
        )
        u, _, vt = np.linalg.svd(problem.shift)
        g = np.asarray(problem.w2).T @ u[:, 0] / c.s2
        v, first = vt[0], u[:, 0]

        def along(adapters: Any) -> np.ndarray:
            (a1, b1), (a2, b2) = adapters
            return np.stack([a1[..., 0, :] @ v, b1[..., :, 0] @ g, a2[..., 0, :] @ g, b2[..., :, 0] @ first])

        (a1, b1), (a2, b2) = history
        rows: list[Any] = [a1, np.swapaxes(b1, -1, -2), a2, np.swapaxes(b2, -1, -2)]
        loss = np.asarray(trajectory.observables["loss"])[0]
        return cls(tau, along(history), along(speed), max(map(_off_diagonal, rows)), loss)

    def size(self, layer: int) -> np.ndarray:
        """z_k = a_k^2 + b_k^2."""
        a, b = self.state[2 * layer - 2 : 2 * layer]
        return a**2 + b**2

    def growth(self, layer: int) -> np.ndarray:
        """d/dtau log z_k."""
        a, b = self.state[2 * layer - 2 : 2 * layer]
        da, db = self.speed[2 * layer - 2 : 2 * layer]
        return 2 * (a * da + b * db) / self.size(layer)


def solve_all(
    problem: Factorization, init: str, side: str, alphas: Any, seeds: Any, times: np.ndarray, rtol: float = 1e-10
) -> Trajectory:
    """Trajectories with their adapters, leading axes (alpha, seed)."""
    starts = [
        initialize(init, jax.random.key(seed), problem, rank=RANK, alpha=alpha, side=side)
        for alpha in alphas
        for seed in seeds
    ]
    shape = (len(alphas), len(seeds))
    start = jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(*shape, *leaves[0].shape), *starts)

    def one(adapters: Adapters) -> Trajectory:
        adjoint = diffrax.ForwardMode()
        return solve(problem, adapters, t1=times[-1], saves=times, rtol=rtol, adjoint=adjoint, save_adapters=True)

    solved = jax.vmap(jax.vmap(one))(start)
    _require_success(solved.status)
    return solved


def _require_success(status: Any) -> None:
    if np.any(np.asarray(status) != 0):
        raise RuntimeError(f"{np.sum(np.asarray(status) != 0)} runs that theory was to be held against did not finish")


def _off_diagonal(rows: np.ndarray) -> float:
    """The largest inner product of two rows of (..., r, n), relative to the largest row's square.

    Rows that stay along singular vectors of their own are orthogonal.
    """
    gram = np.einsum("...in,...jn->...ij", rows, rows)
    size = np.max(np.diagonal(gram, axis1=-2, axis2=-1), axis=-1)
    off = np.max(np.abs(gram) * ~np.eye(rows.shape[-2], dtype=bool), axis=(-2, -1))
    return float(np.max(off / np.where(size > 0, size, 1.0)))

"""Initialisation from the spectrum: Theorem 4.1, incremental learning, and Theorem G.1."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_flow.adapter import Adapter, Adapters
from lora_flow.claims import lora_runs as runs
from lora_flow.claims.frame import Cases, claim
from lora_flow.claims.lora_runs import DELTA_W, PAPER, case_name
from lora_flow.dynamics.lanes import solve_lanes, stack
from lora_flow.dynamics.solve import Trajectory, solve
from lora_flow.problems.factorization import Factorization
from lora_flow.problems.rounding import resolved
from lora_flow.recipes.aligned import aligned_problem
from lora_flow.theory import gradient_flow as theory

SPECTRAL = "spectral, alpha = 1e-4, to tau = 40, rtol = 1e-10"


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


def _off_diagonal(rows: np.ndarray) -> float:
    """The largest inner product of two rows of (..., r, n), relative to the largest row's square.

    Rows that stay along singular vectors of their own are orthogonal.
    """
    gram = np.einsum("...in,...jn->...ij", rows, rows)
    size = np.max(np.diagonal(gram, axis1=-2, axis2=-1), axis=-1)
    off = np.max(np.abs(gram) * ~np.eye(rows.shape[-2], dtype=bool), axis=(-2, -1))
    return float(np.max(off / np.where(size > 0, size, 1.0)))


@functools.cache
def modes(seeds: int) -> dict[float, Modes]:
    """Spectral initialisation at alpha = 1e-4, along the shift's mode, for every delta_w."""
    tau = np.linspace(0, 40, 801)
    solved = {d: runs.precise(d, "spectral", "A", (1e-4,), tau, seeds, "loss") for d in DELTA_W}
    return {d: Modes.of(runs.problem(d), one, tau) for d, one in solved.items()}


# One mode


@claim(f"{PAPER}, section 4", SPECTRAL, within=1e-12)
def spectral_diagonal(seeds: int) -> Cases:
    """spectral: the factors stay diagonal (inner products of different modes, relative)"""
    for delta_w, run in modes(seeds).items():
        yield case_name(delta_w), 0, run.off_diagonal


@claim(f"{PAPER}, Theorem 4.1", SPECTRAL, within=1e-9, identity=True)
def spectral_scalars(seeds: int) -> Cases:
    """spectral: a mode follows its four scalar equations (error relative to the largest speed)"""
    for delta_w, run in modes(seeds).items():
        c = runs.gains(delta_w)
        predicted = np.stack([theory.mode_field(c, one) for one in np.moveaxis(run.state, 1, 0)], axis=1) / c.rate
        yield (
            case_name(delta_w),
            0,
            np.max(np.abs(predicted - run.speed) / np.abs(run.speed).max((0, 2), keepdims=True)),
        )


def _level_times(delta_w: float, run: Modes) -> np.ndarray:
    """When z1 or z2 of each run first comes to the level of T1, in tau; z2 is first where it started much larger."""
    level = theory.mode_t1_level(runs.gains(delta_w))
    grown = np.maximum.accumulate(np.maximum(run.size(1), run.size(2)), axis=-1)
    return np.array([np.interp(np.log(level), np.log(z), run.tau) for z in grown])


def _formula_times(formula: Callable[..., Any]) -> Callable[[float, Modes], np.ndarray]:
    return lambda delta_w, run: runs.gains(delta_w).rate * formula(runs.gains(delta_w), run.size(1)[:, 0])


def _growth(
    seeds: int,
    until: Callable[[float, Modes], np.ndarray] = _level_times,
    start: Callable[..., Any] | None = None,
    selection: bool = False,
) -> Cases:
    """The smallest rate of log z1, or of log z1/z2, over all runs between two times, against the least one."""
    for delta_w, run in modes(seeds).items():
        c = runs.gains(delta_w)
        rates = run.growth(1) - (run.growth(2) if selection else 0.0)
        begin = theory.mode_growth_start(c) if start is None else start(c)
        inside = (run.tau >= c.rate * begin) & (run.tau <= until(delta_w, run)[:, None])
        least = (theory.mode_selection_rate(c) if selection else theory.mode_growth_rate(c)) / c.rate
        yield case_name(delta_w), least, np.min(rates[inside])


@claim(f"{PAPER}, Theorem 4.1, F.1", SPECTRAL, ">=")
def mode_growth(seeds: int) -> Cases:
    """spectral: log z1 grows at least at (3 + delta_w)/2, from artanh((3 + delta_w)/4)/2 on until T1"""
    yield from _growth(seeds)


@claim(f"{PAPER}, Theorem 4.1 as printed", SPECTRAL, ">=")
def mode_growth_from_zero_as_printed(seeds: int) -> Cases:
    """the same from t = 0"""
    yield from _growth(seeds, start=lambda c: 0.0)


@claim(f"{PAPER}, Theorem F.1 as printed", SPECTRAL, ">=")
def mode_growth_until_formula_as_printed(seeds: int) -> Cases:
    """the same until T1 = 2 log(X) / ((3 + delta_w) sigma sigma_W2), X = (1 - delta_w) sigma/(8 s2 z1(0))"""
    yield from _growth(seeds, _formula_times(theory.mode_t1))


@claim(f"{PAPER}, section 4 as printed", SPECTRAL, ">=")
def mode_growth_until_main_text_as_printed(seeds: int) -> Cases:
    """the same with X = sigma/(16 z1(0))"""
    yield from _growth(seeds, _formula_times(theory.mode_t1_main_text))


@claim(f"{PAPER}, Theorem 4.1", SPECTRAL, ">=")
def mode_selection(seeds: int) -> Cases:
    """spectral: log (z1/z2) grows at least at 3 (1 - delta_w)/2, in the same window"""
    yield from _growth(seeds, selection=True)


@claim(f"{PAPER}, Theorem F.1", SPECTRAL, "<=")
def mode_t1_bound(seeds: int) -> Cases:
    """spectral: z1 or z2 comes to (1 - delta_w) sigma/(8 sigma_W2) by that formula's T1 (ratio)"""
    for delta_w, run in modes(seeds).items():
        yield case_name(delta_w), 1, np.max(_level_times(delta_w, run) / _formula_times(theory.mode_t1)(delta_w, run))


@claim(f"{PAPER}, Theorem 4.1", SPECTRAL, ">=")
def mode_convergence(seeds: int) -> Cases:
    """spectral: after T1 the loss falls at least at (1 - delta_w)/8, down to rounding"""
    for delta_w, run in modes(seeds).items():
        c, slowest = runs.gains(delta_w), np.inf
        for loss, tau1 in zip(run.loss, _level_times(delta_w, run), strict=True):
            after = (run.tau > tau1 + 0.1) & (loss > 1e-25 * loss[0])
            start = np.exp(np.interp(tau1, run.tau, np.log(loss)))
            slowest = min(slowest, float(np.min(np.log(start / loss[after]) / (run.tau[after] - tau1))))
        yield case_name(delta_w), theory.mode_local_rate(c) / c.rate, slowest


@claim(f"{PAPER}, section 4", SPECTRAL)
def spectral_floor(seeds: int) -> Cases:
    """spectral: any precision is reached (L / L(0) at tau = 40, 0 at rounding)"""
    for delta_w, run in modes(seeds).items():
        yield case_name(delta_w), 0, resolved(float(run.loss[:, -1].max() / run.loss[0, 0]))


# Several modes


@claim(
    f"{PAPER}, Theorem 4.1",
    "spectral along three modes, sigma = 4, 3, 1, alpha = 1e-6, {seeds} seeds",
    within=0.25,
)
def incremental_learning(seeds: int) -> Cases:
    """spectral: modes are learned one by one, each near log(1/alpha) / (sigma_shift sigma_W2)"""
    # their order by sigma_shift is not their order by sigma_shift sigma_W2
    problem = aligned_problem(jax.random.key(0), component=[0, 3, 7], shift_scale=(1.0, 3.0, 4.0))
    u, sigma, vt = (x[:, :3] if i == 0 else x[:3] for i, x in enumerate(np.linalg.svd(problem.shift)))
    gained = np.asarray(problem.w2).T @ u
    size = np.linalg.norm(gained, axis=0)
    rates, g, alpha, starts = sigma * size, gained / size, 1e-6, []
    for seed in range(seeds):
        scale = alpha * (1 + 0.1 * np.random.default_rng(seed).normal(size=3))  # modes that start alike, nearly
        starts.append(_without_b(problem, scale[:, None] * vt, scale[:, None] * g.T))
    times = np.linspace(0, 2 * np.log(1 / alpha) / rates.min(), 401)
    run = solve_lanes(problem, stack(starts), times, solver="Dopri8", keep=(), save_adapters=True, throw=True)
    history: Any = run.history
    update = jax.vmap(jax.vmap(problem.update))(history)
    shares = np.einsum("mk,stmn,kn->skt", u, update, vt) / sigma[:, None]
    learned = np.array([[np.interp(0.5, share, times) for share in one] for one in shares])
    for k, s in enumerate(sigma):
        yield f"mode with sigma {s:.3g}", 1, learned[:, k] * rates[k] / np.log(1 / alpha)
    ordered = np.all(np.argsort(learned, axis=1) == np.argsort(-rates)[None, :])
    yield "order of sigma_shift sigma_W2, not of sigma_shift", 1, float(ordered)


def _without_b(problem: Factorization, *factors: np.ndarray) -> Adapters:
    """Adapters with these A_i and B_i = 0."""
    shapes = zip(factors, problem.layers, strict=True)
    return tuple(Adapter(jnp.asarray(a), jnp.zeros((n_out, len(a)))) for a, (n_out, _) in shapes)


# Theorem G.1


def _loss_from_pretrained(x: float) -> float:
    """Loss at t = 20 from A_i = a_i e1^T and B_i = 0, with Yft = diag(100, 1 + x)."""
    weights = np.diag([10.0, 1.0])
    shift = np.diag([100.0, 1 + x]) - weights @ weights
    if not shift.any():
        return 0.5 * float(np.sum(shift**2))  # there is nothing to learn, and no flow
    problem = Factorization(weights, weights, shift)
    e1 = np.array([[1.0, 0.0]])
    start = _without_b(problem, 0.1 * e1, 0.2 * e1)
    ended = solve(problem, start, t1=20.0, saves=2, derivatives="forward")
    return float(ended.observables["loss"][-1])


@claim(f"{PAPER}, Theorem G.1", "A_i = a_i e1^T, B_i = 0, r = 1, t = 20", within=1e-12)
def stuck(seeds: int) -> Cases:
    """from the pretrained weights alone, W1 = W2 = diag(10, 1), Yft = diag(100, 1 + x): L stays at x^2/2"""
    for x in (1.0, np.sqrt(2), 3.0):
        yield f"x = {x:.3g}", x**2 / 2, _loss_from_pretrained(x)


@claim(f"{PAPER}, Theorem G.1 as printed", "none needed: there is nothing to learn", within=1e-12)
def stuck_as_printed(seeds: int) -> Cases:
    """the same with Yft = diag(100, 1), which is Ypre: L stays at 1"""
    yield "Yft = diag(100, 1)", 1, _loss_from_pretrained(0.0)

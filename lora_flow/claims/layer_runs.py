"""The runs of one layer with white inputs that theory is held against, each made when a claim first asks for it.

Flows of one kind have one shape: lanes are the seeds, settings come one after the other, and one compiled program does
for all of them. Gradient flow is LoRA+ with a ratio of 1, unshrunk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from lora_flow.adapter import Adapter, Adapters, pad
from lora_flow.claims.runs import Run, adapter, finished, solve_each, spaces, stacked
from lora_flow.dynamics.flows import Chain, LoRAPlus, ScaledGD, ShrinkA
from lora_flow.dynamics.solve import Trajectory, solve
from lora_flow.initialization import INITIALIZATIONS, initialize
from lora_flow.problems.offset import offset_where
from lora_flow.problems.one_layer import SingleLayer
from lora_flow.theory import lora_one as theory

SIZE, RANK, SAVES = 60, 8, 121
SINGULAR_VALUES = np.array([1.0, 0.8, 0.6, 0.5])
SMALL_ALPHAS = (1e-6, 1e-9, 1e-12)
KAPPAS = (1.0, 10.0, 100.0, 1000.0)
NEAR, FAR = 1e-5, 0.3  # distances from the solution, relative to it
RATIOS, SHRINK_RATES = (4.0, 16.0), (0.1, 0.5)
STARTS = {  # schemes with their alphas
    "gaussian": 0.1,
    "lora-one-theory": 0.5,
    "gora": 0.5,
    "lora-ga": 0.1,
    "pissa": 1.0,
    "milora": 1.0,
    "olora": 1.0,
    "loram": 1.0,
}


class Starts(NamedTuple):
    """Flows from starts made in many ways."""

    shift: np.ndarray  # over seeds
    change: dict[str, np.ndarray]  # B(0) A(0) over seeds, by scheme
    loss: dict[str, np.ndarray]  # over (seed, time)


class OneLayer:
    """Runs of one layer with white inputs, 60 x 60 but for `starts`."""

    def __init__(self, seeds: int):
        self.seeds = seeds

    @functools.cached_property
    def shift(self) -> np.ndarray:
        """60 x 60, with singular values 1, .8, .6, .5."""
        u, v = self._spaces
        return (u * SINGULAR_VALUES) @ v.T

    @functools.cached_property
    def aligning(self) -> dict[float, Run]:
        """Gradient flow from tiny A and B = 0, by alpha."""
        times = np.linspace(0.0, 24.0, SAVES)
        return {alpha: self._plain(self.shift, self.gaussian(alpha), times) for alpha in SMALL_ALPHAS}

    @functools.cached_property
    def angles(self) -> dict[float, np.ndarray]:
        """Sines of the largest angle between A's top four right singular vectors and the shift's, `(seed, time)`."""
        rows = theory.top_rows(self.shift, 4)
        return {alpha: theory.sine(theory.top_rows(run.a, 4), rows) for alpha, run in self.aligning.items()}

    @functools.cached_property
    def flow(self) -> Run:
        """Gradient flow from alpha = 0.1 and B = 0 to t = 12."""
        return self._driven(1.0, 0.0)

    @functools.cached_property
    def lora_plus(self) -> dict[float, Run]:
        """The same with B learning so many times as fast."""
        return {ratio: self._driven(ratio, 0.0) for ratio in RATIOS}

    @functools.cached_property
    def shrinking(self) -> dict[float, Run]:
        """The same with A shrinking at a rate."""
        return {rate: self._driven(1.0, rate) for rate in SHRINK_RATES}

    @functools.cached_property
    def plain_near(self) -> dict[float, np.ndarray]:
        """E in the shift's singular vectors, `(seed, time, 4, 4)`, by kappa: gradient flow from near the solution."""
        residuals, times = {}, np.linspace(0.0, 12.0, SAVES)
        for kappa in KAPPAS:
            u, s, v = self.conditioned(kappa)
            starts = [pad((start,), RANK)[0] for start in self._mixed(kappa, NEAR)]
            residuals[kappa] = _within(self._plain((u * s) @ v.T, starts, times), u, s, v)
        return residuals

    @functools.cached_property
    def scaled_far(self) -> dict[float, np.ndarray]:
        """The same of the preconditioned flow, from far away but with the shift's column and row spaces."""
        residuals = {}
        for kappa in KAPPAS:
            u, s, v = self.conditioned(kappa)
            residuals[kappa] = _within(self._scaled((u * s) @ v.T, self._mixed(kappa, FAR)), u, s, v)
        return residuals

    @functools.cached_property
    def scaled_one_sided(self) -> dict[float, np.ndarray]:
        """E of the preconditioned flow from near the solution, with the shift's column space but not its row space."""
        residuals = {}
        for kappa in KAPPAS:
            u, s, v = self.conditioned(kappa)
            across = [np.linalg.qr(np.c_[v, rng.normal(size=v.shape)])[0][:, 4:] for rng in self._draws()]
            starts = [adapter(np.sqrt(s)[:, None] * (v + NEAR * w).T, u * np.sqrt(s)) for w in across]
            residuals[kappa] = (u * s) @ v.T - self._scaled((u * s) @ v.T, starts).change
        return residuals

    @functools.cached_property
    def scaled(self) -> Run:
        """The preconditioned flow from random factors of rank 4."""
        draws = [(rng.normal(size=(4, SIZE)), rng.normal(size=(SIZE, 4))) for rng in self._draws()]
        return self._scaled(self.shift, [adapter(a, b) for a, b in draws])

    @functools.cached_property
    def starts(self) -> Starts:
        """30 x 40, r = 4, r* = 2 and an initial loss of .25, to t = 300."""
        problems = stacked([_pretrained(rng) for rng in self._draws()])

        @jax.jit
        @jax.vmap
        def begin(seed: Any, problem: SingleLayer) -> list[Adapters]:
            key = jax.random.key(seed)
            return [initialize(name, key, problem, rank=4, alpha=alpha, side="A") for name, alpha in STARTS.items()]

        def one(shifted: Any, problem: SingleLayer, start: Adapters) -> Trajectory:
            how: Any = {"saves": np.array([0.0, 300.0]), "solver": "Tsit5", "adjoint": diffrax.ForwardMode()}
            return solve(offset_where(shifted, problem, start), start, t1=300.0, **how)

        begun = begin(jnp.arange(self.seeds), problems)
        shifted = jnp.asarray([INITIALIZATIONS[name].offset for name in STARTS])
        solved = jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, 0))(shifted, problems, stacked(begun))
        change = {name: np.asarray(start.b @ start.a) for name, (start,) in zip(STARTS, begun, strict=True)}
        loss = dict(zip(STARTS, np.asarray(finished(solved).observables["loss"]), strict=True))
        return Starts(np.asarray(problems.shift), change, loss)

    def gaussian(self, alpha: float) -> list[Adapter]:
        """A of rank 8 drawn at this size, B = 0, for every seed."""
        return [adapter(alpha * rng.normal(size=(RANK, SIZE)), np.zeros((SIZE, RANK))) for rng in self._draws()]

    def conditioned(self, kappa: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """U, S and V of the shift of rank 4 with singular values from 1 to 1/kappa."""
        u, v = self._spaces
        return u, np.geomspace(1.0, 1 / kappa, 4), v

    def _draws(self) -> Iterator[np.random.Generator]:
        return map(np.random.default_rng, range(self.seeds))

    @functools.cached_property
    def _spaces(self) -> tuple[np.ndarray, np.ndarray]:
        return spaces(np.random.default_rng(0), SIZE, SIZE, 4)

    def _mixed(self, kappa: float, distance: float) -> list[Adapter]:
        """The solution's balanced factors, the rows of A mixed."""
        u, s, v = self.conditioned(kappa)
        mixers = [np.eye(4) + distance * rng.normal(size=(4, 4)) for rng in self._draws()]
        return [adapter(mixer @ (np.sqrt(s) * v).T, u * np.sqrt(s)) for mixer in mixers]

    def _driven(self, ratio: float, rate: float) -> Run:
        return self._plain(self.shift, self.gaussian(0.1), np.linspace(0.0, 12.0, SAVES), ratio, rate)

    def _plain(
        self, shift: np.ndarray, starts: Sequence[Adapter], times: np.ndarray, ratio: float = 1.0, rate: float = 0.0
    ) -> Run:
        return solve_each(SingleLayer(shift), starts, times, Chain(LoRAPlus(ratio), ShrinkA(rate)))

    def _scaled(self, shift: np.ndarray, starts: Sequence[Adapter]) -> Run:
        return solve_each(SingleLayer(shift), starts, np.linspace(0.0, 4.0, SAVES), ScaledGD())


def _pretrained(rng: np.random.Generator) -> SingleLayer:
    u, v = spaces(rng, 30, 40, 2)
    return SingleLayer(0.5 * u @ v.T, weight=rng.normal(size=(30, 40)) / np.sqrt(40))


def _within(run: Run, u: np.ndarray, s: np.ndarray, v: np.ndarray) -> np.ndarray:
    """U^T (shift - B A) V."""
    return np.diag(s) - (u.T @ run.b) @ (run.a @ v)

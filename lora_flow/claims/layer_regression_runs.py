"""The runs on data, LoRA-One's regressions, that theory is held against, each made when a claim first asks for it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_flow.adapter import Adapter
from lora_flow.claims.runs import Run, spaces, stacked
from lora_flow.dynamics.descend import Descent, descend
from lora_flow.dynamics.flows import ScaledGD
from lora_flow.initialization import lora_one_theory_init
from lora_flow.problems.one_layer import Regression

TOY_ALPHAS2 = (1e-3, 1e-4)
RELU_KAPPAS = (1.0, 10.0, 100.0)
RELU_ETA, RELU_SHIFT = 0.5, 0.01
SAMPLES = {1.0: 400, 2.0: 20000, 4.0: 20000, 10.0: 20000}  # by kappa; the last two would take millions


class Toy(NamedTuple):
    """LoRA-One's toy experiment: shifts and X^T X/N over seeds, descents over (alpha^2, seed)."""

    shift: np.ndarray
    covariance: np.ndarray
    run: Run


class ReLULayers(NamedTuple):
    """Preconditioned descent from LoRA-One's start with gamma = 2, over (kappa, seed)."""

    shift: np.ndarray
    descent: np.ndarray  # -dL/dW where B A = 0
    distance: np.ndarray  # ||B A - shift||_F over the steps


class Sampled(NamedTuple):
    """LoRA-One's start from so many samples, over seeds; spectral norms, of which the shift's is 1."""

    sampling: np.ndarray  # ||X^T X/N - I||
    error: np.ndarray  # ||B A - shift||


class Regressions:
    """Linear and ReLU layers on Gaussian inputs, all of them new for every seed."""

    def __init__(self, seeds: int):
        self.seeds = seeds

    @functools.cached_property
    def toy(self) -> Toy:
        """d = 100, r = 8, r* = 4, kappa = 1, N = 1600: 1500 steps of gradient descent with eta = 1/64."""
        inputs, shifts, factors = [], [], []
        for rng in self._draws():
            u, v = spaces(rng, 100, 100, 4)
            shifts.append(u @ v.T)
            inputs.append(rng.normal(size=(1600, 100)))
            factors.append(rng.normal(size=(8, 100)))

        def one(x: Any, shift: Any, a: Any, alpha2: Any) -> Descent:
            start = (Adapter(jnp.sqrt(alpha2) * a, jnp.zeros((100, 8))),)
            return descend(Regression(x, shift), start, steps=1500, step=1 / 64, saves=61, save_adapters=True)

        each = jax.jit(jax.vmap(jax.vmap(one, (0, 0, 0, None)), (None, None, None, 0)))
        x, shift = np.stack(inputs), np.stack(shifts)
        descended = each(x, shift, np.stack(factors), np.array(TOY_ALPHAS2))
        return Toy(shift, np.swapaxes(x, -1, -2) @ x / 1600, Run.of(descended, descended.times[0, 0]))

    @functools.cached_property
    def relu(self) -> ReLULayers:
        """6 x 6, r = r* = 2, N = 24000, eta = 1/2: a shift of about 1% of the weight, 24 steps."""
        draws = [
            (*spaces(rng, 6, 6, 2), rng.normal(size=(6, 6)) / np.sqrt(6), rng.normal(size=(24000, 6)))
            for rng in self._draws()
        ]

        def one(kappa: Any, draw: Any) -> tuple[Any, Any, Descent]:
            u, v, weight, inputs = draw
            shift = RELU_SHIFT * (u * jnp.stack([jnp.ones(()), 1 / kappa])[None]) @ v.T
            problem = Regression(inputs, shift, weight, "relu")
            start = lora_one_theory_init(jax.random.key(0), problem, rank=2, alpha=jnp.sqrt(2.0))
            how: Any = {"step": RELU_ETA, "flow": ScaledGD(), "save_adapters": True}
            return shift, problem.linearised_task()[0], descend(problem, start, steps=24, saves=25, **how)

        each = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
        shift, descent, descended = each(np.array(RELU_KAPPAS), stacked(draws))
        left = Run.of(descended, np.arange(25)).change - np.asarray(shift)[:, :, None]
        return ReLULayers(np.asarray(shift), np.asarray(descent), np.linalg.norm(left, axis=(-2, -1)))

    @functools.cached_property
    def sampled(self) -> dict[tuple[float, int], Sampled]:
        """By kappa and N: linear regressions with d = 10, r = r* = 4, started with gamma = 1."""

        def one(x: Any, shift: Any) -> Any:
            ((a, b),) = lora_one_theory_init(jax.random.key(0), Regression(x, shift), rank=4, alpha=1.0)
            return b @ a - shift

        each, starts = jax.jit(jax.vmap(one)), {}
        for kappa, samples in SAMPLES.items():
            draws = [(*spaces(rng, 10, 10, 4), rng.normal(size=(samples, 10))) for rng in self._draws()]
            x = np.stack([x for *_, x in draws])
            shift = np.stack([(u * np.geomspace(1.0, 1 / kappa, 4)) @ v.T for u, v, _ in draws])
            sampling = np.swapaxes(x, -1, -2) @ x / samples - np.eye(10)
            norms = (np.linalg.norm(matrices, 2, axis=(-2, -1)) for matrices in (sampling, each(x, shift)))
            starts[kappa, samples] = Sampled(*norms)
        return starts

    def _draws(self) -> Iterator[np.random.Generator]:
        return map(np.random.default_rng, range(self.seeds))

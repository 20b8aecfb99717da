"""The runs of gradient descent that theory is held against, each made when a claim first asks for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_flow.adapter import Adapters
from lora_flow.claims.layer_runs import OneLayer
from lora_flow.claims.runs import Run, adapter, finished, stacked
from lora_flow.dynamics.descend import Descent, MuKlabjan, descend
from lora_flow.problems.one_layer import SingleLayer, SoftmaxRegression

STEP_ALPHAS = (0.1, 1.0)
STEP_SIZES = (0.1, 0.05, 0.025, 0.0125)
UNTIL = 6.0  # when descents with these are compared with the flow
SCALINGS = (2.0, 10.0)

SmoothLayer = SingleLayer | SoftmaxRegression


class Steps(NamedTuple):
    """Every step of descents with the step rule (3.4), `(alpha, seed, iteration)`; Frobenius norms."""

    smoothness: np.ndarray
    loss: np.ndarray
    step: np.ndarray
    norm: np.ndarray  # ||V||, V = [B; A^T]
    slope: np.ndarray  # ||dL/d(B A)||
    gradient2: np.ndarray  # ||dL/dV||^2


class Descents:
    """Gradient descent on one layer; `flows` has the flow that it is compared with."""

    def __init__(self, flows: OneLayer):
        self.flows = flows
        self.seeds = flows.seeds

    @functools.cached_property
    def factorisation(self) -> Steps:
        """1/2 ||shift - B A||^2, 12 x 10, a shift of rank 2, r = 3; from random A and B."""
        return self._every_step(lambda rng: SingleLayer(_low_rank(rng)))

    @functools.cached_property
    def softmax(self) -> Steps:
        """The cross-entropy of 80 samples in 12 classes, 10 features, r = 3; from random A and B."""
        return self._every_step(_classifier)

    @functools.cached_property
    def from_the_flow(self) -> np.ndarray:
        """Distances to gradient flow's [B; A^T] at t = 6, `(step size, seed)`."""
        lanes = len(STEP_SIZES)
        run = self.train([1.0] * lanes, [0.1] * lanes, STEP_SIZES)
        flow = self.flows.flow
        at = int(np.searchsorted(flow.times, UNTIL - 1e-9))
        apart = [(run.a[i, :, i] - flow.a[:, at], run.b[i, :, i] - flow.b[:, at]) for i in range(lanes)]
        return np.array([np.hypot(*(np.linalg.norm(x, axis=(-2, -1)) for x in pair)) for pair in apart])

    def train(
        self, scalings: Sequence[float], alphas: Sequence[float], sizes: Sequence[float], adam: bool = False
    ) -> Run:
        """Descents of the layer of 60 x 60 from B = 0 with these settings, at 60, 120, 240 and 480 iterations.

        Four settings: as many as make one compiled program do. Adam's epsilon only keeps 0/0 out.
        """
        starts = stacked([stacked([(one,) for one in self.flows.gaussian(alpha)]) for alpha in alphas])

        def one(scaling: Any, size: Any, start: Adapters) -> Descent:
            layer = SingleLayer(self.flows.shift, scaling=scaling)
            step = optax.adam(size, eps=1e-30) if adam else size
            return descend(layer, start, steps=480, step=step, saves=[60, 120, 240, 480], save_adapters=True)

        each = jax.vmap(jax.vmap(one, (None, None, 0)))
        return Run.of(each(jnp.asarray(scalings), jnp.asarray(sizes), starts), [60, 120, 240, 480])

    def _every_step(self, draw: Callable[[np.random.Generator], SmoothLayer], steps: int = 1500) -> Steps:
        draws = [np.random.default_rng(seed) for seed in range(self.seeds)]
        problems = stacked([draw(rng) for rng in draws])
        factors = [(rng.normal(size=(3, 10)), rng.normal(size=(12, 3))) for rng in draws]
        starts = stacked([stacked([(adapter(alpha * a, alpha * b),) for a, b in factors]) for alpha in STEP_ALPHAS])

        def one(problem: SmoothLayer, start: Adapters) -> tuple[Any, ...]:
            run = descend(problem, start, steps=steps, step=MuKlabjan(), saves=steps + 1, save_adapters=True)
            history: Any = run.history
            slope = jax.vmap(lambda x: jnp.linalg.norm(problem.product_descent(x)))(history)
            gradient2, norm2 = (
                sum(jnp.sum(leaf**2, axis=(-2, -1)) for leaf in jax.tree.leaves(x))
                for x in (jax.vmap(problem.field)(history), history)
            )
            return problem.smoothness(), run, jnp.sqrt(norm2), slope, gradient2

        smoothness, run, norm, slope, gradient2 = jax.jit(jax.vmap(jax.vmap(one), (None, 0)))(problems, starts)
        seen = finished(run).observables
        values = (smoothness[..., None], seen["loss"], seen["step_size"], norm, slope, gradient2)
        return Steps(*map(np.asarray, values))


def _low_rank(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(12, 2)) @ rng.normal(size=(2, 10)) / 3


def _classifier(rng: np.random.Generator) -> SoftmaxRegression:
    """Labels from a weight that is away from zero, the pretrained one, by rank 2."""
    inputs = rng.normal(size=(80, 10))
    labels = np.argmax(inputs @ _low_rank(rng).T + rng.gumbel(size=(80, 12)), axis=1)
    return SoftmaxRegression(inputs, labels, np.zeros((12, 10)))

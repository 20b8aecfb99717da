"""Gradient descent: Mu & Klabjan's step size and what follows from it, how near the flow it is, what a scaling does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_flow.adapter import Adapters
from lora_flow.claims.frame import DERIVED, Cases, claim
from lora_flow.claims.layer_runs import SHIFT, Run, adapter, draws, driven, gaussian, norm
from lora_flow.dynamics.descend import Descent, MuKlabjan, descend
from lora_flow.dynamics.lanes import finished, stack
from lora_flow.problems.one_layer import SingleLayer, SoftmaxRegression
from lora_flow.theory import descent as theory
from lora_flow.theory import scaling

PAPER = "Mu & Klabjan"
ALPHAS, SIZES, SCALINGS = (0.1, 1.0), (0.1, 0.05, 0.025, 0.0125), (2.0, 10.0)
UNTIL = 6.0  # when descents with these step sizes are compared with the flow
RULE = "one layer 12 x 10, r = 3: factorisation and softmax regression, random A and B, 1500 steps by the rule"
FLOW = "one layer, white inputs, d = 60, r = 8, alpha = .1; eta = .1, .05, .025, .0125"
SCALED = "one layer, white inputs, d = 60, r = 8, B = 0; s = 2, 10; 120 steps"

SmoothLayer = SingleLayer | SoftmaxRegression
Ratio = Callable[["Steps"], np.ndarray]


# By the step rule


class Steps(NamedTuple):
    """Every step of descents with the step rule (3.4), `(alpha, seed, iteration)`; Frobenius norms."""

    smoothness: np.ndarray
    loss: np.ndarray
    step: np.ndarray
    norm: np.ndarray  # ||V||, V = [B; A^T]
    slope: np.ndarray  # ||dL/d(B A)||
    gradient2: np.ndarray  # ||dL/dV||^2


def factorisation(rng: np.random.Generator) -> SingleLayer:
    """1/2 ||shift - B A||^2, 12 x 10, a shift of rank 2."""
    return SingleLayer(_low_rank(rng))


def softmax_regression(rng: np.random.Generator) -> SoftmaxRegression:
    """The cross-entropy of 80 samples in 12 classes, 10 features.

    Labels come from a weight that is away from zero, the pretrained one, by rank 2.
    """
    inputs = rng.normal(size=(80, 10))
    labels = np.argmax(inputs @ _low_rank(rng).T + rng.gumbel(size=(80, 12)), axis=1)
    return SoftmaxRegression(inputs, labels, np.zeros((12, 10)))


def _low_rank(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(12, 2)) @ rng.normal(size=(2, 10)) / 3


LOSSES: dict[str, Callable[[np.random.Generator], SmoothLayer]] = {
    "factorisation": factorisation,
    "softmax regression": softmax_regression,
}


@functools.cache
def by_rule(loss: str, seeds: int) -> Steps:
    """1500 steps of r = 3 from random A and B."""
    rngs = list(draws(seeds))
    problems = stack([LOSSES[loss](rng) for rng in rngs])
    factors = [(rng.normal(size=(3, 10)), rng.normal(size=(12, 3))) for rng in rngs]
    starts = stack([stack([(adapter(alpha * a, alpha * b),) for a, b in factors]) for alpha in ALPHAS])

    def one(problem: SmoothLayer, start: Adapters) -> tuple[Any, ...]:
        run = descend(problem, start, steps=1500, step=MuKlabjan(), saves=1501, save_adapters=True)
        history: Any = run.history
        slope = jax.vmap(lambda x: jnp.linalg.norm(problem.product_descent(x)))(history)
        gradient2, norm2 = (
            sum(jnp.sum(leaf**2, axis=(-2, -1)) for leaf in jax.tree.leaves(x))
            for x in (jax.vmap(problem.field)(history), history)
        )
        return problem.smoothness(), run, jnp.sqrt(norm2), slope, gradient2

    smoothness, run, size, slope, gradient2 = jax.jit(jax.vmap(jax.vmap(one), (None, 0)))(problems, starts)
    seen = finished(run).observables
    return Steps(*map(np.asarray, (smoothness[..., None], seen["loss"], seen["step_size"], size, slope, gradient2)))


def _each(ratio: Ratio, pick: Any, predicted: float, seeds: int) -> Cases:
    """The largest (or least) ratio over seeds and steps, for each loss and each size of the start."""
    for loss in LOSSES:
        for alpha, row in zip(ALPHAS, ratio(by_rule(loss, seeds)), strict=True):
            yield f"{loss}, alpha = {alpha:g}", predicted, pick(row)


@claim(f"{PAPER}, (3.4)", RULE, within=1e-12, identity=True)
def step_rule(seeds: int) -> Cases:
    """the steps taken are min{1/(4 sqrt(2) L (||V||^2 + ||grad l||)), 1}: relative error"""
    error = lambda s: np.abs(s.step / theory.step_size(s.smoothness, s.norm, s.slope) - 1)  # noqa: E731
    yield from _each(error, np.max, 0.0, seeds)


def _lemma(formula: Callable[..., np.ndarray]) -> Ratio:
    """How much of what the lemma allows a step D = -eta grad J takes."""

    def ratio(steps: Steps) -> np.ndarray:
        moved = (steps.step * np.sqrt(steps.gradient2))[..., :-1]
        above = np.diff(steps.loss) + (steps.step * steps.gradient2)[..., :-1]
        return above / formula(steps.smoothness, steps.norm[..., :-1], steps.slope[..., :-1], moved)

    return ratio


@claim(f"{PAPER}, Lemma 3.3", RULE, "<=", within=1e-9)
def descent_lemma(seeds: int) -> Cases:
    """J(V + D) - J - <grad J, D> is at most the lemma's terms at every step: ratio"""
    yield from _each(_lemma(theory.descent_lemma), np.max, 1.0, seeds)


@claim(DERIVED, RULE, "<=", within=1e-9)
def sharper_lemma(seeds: int) -> Cases:
    """the same with 1/2 for sqrt(2), 1/8 for sqrt(2)/4 and 1/2 ||grad l|| ||D||^2: ratio"""
    yield from _each(_lemma(theory.sharper_lemma), np.max, 1.0, seeds)


@claim(f"{PAPER}, (3.4)", RULE, ">=", within=1e-9)
def step_decrease(seeds: int) -> Cases:
    """J falls at least by eta_t/4 ||grad J||^2 at every step: the smallest ratio"""

    def ratio(steps: Steps) -> np.ndarray:
        return -np.diff(steps.loss) / theory.least_decrease(steps.step, steps.gradient2)[..., :-1]

    yield from _each(ratio, np.min, 1.0, seeds)


def _totals(steps: Steps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """J_0 - l* with l* = 0, the sums of the step sizes, and after how many steps: `(..., T)`."""
    total = np.cumsum(steps.step[..., :-1], axis=-1)
    return steps.loss[..., :1], total, np.arange(1, total.shape[-1] + 1)


@claim(f"{PAPER}, Theorem 3.5", RULE, "<=", within=1e-9)
def stationarity(seeds: int) -> Cases:
    """min_t ||grad J||^2 <= 4 (J_0 - l*)/sum eta_t at every T, even with the least J seen for l*: ratio"""

    def ratio(steps: Steps) -> np.ndarray:
        excess, total, _ = _totals(steps)
        least = np.minimum.accumulate(steps.gradient2, axis=-1)[..., :-1]
        return least / theory.stationarity_bound(excess - steps.loss.min(axis=-1, keepdims=True), total)

    yield from _each(ratio, np.max, 1.0, seeds)


def _total_ratio(formula: Callable[..., np.ndarray]) -> Ratio:
    def ratio(steps: Steps) -> np.ndarray:
        excess, total, count = _totals(steps)
        return total / formula(*theory.growth(steps.smoothness, steps.norm[..., :1], excess), count)

    return ratio


@claim(f"{PAPER}, Theorem 3.5; constants derived here", RULE, ">=", within=1e-9)
def least_total(seeds: int) -> Cases:
    """sum eta_t >= ln(1 + c1 T/c0)/c1, the O(1/log T): the smallest ratio"""
    yield from _each(_total_ratio(theory.least_total), np.min, 1.0, seeds)


@claim(DERIVED, RULE, ">=", within=1e-9)
def sharper_total(seeds: int) -> Cases:
    """sum eta_t >= (sqrt(c0^2 + 2 c1 T) - c0)/c1, an O(1/sqrt(T)): the smallest ratio"""
    yield from _each(_total_ratio(theory.sharper_total), np.min, 1.0, seeds)


# With given step sizes


def train(
    scalings: Sequence[float], alphas: Sequence[float], sizes: Sequence[float], seeds: int, adam: bool = False
) -> Run:
    """Descents of the layer of 60 x 60 from B = 0 with these settings, at 60, 120, 240 and 480 iterations.

    Four settings: as many as make one compiled program do. Adam's epsilon only keeps 0/0 out.
    """
    starts = stack([stack([(one,) for one in gaussian(alpha, seeds)]) for alpha in alphas])

    def one(scaling: Any, size: Any, start: Adapters) -> Descent:
        layer = SingleLayer(SHIFT, scaling=scaling)
        step = optax.adam(size, eps=1e-30) if adam else size
        return descend(layer, start, steps=480, step=step, saves=[60, 120, 240, 480], save_adapters=True)

    each = jax.vmap(jax.vmap(one, (None, None, 0)))
    return Run.of(each(jnp.asarray(scalings), jnp.asarray(sizes), starts), [60, 120, 240, 480])


@functools.cache
def from_the_flow(seeds: int) -> np.ndarray:
    """Distances to gradient flow's [B; A^T] at t = 6, `(step size, seed)`."""
    lanes = len(SIZES)
    run, flow = train([1.0] * lanes, [0.1] * lanes, SIZES, seeds), driven(1.0, 0.0, seeds)
    at = int(np.searchsorted(flow.times, UNTIL - 1e-9))
    apart = [(run.a[i, :, i] - flow.a[:, at], run.b[i, :, i] - flow.b[:, at]) for i in range(lanes)]
    return np.array([np.hypot(*map(norm, pair)) for pair in apart])


@claim(DERIVED, FLOW, within=0.05)
def order_of_descent(seeds: int) -> Cases:
    """gradient descent is off the flow by O(eta): fitted exponent, within .05"""
    yield "t = 6", 1, [np.polyfit(np.log(SIZES), row, 1)[0] for row in np.log(from_the_flow(seeds)).T]


def _twins(optimizer: str, size: float, seeds: int) -> Cases:
    """Descents with scalings, and those without that should change W alike, whose steps are of this size."""
    alpha, settings = 0.1, []
    for s in SCALINGS:
        step = size / float(scaling.effective(s, alpha, 1.0, optimizer)[1])
        settings += [(s, alpha, step), (1.0, *map(float, scaling.effective(s, alpha, step, optimizer)))]
    scalings, alphas, sizes = zip(*settings, strict=True)
    run = train(scalings, alphas, sizes, seeds, optimizer == "adam")
    change = run.change[:, :, :2]  # later Adam magnifies rounding
    for s, scaled, twin in zip(SCALINGS, change[::2], change[1::2], strict=True):
        yield f"s = {s:g}", 0, np.max(norm(s * scaled - twin) / norm(twin))


@claim("derived here, for 2606.12883", SCALED, within=1e-9, identity=True)
def scaling_of_descent(seeds: int) -> Cases:
    """a scaling s is the same as sqrt(s) A(0) and s eta, for gradient descent: s B A apart, relative"""
    yield from _twins("gd", 0.1, seeds)


@claim("derived here, for 2606.12883", SCALED, within=1e-9, identity=True)
def scaling_of_adam(seeds: int) -> Cases:
    """a scaling s is the same as sqrt(s) A(0) and sqrt(s) eta, for Adam with epsilon 0: the same"""
    yield from _twins("adam", 0.02, seeds)

"""Gradient descent: Mu & Klabjan's step size and what follows from it, how near the flow it is, what a scaling does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lora_flow.claims.frame import Case, Line, by_construction, claim, near, of_all
from lora_flow.claims.layer_descent_runs import SCALINGS, STEP_ALPHAS, STEP_SIZES, Steps
from lora_flow.claims.lora_runs import Evidence
from lora_flow.theory import descent as theory

PAPER = "Mu & Klabjan"
_RULE_RUNS = "one layer 12 x 10, r = 3: factorisation and softmax regression, random A and B, 1500 steps by the rule"
_SCALING_RUNS = "one layer, white inputs, d = 60, r = 8, B = 0; s = 2, 10; 120 steps"


def _each_loss(ev: Evidence) -> Iterator[tuple[str, Steps]]:
    yield "factorisation", ev.descents.factorisation
    yield "softmax regression", ev.descents.softmax


def _worst(ev: Evidence, ratio: Callable[[Steps], np.ndarray], pick: Any = np.max) -> Iterator[tuple[str, float]]:
    """The largest (or least) ratio over seeds and steps, for each loss and each size of the start."""
    for name, steps in _each_loss(ev):
        for alpha, row in zip(STEP_ALPHAS, ratio(steps), strict=True):
            yield f"{name}, alpha = {alpha:g}", float(pick(row))


def _at_most_one(ev: Evidence, ratio: Callable[[Steps], np.ndarray]) -> tuple[Case, ...]:
    return tuple(of_all(where, 1.0, worst, worst <= 1 + 1e-9) for where, worst in _worst(ev, ratio))


def _at_least_one(ev: Evidence, ratio: Callable[[Steps], np.ndarray]) -> tuple[Case, ...]:
    return tuple(of_all(where, 1.0, least, least >= 1 - 1e-9) for where, least in _worst(ev, ratio, np.min))


@claim
@by_construction
def step_rule(ev: Evidence) -> Line:
    error = lambda s: np.abs(s.step / theory.step_size(s.smoothness, s.norm, s.slope) - 1)  # noqa: E731
    cases = tuple(of_all(where, 0.0, worst, worst < 1e-12) for where, worst in _worst(ev, error))
    statement = "the steps taken are min{1/(4 sqrt(2) L (||V||^2 + ||grad l||)), 1}: relative error"
    return Line(f"{PAPER}, (3.4)", statement, _RULE_RUNS, cases)


def _lemma(formula: Callable[..., np.ndarray]) -> Callable[[Steps], np.ndarray]:
    """How much of what the lemma allows a step D = -eta grad J takes."""

    def ratio(steps: Steps) -> np.ndarray:
        moved = (steps.step * np.sqrt(steps.gradient2))[..., :-1]
        above = np.diff(steps.loss) + (steps.step * steps.gradient2)[..., :-1]
        return above / formula(steps.smoothness, steps.norm[..., :-1], steps.slope[..., :-1], moved)

    return ratio


@claim
def descent_lemma(ev: Evidence) -> Line:
    statement = "J(V + D) - J - <grad J, D> is at most the lemma's terms at every step: ratio"
    return Line(f"{PAPER}, Lemma 3.3", statement, _RULE_RUNS, _at_most_one(ev, _lemma(theory.descent_lemma)), "<=")


@claim
def sharper_lemma(ev: Evidence) -> Line:
    statement = "the same with 1/2 for sqrt(2), 1/8 for sqrt(2)/4 and 1/2 ||grad l|| ||D||^2: ratio"
    return Line("derived here", statement, _RULE_RUNS, _at_most_one(ev, _lemma(theory.sharper_lemma)), "<=")


@claim
def step_decrease(ev: Evidence) -> Line:
    def ratio(steps: Steps) -> np.ndarray:
        return -np.diff(steps.loss) / theory.least_decrease(steps.step, steps.gradient2)[..., :-1]

    statement = "J falls at least by eta_t/4 ||grad J||^2 at every step: the smallest ratio"
    return Line(f"{PAPER}, (3.4)", statement, _RULE_RUNS, _at_least_one(ev, ratio), ">=")


def _totals(steps: Steps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """J_0 - l* with l* = 0, the sums of the step sizes, and after how many steps: `(..., T)`."""
    total = np.cumsum(steps.step[..., :-1], axis=-1)
    return steps.loss[..., :1], total, np.arange(1, total.shape[-1] + 1)


@claim
def stationarity(ev: Evidence) -> Line:
    def ratio(steps: Steps) -> np.ndarray:
        excess, total, _ = _totals(steps)
        least = np.minimum.accumulate(steps.gradient2, axis=-1)[..., :-1]
        return least / theory.stationarity_bound(excess - steps.loss.min(axis=-1, keepdims=True), total)

    statement = "min_t ||grad J||^2 <= 4 (J_0 - l*)/sum eta_t at every T, even with the least J seen for l*: ratio"
    return Line(f"{PAPER}, Theorem 3.5", statement, _RULE_RUNS, _at_most_one(ev, ratio), "<=")


def _total_ratio(formula: Callable[..., np.ndarray]) -> Callable[[Steps], np.ndarray]:
    def ratio(steps: Steps) -> np.ndarray:
        excess, total, count = _totals(steps)
        return total / formula(*theory.growth(steps.smoothness, steps.norm[..., :1], excess), count)

    return ratio


@claim
def least_total(ev: Evidence) -> Line:
    cases = _at_least_one(ev, _total_ratio(theory.least_total))
    statement = "sum eta_t >= ln(1 + c1 T/c0)/c1, the O(1/log T): the smallest ratio"
    return Line(f"{PAPER}, Theorem 3.5; constants derived here", statement, _RULE_RUNS, cases, ">=")


@claim
def sharper_total(ev: Evidence) -> Line:
    cases = _at_least_one(ev, _total_ratio(theory.sharper_total))
    statement = "sum eta_t >= (sqrt(c0^2 + 2 c1 T) - c0)/c1, an O(1/sqrt(T)): the smallest ratio"
    return Line("derived here", statement, _RULE_RUNS, cases, ">=")


@claim
def order_of_descent(ev: Evidence) -> Line:
    distances = np.log(ev.descents.from_the_flow)
    cases = (near("t = 6", 1.0, [np.polyfit(np.log(STEP_SIZES), row, 1)[0] for row in distances.T], 0.05),)
    statement = "gradient descent is off the flow by O(eta): fitted exponent, within .05"
    runs = "one layer, white inputs, d = 60, r = 8, alpha = .1; eta = .1, .05, .025, .0125"
    return Line("derived here", statement, runs, cases)


def _twins(ev: Evidence, without: Callable[..., Any], size: float, adam: bool) -> tuple[Case, ...]:
    """Descents with scalings, and those without that should change W alike, whose steps are of this size."""
    alpha, settings = 0.1, []
    for scaling in SCALINGS:
        step = size / without(scaling, alpha, 1.0)[1]
        settings += [(scaling, alpha, step), (1.0, *without(scaling, alpha, step))]
    scalings, alphas, sizes = zip(*settings, strict=True)
    change = ev.descents.train(scalings, alphas, sizes, adam).change[:, :, :2]  # later Adam magnifies rounding
    cases = []
    for scaling, scaled, twin in zip(SCALINGS, change[::2], change[1::2], strict=True):
        apart = np.linalg.norm(scaling * scaled - twin, axis=(-2, -1)) / np.linalg.norm(twin, axis=(-2, -1))
        cases.append(of_all(f"s = {scaling:g}", 0.0, np.max(apart), np.max(apart) < 1e-9))
    return tuple(cases)


@claim
@by_construction
def scaling_of_descent(ev: Evidence) -> Line:
    cases = _twins(ev, theory.without_scaling, 0.1, adam=False)
    statement = "a scaling s is the same as sqrt(s) A(0) and s eta, for gradient descent: s B A apart, relative"
    return Line("derived here, for 2606.12883", statement, _SCALING_RUNS, cases)


@claim
@by_construction
def scaling_of_adam(ev: Evidence) -> Line:
    cases = _twins(ev, theory.without_scaling_adam, 0.02, adam=True)
    statement = "a scaling s is the same as sqrt(s) A(0) and sqrt(s) eta, for Adam with epsilon 0: the same"
    return Line("derived here, for 2606.12883", statement, _SCALING_RUNS, cases)

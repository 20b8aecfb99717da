"""Starts: LoRA-One's from one gradient step, what gamma it takes, and the floor that an offset weight leaves."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import zero_adapters
from lora_flow.claims.frame import Case, Line, by_construction, case_name, claim, of_all
from lora_flow.claims.layer_alignment import PAPER
from lora_flow.claims.lora_runs import DELTA_W, Evidence
from lora_flow.initialization import INITIALIZATIONS, lora_one_init, lora_one_theory_init
from lora_flow.problems.base import Problem
from lora_flow.problems.one_layer import SingleLayer
from lora_flow.problems.rounding import resolved
from lora_flow.theory import lora_one as theory

_SAMPLED_RUNS = "lora-one-theory, gamma = 1, d = 10, r = r* = 4; N = 400 with kappa = 1, else 20000"
_PRODUCT_RUNS = "lora-one, gamma = 1/4, r = 3, singular values 1, .8, .6, .5"
_FLOOR_RUNS = "one layer, white inputs, 30 x 40, r = 4, r* = 2, L = .25 without adapters, to t = 300"


@claim
def one_step_start(ev: Evidence) -> Line:
    cases = []
    for (kappa, samples), sampled in ev.regressions.sampled.items():
        allowed = float(theory.sampling_error_allowed(kappa))
        met, worst = bool(np.all(sampled.sampling <= allowed)), float(sampled.error.max())
        unmet = "" if met else f", ||X^T X/N - I|| = {sampled.sampling.max():.2g} > eps"
        holds = worst <= allowed if met else None
        cases.append(Case(f"kappa = {kappa:g}, N = {samples}{unmet}", allowed, worst, None, holds))
    statement = "||B A - shift|| <= eps ||shift|| at the start, if ||X^T X/N - I|| <= eps = min{1/(2 kappa), c/kappa^3}"
    return Line(f"{PAPER}, Theorem 3.3 with c = 1/2", statement, _SAMPLED_RUNS, tuple(cases), "<=")


@claim
def one_step_start_by_samples(ev: Evidence) -> Line:
    cases = []
    for (kappa, samples), sampled in ev.regressions.sampled.items():
        worst = np.max(sampled.error / sampled.sampling)
        cases.append(of_all(f"kappa = {kappa:g}, N = {samples}", 1.0, worst, worst <= 1.0))
    statement = "||B A - shift|| <= ||X^T X/N - I|| ||shift|| at the start for r >= r*, whatever kappa and N: ratio"
    return Line("derived here", statement, _SAMPLED_RUNS, tuple(cases), "<=")


def _product(ev: Evidence, formula: Callable[..., np.ndarray]) -> tuple[Case, ...]:
    @jax.jit
    def start(layer: SingleLayer) -> Array:
        ((a, b),) = lora_one_init(jax.random.key(0), layer, rank=3, alpha=0.5)
        return b @ a

    expected = formula(ev.one_layer.shift, 3, 0.25)
    error = float(np.linalg.norm(start(SingleLayer(ev.one_layer.shift)) - expected) / np.linalg.norm(expected))
    return (of_all("d = 60", 0.0, error, error < 1e-12),)


@claim
@by_construction
def one_step_product(ev: Evidence) -> Line:
    statement = "the start is B A = gamma (best rank-r approximation of G)/S_1, factors with S^(1/2): relative error"
    return Line(f"{PAPER}, Algorithm 1", statement, _PRODUCT_RUNS, _product(ev, theory.lora_one_product))


@claim
def one_step_product_as_printed(ev: Evidence) -> Line:
    statement = "the same with Diag(S) in both factors, so that it is S^2: relative error"
    return Line(
        f"{PAPER}, README as printed", statement, _PRODUCT_RUNS, _product(ev, theory.lora_one_product_as_printed)
    )


@claim
def rank_floor(ev: Evidence) -> Line:
    starts, cases = ev.one_layer.starts, []
    for name, change in starts.change.items():
        frozen = change if INITIALIZATIONS[name].offset else np.zeros_like(change)
        floors = np.array([theory.rank_floor(*pair, rank=4) for pair in zip(starts.shift, frozen, strict=True)])
        last = starts.loss[name][:, -1]
        where = f"{name}, {'weight offset' if INITIALIZATIONS[name].offset else 'weight as it was'}"
        apart = float(np.max(np.abs(last - floors)))
        cases.append(of_all(where, np.round(np.mean(floors), 12), resolved(float(np.mean(last))), apart < 1e-4))
    statement = "the flow ends at L = 1/2 sum_(i>r) sigma_i(shift + s B(0) A(0))^2 with an offset weight, else at 0"
    return Line("derived here", statement, _FLOOR_RUNS, tuple(cases))


@jax.jit
def _relative_loss(problem: Problem, gamma: float | Array) -> Array:
    """L at LoRA-One's start over L without adapters."""
    start = lora_one_theory_init(jax.random.key(0), problem, rank=4, alpha=jnp.sqrt(gamma))
    return problem.loss(start) / problem.loss(zero_adapters(problem.layers, 1))


@claim
@by_construction
def solved_at_once(ev: Evidence) -> Line:
    left = resolved(float(_relative_loss(SingleLayer(ev.one_layer.shift), 1.0)))
    statement = "one layer with white inputs and gamma = 1 is solved at t = 0: L/L(without adapters), 0 at rounding"
    cases = (of_all("d = 60", 0.0, left, left == 0),)
    return Line("derived here", statement, "lora-one-theory, singular values 1, .8, .6, .5", cases)


def _two_layers(ev: Evidence, gamma: Callable[..., float], overshoots: bool) -> tuple[Case, ...]:
    cases = []
    for delta_w in DELTA_W:
        c = ev.gains(delta_w)
        expected = float(theory.two_layer_loss(c, gamma(c)))
        measured = float(_relative_loss(ev.problem(delta_w), gamma(c)))
        agrees = abs(measured - expected) <= 1e-9 * expected
        cases.append(of_all(case_name(delta_w), expected, measured, agrees and (measured > 1) == overshoots))
    return tuple(cases)


@claim
@by_construction
def two_layers_overshoot(ev: Evidence) -> Line:
    statement = (
        "gamma = 1 in two layers overshoots: L/L(without) = (1 - gamma (s1^2 + s2^2) - gamma^2 sigma s1 s2)^2 > 1"
    )
    cases = _two_layers(ev, lambda c: 1.0, overshoots=True)
    return Line("derived here", statement, "lora-one-theory on the aligned problem, r = 4", cases)


@claim
@by_construction
def two_layers_scaled(ev: Evidence) -> Line:
    statement = "gamma = 1/(sigma_W1^2 + sigma_W2^2) in two layers does not: the same, < 1"
    cases = _two_layers(ev, theory.two_layer_gamma, overshoots=False)
    return Line("derived here", statement, "lora-one-theory on the aligned problem, r = 4", cases)

"""Gradient descent on linear networks that are trained from scratch: the rates and the step sizes of Xu et al."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from lora_flow.claims.frame import Case, Line, at_most, by_construction, claim, near, of_all
from lora_flow.claims.lora_runs import Evidence
from lora_flow.claims.network_descent_runs import ADAPTIVE, FIXED, GROWING, RULES, Steps
from lora_flow.claims.network_runs import (
    CONDITION_POWERS,
    FLOOR,
    LARGE_WIDTHS,
    SHAPES,
    SOLUTIONS,
    SPREADS,
    STARTS,
)
from lora_flow.theory import linear_descent

PAPER, LATER = "Xu et al. 2023", "Xu et al. 2025"
PUBLISHED = dict(zip(SPREADS, (0.505, 0.555, 0.600), strict=True))
ROUNDING = 1e-12  # relative to what falls: less is not promised
_NETWORKS = "n = m = 4 and n = 8, m = 4, X of rank 5, h = 40, four kinds of start, 60 steps"
_FIXED_RUNS = f"gradient descent by eta_max, c1 = 1/2, c2 = 3/2; {_NETWORKS}"
_ALL_RUNS = f"gradient descent by eta_max, four adaptive, two growing steps and backtracking; {_NETWORKS}"
_ADAPTIVE_RUNS = f"gradient descent by adaptive steps, c1 = .9, c2 = 1.1; {_NETWORKS}"
_GROWING_RUNS = f"gradient descent by growing steps, c = 1/2, eta_0 = .9 of the largest; {_NETWORKS}"


def _worst(
    ev: Evidence, ratio: Callable[[Steps], np.ndarray], rules: Iterable[str], name: str = ""
) -> tuple[Case, ...]:
    """The largest ratio over starts, seeds and steps, for each shape and rule; NaN where a step does not count."""
    cases = []
    for shape in SHAPES:
        for rule in rules:
            ratios = np.array([ratio(ev.networks.descents[shape, start, rule]) for start in STARTS])
            counted, where = ratios[~np.isnan(ratios)], f"{shape}, {rule}{name}"
            if counted.size:
                cases.append(of_all(where, 1.0, counted.max(), counted.max() <= 1 + 1e-9))
            else:
                cases.append(Case(f"{where}: no step counts", 1.0, np.nan, None, None))
    return tuple(cases)


def _seen(steps: Steps) -> np.ndarray:
    """Where the loss is more than rounding after the step, too."""
    return steps.after > FLOOR * steps.at.loss[:, :1]


def _share(promised: np.ndarray, kept: np.ndarray, of: np.ndarray | float = 1.0) -> np.ndarray:
    """promised/kept, infinite where something was promised and nothing kept, NaN where nothing but rounding was."""
    share = np.where(kept > 0, promised / np.where(kept > 0, kept, 1.0), np.inf)
    return np.where(promised > ROUNDING * of, share, np.nan)


def _fall_share(steps: Steps, bound: np.ndarray) -> np.ndarray:
    """(1 - bound)/(1 - L+/L), which is at most 1 where L+ <= bound L."""
    return np.where(_seen(steps), _share(1 - np.asarray(bound), 1 - steps.after / steps.at.loss), np.nan)


def _f(steps: Steps) -> np.ndarray:
    """f(eta_t, t)."""
    bound = linear_descent.rate_bound(steps.start, steps.at.loss, steps.rule.c1, steps.rule.c2)
    return np.asarray(bound.at(steps.at.step))


@claim
@by_construction
def imbalance_of_descent(ev: Evidence) -> Line:
    cases = []
    for shape in SHAPES:
        runs = [ev.networks.descents[shape, start, rule].at for start in STARTS for rule in RULES]
        worst, largest = (max(np.max(getattr(at, name)) for at in runs) for name in ("change_error", "change"))
        cases.append(of_all(f"{shape}, changes up to {largest:.1g}", 0.0, worst, worst < 1e-12))
    statement = (
        "a step changes D by eta^2 (W2 G^T G W2^T - W1^T G G^T W1) exactly: error over ||W1||_F^2 + ||W2||_F^2, all t"
    )
    return Line(f"{PAPER}, section 3", statement, _ALL_RUNS, tuple(cases))


@claim
def descent_rate(ev: Evidence) -> Line:
    def ratio(steps: Steps) -> np.ndarray:
        share = _fall_share(steps, steps.at.rho.at(steps.at.step))
        return np.where(steps.at.margin >= 0, share, np.nan)

    statement = "L+ <= rho L wherever the lemma's condition holds: largest (1 - rho)/(1 - L+/L)"
    return Line(f"{PAPER}, Lemma 3.1", statement, _ALL_RUNS, _worst(ev, ratio, RULES), "<=")


@claim
def descent_rate_bound(ev: Evidence) -> Line:
    def ratio(steps: Steps) -> np.ndarray:
        return _share(1 - _f(steps), 1 - np.asarray(steps.at.rho.at(steps.at.step)))

    statement = "rho(eta_t) <= f(eta_t, t) at every step: largest (1 - f)/(1 - rho)"
    return Line(
        PAPER,
        statement,
        f"{_FIXED_RUNS}; by adaptive steps, c1 = .9, c2 = 1.1",
        _worst(ev, ratio, (*FIXED, *ADAPTIVE)),
        "<=",
    )


@claim
def largest_step_keeps_tau(ev: Evidence) -> Line:
    below = _worst(ev, lambda steps: steps.rule.c1 * steps.start.alpha / steps.at.lowest, FIXED, ", c1 alpha_0/lmin")
    above = _worst(ev, lambda steps: steps.at.highest / (steps.rule.c2 * steps.start.beta), FIXED, ", lmax/(c2 beta_0)")
    statement = "by eta_max, c1 alpha_0 <= lmin(tau) and lmax(tau) <= c2 beta_0 at all t: largest ratios"
    return Line(PAPER, statement, _FIXED_RUNS, below + above, "<=")


@claim
def largest_step_rate(ev: Evidence) -> Line:
    cases = _worst(ev, lambda steps: _fall_share(steps, _f(steps)), FIXED)
    statement = "by eta_max, L(t + 1) <= f(eta, t) L(t) at all t: largest (1 - f)/(1 - L+/L)"
    return Line(PAPER, statement, _FIXED_RUNS, cases, "<=")


def _drift_share(steps: Steps, bound: Any) -> np.ndarray:
    """||D(t) - D(0)||_F over its bound, without what may be rounding, which is relative to what D is made of."""
    drift = np.maximum(steps.at.drift - ROUNDING * steps.at.highest, 0.0)
    return np.divide(drift, np.asarray(bound), out=np.zeros_like(drift), where=drift > 0)


@claim
def largest_step_drift(ev: Evidence) -> Line:
    def ratio(steps: Steps) -> np.ndarray:
        first, (c1, c2) = steps.at.step[:, :1], (steps.rule.c1, steps.rule.c2)
        return _drift_share(steps, linear_descent.imbalance_drift_bound(steps.start, first, c1, c2))

    statement = "by eta_max, ||D(t) - D(0)||_F <= 2 c2 beta_0 K L_0 eta^2/(1 - f(eta, 0)) at all t: largest ratio"
    return Line(PAPER, statement, _FIXED_RUNS, _worst(ev, ratio, FIXED), "<=")


def _own_bound(steps: Steps) -> np.ndarray:
    """What the bound by which an adaptive rule chooses promises of its step."""
    at, start, rule = steps.at, steps.start, steps.rule
    bound = {
        "rho": lambda: at.rho,
        "current": lambda: linear_descent.rate_bound(at.constants, at.loss, 1.0, 1.0),
        "loss": lambda: linear_descent.rate_bound(start, at.loss, rule.c1, rule.c2),
        "start": lambda: linear_descent.rate_bound(start, start.loss, rule.c1, rule.c2),
    }[rule.rate]()
    return np.asarray(bound.at(at.step))


@claim
def adaptive_rates(ev: Evidence) -> Line:
    cases = _worst(ev, lambda steps: _fall_share(steps, _own_bound(steps)), ADAPTIVE)
    statement = "by each adaptive step the loss falls at least as its bound h(eta_t) says: largest (1 - h)/(1 - L+/L)"
    return Line(f"{PAPER}, adaptive steps", statement, _ADAPTIVE_RUNS, cases, "<=")


@claim
def published_conditions(ev: Evidence) -> Line:
    cases = tuple(near(f"sigma = {s}", PUBLISHED[s], ev.networks.published[s], 0.01) for s in SPREADS)
    statement = "alpha_0/beta_0 at the start of experiment 4.2, as Figure 2 titles it: mean over 50 seeds, within .01"
    runs = "starts as the authors' code draws them: n = m = N = 20, h = 1000, X orthogonal"
    return Line(f"{PAPER}, Figure 2", statement, runs, cases)


@claim
def local_descent_lemma(ev: Evidence) -> Line:
    def ratio(steps: Steps) -> np.ndarray:
        at = steps.at
        promised = (at.step - 0.5 * np.asarray(at.smooth.at(at.step)) * at.step**2) * at.gradient2
        return np.where(_seen(steps), _share(promised, at.loss - steps.after, at.loss), np.nan)

    statement = "L - L+ is at least (eta - K_t eta^2/2) ||grad L||_F^2 at every step: largest ratio of that to L - L+"
    return Line(f"{LATER}, Theorem 3.1", statement, _ALL_RUNS, _worst(ev, ratio, RULES), "<=")


@claim
def local_pl(ev: Evidence) -> Line:
    cases = _worst(ev, lambda steps: steps.at.pl * steps.at.loss / (0.5 * steps.at.gradient2), RULES)
    statement = "1/2 ||grad L||_F^2 >= mu_t L at every step: largest ratio of mu_t L to it"
    return Line(f"{LATER}, Theorem 3.1", statement, _ALL_RUNS, cases, "<=")


@claim
def growing_rate(ev: Evidence) -> Line:
    def ratio(steps: Steps) -> np.ndarray:
        count = np.arange(1, steps.after.shape[1] + 1)[None]
        promised, kept = -np.log(np.asarray(steps.schedule.rhobar)) * count, np.log(steps.at.loss[:, :1] / steps.after)
        return np.where(_seen(steps), _share(promised, kept), np.nan)

    statement = "by growing steps, L(t) <= L_0 rhobar_0^t at all t: largest t log(1/rhobar_0)/log(L_0/L(t))"
    return Line(f"{LATER}, Theorem E.1", statement, _GROWING_RUNS, _worst(ev, ratio, GROWING), "<=")


@claim
def growing_drift(ev: Evidence) -> Line:
    def ratio(steps: Steps) -> np.ndarray:
        return _drift_share(steps, steps.schedule.imbalance_drift_bound())

    statement = (
        "by growing steps, ||D(t) - D(0)||_F <= 2 K eta_0^2 a2 e^(eta_0^c) L_0/(1 - Dbar) at all t: largest ratio"
    )
    return Line(f"{LATER}, Theorem E.1", statement, _GROWING_RUNS, _worst(ev, ratio, GROWING), "<=")


@claim
def width_condition(ev: Evidence) -> Line:
    cases = []
    for size in SOLUTIONS:
        for p in CONDITION_POWERS:
            condition = ev.networks.conditions[size, p]
            slopes = np.polyfit(np.log(LARGE_WIDTHS), np.log(1 - condition.ratio), 1)[0]
            small = np.max(condition.b2[0] / LARGE_WIDTHS[0] ** (1 - 2 * p))
            where = f"||W*||_F = {size:g}, p = {p:g}, b2/h^(1-2p) = {small:.2g} at h = {LARGE_WIDTHS[0]}"
            case = at_most(where, 2 * p - 1, slopes)
            cases.append(case if small < 1 else dataclasses.replace(case, holds=None))
    statement = (
        "entries N(0, h^(-2p)): 1 - a1/a2 is O(h^(2p-1)), exponent fitted from h = 500 to 16000, with its interval; "
        "where b2 < h^(1-2p), as wide networks have it"
    )
    runs = "starts, n = 8, m = 4, X of rank 5, p = .275, .375, .475, ||W*||_F = .1, 1, 10"
    return Line(f"{LATER}, Theorem 3.3", statement, runs, tuple(cases), "<=")

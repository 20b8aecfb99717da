"""Early alignment and T1: Claim 3.2, Theorems C.1 and C.2, and the slides on both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from lora_flow.claims.frame import (
    PAPER,
    Case,
    Exponent,
    Line,
    Quantity,
    at_least,
    between,
    case_name,
    claim,
    each_setting,
    frobenius2,
    near,
    sine2,
    slope,
)
from lora_flow.claims.lora_runs import ALPHAS, Evidence
from lora_flow.results.phases import at_times
from lora_flow.theory import gradient_flow as theory

_TINY_RUNS = "gaussian, alpha = 1e-10 to 1e-18, both sides"
_RUNS = "gaussian, alpha = 1e-3 to 1e-6, both sides, to tau = 100"


def early_times(ev: Evidence, dataset: xr.Dataset, delta_w: float) -> tuple[xr.DataArray, xr.DataArray]:
    """That1 and Ttil1 of every run, in tau."""
    problem, c = ev.problem(delta_w), ev.gains(delta_w)
    alpha = dataset["alpha"]
    start = dataset.isel(time=0)
    z_max = np.sqrt(np.maximum(frobenius2(start, 1), frobenius2(start, 2))) / alpha
    w1, w2 = (float(np.linalg.norm(np.asarray(w), 2)) for w in (problem.w1, problem.w2))
    return c.rate * theory.early_time(c, alpha, z_max, w1, w2), c.rate * theory.escape_time(c, alpha, z_max)


def _at_that1(ev: Evidence, quantity: Quantity, exponent: Exponent, sign: int) -> tuple[Case, ...]:
    return _exponents(ev, ev.tiny, lambda delta_w, _, part: early_times(ev, part, delta_w)[0], quantity, exponent, sign)


def _at_t1(ev: Evidence, quantity: Quantity, exponent: Exponent, sign: int) -> tuple[Case, ...]:
    return _exponents(
        ev, ev.gaussian, lambda delta_w, side, _: ev.t1.sel(delta_w=delta_w, side=side), quantity, exponent, sign
    )


def _exponents(
    ev: Evidence, dataset: xr.Dataset, when: Callable[..., Any], quantity: Quantity, exponent: Exponent, sign: int
) -> tuple[Case, ...]:
    """The exponents of a quantity in alpha (of its inverse, for sign -1) at a time of each run, and the least ones."""
    cases = []
    for delta_w, side, part in each_setting(dataset):
        slopes = sign * slope(at_times(quantity(part), when(delta_w, side, part)), part["alpha"])
        cases.append(at_least(case_name(delta_w, side), exponent(ev.gains(delta_w).d), slopes))
    return tuple(cases)


@claim
def early_alignment(ev: Evidence) -> Line:
    cases = _at_that1(ev, lambda part: sine2(part["alignment_error"]), theory.alignment_exponent, 1)
    statement = "at That1, 1 - cos^2(U_Z1, gamma_1) <= b2 alpha^p: p = (3 + delta_w)/(5 - delta_w), fitted"
    return Line(f"{PAPER}, Theorem C.1", statement, _TINY_RUNS, cases, ">=")


@claim
def early_imbalance(ev: Evidence) -> Line:
    cases = _at_that1(ev, lambda part: frobenius2(part, 1) / frobenius2(part, 2), theory.imbalance_exponent, -1)
    statement = "at That1, ||Z_1||_F^2/||Z_2||_F^2 >= b1 alpha^-p: p = 2 (1 - delta_w)/(5 - delta_w), fitted"
    return Line(f"{PAPER}, Theorem C.1", statement, _TINY_RUNS, cases, ">=")


@claim
def early_smallness(ev: Evidence) -> Line:
    cases = _at_that1(ev, lambda part: frobenius2(part, 1), lambda d: 1.0, 1)
    return Line("derived here", "at That1, ||Z_1||_F^2 <= b3 alpha: exponent", _TINY_RUNS, cases, ">=")


@claim
def early_smallness_not_squared(ev: Evidence) -> Line:
    cases = _at_that1(ev, lambda part: frobenius2(part, 1) ** 0.5, lambda d: 1.0, 1)
    statement = "the same for ||Z_1||_F, not squared"
    return Line(f"{PAPER}, Theorem C.1", statement, _TINY_RUNS, cases, ">=")


@claim
def early_update(ev: Evidence) -> Line:
    cases = _at_that1(ev, lambda part: part["update_singular_values"].isel(mode=0), lambda d: 1.0, 1)
    return Line("slides", "at That1, ||F||_2 <= O(alpha): exponent", _TINY_RUNS, cases, ">=")


@claim
def update_alignment(ev: Evidence) -> Line:
    cases = _at_that1(ev, lambda part: sine2(part["update_alignment_error"]), theory.alignment_exponent_claim, 1)
    statement = "at That1, F's top singular vectors have turned to (u; v): 1 - cos^2 <= c4 alpha^p, p of Claim 3.2"
    return Line("slides", statement, _TINY_RUNS, cases, ">=")


@claim
def t1_window(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in each_setting(ev.gaussian):
        t1 = ev.t1.sel(delta_w=delta_w, side=side)
        early, escape = early_times(ev, part, delta_w)
        inside = ((t1 >= early) & (t1 <= early + escape)).where(early > 0)
        share, counted = float(inside.mean()), int((early > 0).sum())
        holds = share == 1.0 if counted else None
        cases.append(Case(case_name(delta_w, side), 1.0, share, None, holds, counted=(counted, early.size)))
    return Line(
        f"{PAPER}, Theorem C.2",
        "T1 lies in [That1, That1 + Ttil1]: share of the runs with That1 > 0",
        _RUNS,
        tuple(cases),
    )


@claim
def t1_ratio(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, _ in each_setting(ev.gaussian):
        c = ev.gains(delta_w)
        for alpha in ALPHAS:
            t1 = ev.t1.sel(delta_w=delta_w, side=side, alpha=alpha)
            cases.append(
                between(case_name(delta_w, side, alpha), 1.0, t1 / (c.rate * theory.t1_slides(c, alpha)), 0.6, 1.1)
            )
    statement = "T1 = log(1/alpha) / (sigma sigma_W2): measured over predicted, between 0.6 and 1.1"
    return Line("slides", statement, _RUNS, tuple(cases))


@claim
def t1_slope(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in each_setting(ev.gaussian):
        c = ev.gains(delta_w)
        t1 = ev.t1.sel(delta_w=delta_w, side=side)
        per_log = slope(xr.apply_ufunc(np.exp, t1), 1 / part["alpha"])
        unit = c.rate * (theory.t1_slides(c, 1e-6) - theory.t1_slides(c, 1e-3)) / np.log(1e3)
        cases.append(near(case_name(delta_w, side), unit, per_log, 0.02))
    statement = "T1 grows by 1/(sigma sigma_W2) for each factor e in 1/alpha, in that unit"
    return Line("slides", statement, _RUNS, tuple(cases))


@claim
def t1_alignment(ev: Evidence) -> Line:
    cases = _at_t1(ev, lambda part: sine2(part["alignment_error"]), theory.alignment_exponent, 1)
    statement = "at T1, 1 - cos^2 <= b2 alpha^p: p = (3 + delta_w)/(5 - delta_w), fitted"
    return Line(f"{PAPER}, Theorem C.2", statement, _RUNS, cases, ">=")


@claim
def t1_alignment_claim(ev: Evidence) -> Line:
    cases = _at_t1(ev, lambda part: sine2(part["alignment_error"]), theory.alignment_exponent_claim, 1)
    statement = "the same with the weaker p = (1 + delta_w)/(3 + delta_w)"
    return Line(f"{PAPER}, Claim 3.2", statement, _RUNS, cases, ">=")


@claim
def t1_imbalance(ev: Evidence) -> Line:
    cases = _at_t1(ev, lambda part: frobenius2(part, 1) / frobenius2(part, 2), theory.imbalance_exponent, -1)
    statement = "at T1, ||Z_1||_F^2/||Z_2||_F^2 >= b1 alpha^-p: p = 2 (1 - delta_w)/(5 - delta_w), fitted"
    return Line(f"{PAPER}, Theorem C.2", statement, _RUNS, cases, ">=")


@claim
def t1_imbalance_claim(ev: Evidence) -> Line:
    ratio = lambda part: part["norm_z1"] ** 2 / part["norm_z2"] ** 2  # noqa: E731
    cases = _at_t1(ev, ratio, theory.imbalance_exponent_claim, -1)
    statement = "at T1, ||Z_1||^2/||Z_2||^2 >= c5 alpha^-p: p = 4 (1 - delta_w)/(5 - delta_w), fitted"
    return Line(f"{PAPER}, Claim 3.2", statement, _RUNS, cases, ">=")


@claim
def t1_imbalance_products(ev: Evidence) -> Line:
    ratio = lambda part: part["norm_b1a1"] ** 2 / part["norm_b2a2"] ** 2  # noqa: E731
    cases = _at_t1(ev, ratio, theory.imbalance_exponent_claim, -1)
    statement = "at T1, ||B1 A1||_2^2/||B2 A2||_2^2 >= O(alpha^-p), the same p"
    return Line("slides", statement, _RUNS, cases, ">=")

"""Local convergence and where the loss stops: Theorems 3.1 and 3.2, the alignment floor, the published values."""

from __future__ import annotations

import dataclasses

import numpy as np
import xarray as xr

from lora_flow.claims.frame import (
    PAPER,
    Case,
    Line,
    at_least,
    case_name,
    claim,
    each_setting,
    log,
    near,
    of_all,
    sine2,
    slope,
)
from lora_flow.claims.lora_runs import ALPHAS, DELTA_W, Evidence
from lora_flow.experiments.paper import FIGURE_3
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.phases import at_times
from lora_flow.results.report import log10
from lora_flow.theory import gradient_flow as theory

_RUNS = "gaussian, alpha = 1e-3 to 1e-6, both sides, to tau = 100"


@claim
def local_alignment(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in each_setting(ev.gaussian):
        t1 = ev.t1.sel(delta_w=delta_w, side=side)
        error = sine2(part["alignment_error"])
        kept = _log1m(error.where(error["time"] >= t1)) / _log1m(at_times(error, t1))
        worst = float(kept.max("time").max(skipna=False))
        cases.append(of_all(case_name(delta_w, side), 1.0, worst, worst <= 1.0))
    statement = "after T1, cos^2(t) >= cos^(2 c6)(T1): the smallest c6 that will do, at most 1"
    return Line(f"{PAPER}, Theorem 3.2", statement, _RUNS, tuple(cases), "<=")


@claim
def local_imbalance(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in each_setting(ev.gaussian):
        t1 = ev.t1.sel(delta_w=delta_w, side=side)
        ratio = part["norm_z1"] / part["norm_z2"]
        start = at_times(ratio, t1)
        kept = (log(ratio.where(ratio["time"] >= t1)) / log(start)).min("time")
        worst = float(kept.where(start > 1, np.inf).min(skipna=False))
        ahead = int((start > 1).sum())
        holds = worst >= 0.5 if ahead else None
        cases.append(Case(case_name(delta_w, side), 0.5, worst, None, holds, counted=(ahead, start.size)))
    statement = "after T1, ||Z_1||/||Z_2||(t) >= (||Z_1||/||Z_2||(T1))^c7, if layer 1 is ahead at T1: largest c7"
    return Line(f"{PAPER}, Theorem 3.2", statement, _RUNS, tuple(cases), ">=")


@claim
def local_bound(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in each_setting(ev.gaussian):
        c, t1 = ev.gains(delta_w), ev.t1.sel(delta_w=delta_w, side=side)
        elapsed = (part["time"] - t1) / c.rate
        ratio = at_times(part["norm_z2"], t1) / part["norm_z1"].isel(time=-1)
        bound = theory.local_loss_bound(c, at_times(part["loss"], t1), elapsed, ratio, 0.0)
        excess = (part["loss"] - bound).where(elapsed >= 0).max("time").clip(min=0)
        c8 = excess / sine2(at_times(part["alignment_error"], t1))
        worst = float(c8.max(skipna=False))
        cases.append(of_all(case_name(delta_w, side), 1.0, worst, worst <= 1.0))
    statement = "after T1, L <= 2 exp(-(1 - ratio)(1 - delta_w) sigma s2 (t - T1)/16) L(T1) + c8 (1 - cos^2): c8 needed"
    return Line(f"{PAPER}, Theorem 3.2", statement, _RUNS, tuple(cases), "<=")


@claim
def local_decay(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in each_setting(ev.gaussian):
        c, t1 = ev.gains(delta_w), ev.t1.sel(delta_w=delta_w, side=side)
        start, loss = at_times(part["loss"], t1), part["loss"]
        first = part["time"].where((loss <= 1e-4 * start) & (part["time"] >= t1)).min("time")
        slowest = float((log(start / at_times(loss, first)) / (first - t1)).min(skipna=False))
        least = theory.local_rate(c) / c.rate
        cases.append(of_all(case_name(delta_w, side), least, slowest, slowest >= least))
    statement = "the loss falls at a rate of at least (1 - delta_w)/32 after T1, in sigma sigma_W2: the slowest run"
    return Line(f"{PAPER}, Theorem 3.2, second form", statement, _RUNS, tuple(cases), ">=")


@claim
def final_loss(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in each_setting(ev.gaussian):
        last = part["loss"].isel(time=-1)
        resolved = last.where((last > rounding_floors(part)).all("seed"), drop=True)
        where, counted = case_name(delta_w, side), (resolved.size, last.size)
        if resolved.sizes["alpha"] < 5:
            cases.append(Case(where, 0.0, np.nan, None, None, counted=(0, last.size)))
        else:
            case = at_least(where, 0.0, slope(resolved, resolved["alpha"]))
            cases.append(dataclasses.replace(case, counted=counted))
    statement = "the loss comes down to 2 alpha^c3 with some c3 > 0: fitted at tau = 100, above rounding"
    return Line(f"{PAPER}, Theorem 3.1", statement, _RUNS, tuple(cases), ">=")


@claim
def alignment_floor(ev: Evidence) -> Line:
    cases = []
    for delta_w in DELTA_W:
        problem = ev.problem(delta_w)
        (h, _), m = problem.w1.shape, problem.w2.shape[0]
        last = ev.gaussian.sel(delta_w=delta_w, side="B").isel(time=-1)
        for alpha in ALPHAS:
            run = last.sel(alpha=alpha)
            floor = np.log10(theory.alignment_floor(alpha, h, m, run["norm_z1"])).mean()
            cases.append(near(case_name(delta_w, "B", alpha), float(floor), log10(run["alignment_error"]), 0.1))
    statement = "side B: 1 - cos stops at (h - m) alpha^2 / (2 ||Z_1||^2); log10, within 0.1"
    return Line("derived here", statement, _RUNS, tuple(cases))


def _published(ev: Evidence, side: str) -> tuple[Case, ...]:
    cases = []
    for delta_w, row in zip(DELTA_W, FIGURE_3.values(), strict=True):
        for alpha, published in zip(row.settings.alpha, row.alignment, strict=True):
            errors = ev.gaussian["alignment_error"].sel(delta_w=delta_w, side=side).sel(alpha=alpha, method="nearest")
            there = errors.interp(time=row.alignment_until * ev.gains(delta_w).rate)
            cases.append(near(case_name(delta_w, side, alpha), published, log10(there), 0.25))
    return tuple(cases)


@claim
def published_with_side_b(ev: Evidence) -> Line:
    statement = "Figure 3, log10(1 - cos) at panel end, with B random: within 0.25"
    return Line(f"{PAPER}, Figure 3", statement, _RUNS, _published(ev, "B"))


@claim
def published_with_side_a(ev: Evidence) -> Line:
    statement = "the same with A random, as the text says"
    return Line(f"{PAPER}, section 2 as printed", statement, _RUNS, _published(ev, "A"))


def _log1m(values: xr.DataArray) -> xr.DataArray:
    """log(1 - values), for values near 0."""
    return xr.apply_ufunc(lambda array: np.log1p(-array), values)

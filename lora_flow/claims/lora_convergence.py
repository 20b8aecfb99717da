"""Local convergence and where the loss stops: Theorems 3.1 and 3.2, the alignment floor, the published values."""

from __future__ import annotations

import numpy as np
import xarray as xr

from lora_flow.claims import lora_runs as runs
from lora_flow.claims.frame import DERIVED, Cases, Tried, claim
from lora_flow.claims.lora_runs import (
    ALPHAS,
    DELTA_W,
    GAUSSIAN,
    PAPER,
    case_name,
    each_setting,
    log,
    sine2,
    slope,
    t1_of,
)
from lora_flow.experiments.paper import FIGURE_3
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.phases import at_times
from lora_flow.results.report import log10
from lora_flow.theory import gradient_flow as theory


@claim(f"{PAPER}, Theorem 3.2", GAUSSIAN, "<=")
def local_alignment(seeds: int) -> Cases:
    """after T1, cos^2(t) >= cos^(2 c6)(T1): the smallest c6 that will do, at most 1"""
    for where, _, part in each_setting(runs.gaussian(seeds)):
        t1, error = t1_of(part, seeds), sine2(part["alignment_error"])
        kept = _log1m(error.where(error["time"] >= t1)) / _log1m(at_times(error, t1))
        yield where, 1, float(kept.max("time").max(skipna=False))


def _log1m(values: xr.DataArray) -> xr.DataArray:
    """log(1 - values), for values near 0."""
    return xr.apply_ufunc(lambda array: np.log1p(-array), values)


@claim(f"{PAPER}, Theorem 3.2", GAUSSIAN, ">=")
def local_imbalance(seeds: int) -> Cases:
    """after T1, ||Z_1||/||Z_2||(t) >= (||Z_1||/||Z_2||(T1))^c7, if layer 1 is ahead at T1: largest c7"""
    for where, _, part in each_setting(runs.gaussian(seeds)):
        t1, ratio = t1_of(part, seeds), part["norm_z1"] / part["norm_z2"]
        start = at_times(ratio, t1)
        kept = (log(ratio.where(ratio["time"] >= t1)) / log(start)).min("time")
        worst, ahead = float(kept.where(start > 1, np.inf).min(skipna=False)), int((start > 1).sum())
        yield Tried(where, 0.5, worst, applies=ahead > 0, counted=(ahead, start.size))


@claim(f"{PAPER}, Theorem 3.2", GAUSSIAN, "<=")
def local_bound(seeds: int) -> Cases:
    """
    after T1, L <= 2 exp(-(1 - ratio)(1 - delta_w) sigma s2 (t - T1)/16) L(T1) + c8 (1 - cos^2): c8 needed
    """
    for where, c, part in each_setting(runs.gaussian(seeds)):
        t1 = t1_of(part, seeds)
        elapsed = (part["time"] - t1) / c.rate
        ratio = at_times(part["norm_z2"], t1) / part["norm_z1"].isel(time=-1)
        bound = theory.local_loss_bound(c, at_times(part["loss"], t1), elapsed, ratio, 0.0)
        excess = (part["loss"] - bound).where(elapsed >= 0).max("time").clip(min=0)
        yield where, 1, float((excess / sine2(at_times(part["alignment_error"], t1))).max(skipna=False))


@claim(f"{PAPER}, Theorem 3.2, second form", GAUSSIAN, ">=")
def local_decay(seeds: int) -> Cases:
    """the loss falls at a rate of at least (1 - delta_w)/32 after T1, in sigma sigma_W2: the slowest run"""
    for where, c, part in each_setting(runs.gaussian(seeds)):
        t1, loss = t1_of(part, seeds), part["loss"]
        start = at_times(loss, t1)
        first = part["time"].where((loss <= 1e-4 * start) & (part["time"] >= t1)).min("time")
        slowest = float((log(start / at_times(loss, first)) / (first - t1)).min(skipna=False))
        yield where, theory.local_rate(c) / c.rate, slowest


@claim(f"{PAPER}, Theorem 3.1", GAUSSIAN, ">=")
def final_loss(seeds: int) -> Cases:
    """the loss comes down to 2 alpha^c3 with some c3 > 0: fitted at tau = 100, above rounding"""
    for where, _, part in each_setting(runs.gaussian(seeds)):
        last = part["loss"].isel(time=-1)
        resolved = last.where((last > rounding_floors(part)).all("seed"), drop=True)
        if resolved.sizes["alpha"] < 5:
            yield Tried(where, 0, np.nan, applies=False, counted=(0, last.size))
        else:
            yield Tried(where, 0, slope(resolved, resolved["alpha"]), counted=(resolved.size, last.size))


@claim(DERIVED, GAUSSIAN, within=0.1)
def alignment_floor(seeds: int) -> Cases:
    """side B: 1 - cos stops at (h - m) alpha^2 / (2 ||Z_1||^2); log10, within 0.1"""
    for delta_w in DELTA_W:
        problem = runs.problem(delta_w)
        (h, _), m = problem.w1.shape, problem.w2.shape[0]
        last = runs.gaussian(seeds).sel(delta_w=delta_w, side="B").isel(time=-1)
        for alpha in ALPHAS:
            run = last.sel(alpha=alpha)
            floor = np.log10(theory.alignment_floor(alpha, h, m, run["norm_z1"])).mean()
            yield case_name(delta_w, "B", alpha), floor, log10(run["alignment_error"])


def _published(side: str, seeds: int) -> Cases:
    for delta_w, row in zip(DELTA_W, FIGURE_3.values(), strict=True):
        errors = runs.gaussian(seeds)["alignment_error"].sel(delta_w=delta_w, side=side)
        for alpha, published in zip(row.settings.alpha, row.alignment, strict=True):
            there = errors.sel(alpha=alpha, method="nearest")
            there = there.interp(time=row.alignment_until * runs.gains(delta_w).rate)
            yield case_name(delta_w, side, alpha), published, log10(there)


@claim(f"{PAPER}, Figure 3", GAUSSIAN, within=0.25)
def published_with_side_b(seeds: int) -> Cases:
    """Figure 3, log10(1 - cos) at panel end, with B random: within 0.25"""
    yield from _published("B", seeds)


@claim(f"{PAPER}, section 2 as printed", GAUSSIAN, within=0.25)
def published_with_side_a(seeds: int) -> Cases:
    """the same with A random, as the text says"""
    yield from _published("A", seeds)

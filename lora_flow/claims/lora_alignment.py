"""Early alignment and T1: Claim 3.2, Theorems C.1 and C.2, and the slides on both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from lora_flow.claims import lora_runs as runs
from lora_flow.claims.frame import DERIVED, Cases, Tried, claim
from lora_flow.claims.lora_runs import ALPHAS, GAUSSIAN, PAPER, TINY, each_setting, frobenius2, sine2, slope, t1_of
from lora_flow.results.phases import at_times
from lora_flow.theory import gradient_flow as theory

SLIDES = "slides"
Quantity = Callable[[xr.Dataset], xr.DataArray]
Exponent = Callable[[Any], Any]  # of delta_w


def early_times(part: xr.Dataset) -> tuple[xr.DataArray, xr.DataArray]:
    """That1 and Ttil1 of every run of a setting, in tau."""
    delta_w, alpha, start = float(part["delta_w"]), part["alpha"], part.isel(time=0)
    problem, c = runs.problem(delta_w), runs.gains(delta_w)
    z_max = np.sqrt(np.maximum(frobenius2(start, 1), frobenius2(start, 2))) / alpha
    w1, w2 = (float(np.linalg.norm(np.asarray(w), 2)) for w in (problem.w1, problem.w2))
    return c.rate * theory.early_time(c, alpha, z_max, w1, w2), c.rate * theory.escape_time(c, alpha, z_max)


def _exponents(
    dataset: xr.Dataset, when: Callable[[xr.Dataset], xr.DataArray], quantity: Quantity, exponent: Exponent, sign: int
) -> Cases:
    """The exponents of a quantity in alpha (of its inverse, for sign -1) at a time of each run, and the least ones."""
    for where, c, part in each_setting(dataset):
        yield where, exponent(c.d), sign * slope(at_times(quantity(part), when(part)), part["alpha"])


def _at_that1(seeds: int, quantity: Quantity, exponent: Exponent, sign: int = 1) -> Cases:
    return _exponents(runs.tiny(seeds), lambda part: early_times(part)[0], quantity, exponent, sign)


def _at_t1(seeds: int, quantity: Quantity, exponent: Exponent, sign: int = 1) -> Cases:
    return _exponents(runs.gaussian(seeds), lambda part: t1_of(part, seeds), quantity, exponent, sign)


def _unaligned(part: xr.Dataset) -> xr.DataArray:
    """1 - cos^2(U_Z1, gamma_1)."""
    return sine2(part["alignment_error"])


def _imbalance(part: xr.Dataset) -> xr.DataArray:
    """||Z_1||_F^2/||Z_2||_F^2."""
    return frobenius2(part, 1) / frobenius2(part, 2)


# At That1


@claim(f"{PAPER}, Theorem C.1", TINY, ">=")
def early_alignment(seeds: int) -> Cases:
    """at That1, 1 - cos^2(U_Z1, gamma_1) <= b2 alpha^p: p = (3 + delta_w)/(5 - delta_w), fitted"""
    yield from _at_that1(seeds, _unaligned, theory.alignment_exponent)


@claim(f"{PAPER}, Theorem C.1", TINY, ">=")
def early_imbalance(seeds: int) -> Cases:
    """at That1, ||Z_1||_F^2/||Z_2||_F^2 >= b1 alpha^-p: p = 2 (1 - delta_w)/(5 - delta_w), fitted"""
    yield from _at_that1(seeds, _imbalance, theory.imbalance_exponent, -1)


@claim(DERIVED, TINY, ">=")
def early_smallness(seeds: int) -> Cases:
    """at That1, ||Z_1||_F^2 <= b3 alpha: exponent"""
    yield from _at_that1(seeds, lambda part: frobenius2(part, 1), lambda d: 1)


@claim(f"{PAPER}, Theorem C.1", TINY, ">=")
def early_smallness_not_squared(seeds: int) -> Cases:
    """the same for ||Z_1||_F, not squared"""
    yield from _at_that1(seeds, lambda part: frobenius2(part, 1) ** 0.5, lambda d: 1)


@claim(SLIDES, TINY, ">=")
def early_update(seeds: int) -> Cases:
    """at That1, ||F||_2 <= O(alpha): exponent"""
    yield from _at_that1(seeds, lambda part: part["update_singular_values"].isel(mode=0), lambda d: 1)


@claim(SLIDES, TINY, ">=")
def update_alignment(seeds: int) -> Cases:
    """at That1, F's top singular vectors have turned to (u; v): 1 - cos^2 <= c4 alpha^p, p of Claim 3.2"""
    unaligned = lambda part: sine2(part["update_alignment_error"])  # noqa: E731
    yield from _at_that1(seeds, unaligned, theory.alignment_exponent_claim)


# T1


@claim(f"{PAPER}, Theorem C.2", GAUSSIAN)
def t1_window(seeds: int) -> Cases:
    """T1 lies in [That1, That1 + Ttil1]: share of the runs with That1 > 0"""
    for where, _, part in each_setting(runs.gaussian(seeds)):
        t1, (early, escape) = t1_of(part, seeds), early_times(part)
        inside = ((t1 >= early) & (t1 <= early + escape)).where(early > 0)
        counted = int((early > 0).sum())
        yield Tried(where, 1, float(inside.mean()), applies=counted > 0, counted=(counted, early.size))


@claim(SLIDES, GAUSSIAN, within=(0.4, 0.1))
def t1_ratio(seeds: int) -> Cases:
    """T1 = log(1/alpha) / (sigma sigma_W2): measured over predicted, between 0.6 and 1.1"""
    for where, c, part in each_setting(runs.gaussian(seeds)):
        for alpha in ALPHAS:
            unit = c.rate * theory.t1_slides(c, alpha)
            yield f"{where}, alpha = {alpha:.3g}", 1, t1_of(part, seeds).sel(alpha=alpha) / unit


@claim(SLIDES, GAUSSIAN, within=0.02)
def t1_slope(seeds: int) -> Cases:
    """T1 grows by 1/(sigma sigma_W2) for each factor e in 1/alpha, in that unit"""
    for where, c, part in each_setting(runs.gaussian(seeds)):
        per_log = slope(xr.apply_ufunc(np.exp, t1_of(part, seeds)), 1 / part["alpha"])
        yield where, c.rate * (theory.t1_slides(c, 1e-6) - theory.t1_slides(c, 1e-3)) / np.log(1e3), per_log


# At T1


@claim(f"{PAPER}, Theorem C.2", GAUSSIAN, ">=")
def t1_alignment(seeds: int) -> Cases:
    """at T1, 1 - cos^2 <= b2 alpha^p: p = (3 + delta_w)/(5 - delta_w), fitted"""
    yield from _at_t1(seeds, _unaligned, theory.alignment_exponent)


@claim(f"{PAPER}, Claim 3.2", GAUSSIAN, ">=")
def t1_alignment_claim(seeds: int) -> Cases:
    """the same with the weaker p = (1 + delta_w)/(3 + delta_w)"""
    yield from _at_t1(seeds, _unaligned, theory.alignment_exponent_claim)


@claim(f"{PAPER}, Theorem C.2", GAUSSIAN, ">=")
def t1_imbalance(seeds: int) -> Cases:
    """at T1, ||Z_1||_F^2/||Z_2||_F^2 >= b1 alpha^-p: p = 2 (1 - delta_w)/(5 - delta_w), fitted"""
    yield from _at_t1(seeds, _imbalance, theory.imbalance_exponent, -1)


@claim(f"{PAPER}, Claim 3.2", GAUSSIAN, ">=")
def t1_imbalance_claim(seeds: int) -> Cases:
    """at T1, ||Z_1||^2/||Z_2||^2 >= c5 alpha^-p: p = 4 (1 - delta_w)/(5 - delta_w), fitted"""
    ratio = lambda part: part["norm_z1"] ** 2 / part["norm_z2"] ** 2  # noqa: E731
    yield from _at_t1(seeds, ratio, theory.imbalance_exponent_claim, -1)


@claim(SLIDES, GAUSSIAN, ">=")
def t1_imbalance_products(seeds: int) -> Cases:
    """at T1, ||B1 A1||_2^2/||B2 A2||_2^2 >= O(alpha^-p), the same p"""
    ratio = lambda part: part["norm_b1a1"] ** 2 / part["norm_b2a2"] ** 2  # noqa: E731
    yield from _at_t1(seeds, ratio, theory.imbalance_exponent_claim, -1)

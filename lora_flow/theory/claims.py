"""Every claim of arXiv 2503.06982 and of the talk on it: stated, predicted, measured, and a verdict.

A claim is a function of the evidence that returns one `Line`. What the paper prints wrongly has a line of its own,
beside the right reading, and is meant to fail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from scipy import stats

from lora_flow.adapter import Adapter, Adapters
from lora_flow.flow import solve
from lora_flow.initialization import gaussian_init
from lora_flow.paper import FIGURE_3
from lora_flow.problem import Factorization
from lora_flow.report import log10
from lora_flow.sweeps import sweep
from lora_flow.targets import aligned_problem
from lora_flow.theory import gradient_flow as theory
from lora_flow.theory.evidence import ALPHAS, DELTA_W, SIDES, Evidence
from lora_flow.timeline import at_times, phases

PAPER = "Xu et al."
LINEAR_ALPHAS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)


@dataclasses.dataclass(frozen=True)
class Case:
    """One number against its prediction; `half_width` of a 95% interval over seeds where there is one."""

    where: str
    predicted: float
    measured: float
    half_width: float | None
    holds: bool | None  # None where the claim does not apply


@dataclasses.dataclass(frozen=True)
class Line:
    """A claim: where it is from, what it says, the cases it was tried on, and the runs behind them."""

    source: str
    statement: str
    runs: str
    cases: tuple[Case, ...]

    @property
    def verdict(self) -> str:
        tried = [case.holds for case in self.cases if case.holds is not None]
        if not tried:
            return "not applicable"
        return "holds" if all(tried) else f"fails ({sum(not holds for holds in tried)} of {len(tried)})"


Claim = Callable[[Evidence], Line]
Quantity = Callable[[xr.Dataset], xr.DataArray]
Exponent = Callable[[Any], Any]  # of delta_w
CLAIMS: list[Claim] = []


def claim(function: Claim) -> Claim:
    CLAIMS.append(function)
    return function


# What the cases are made of


def estimate(values: Any) -> tuple[float, float]:
    """Mean over seeds, and half the width of its 95% interval (Student's t)."""
    values = np.ravel(np.asarray(values, float))
    width = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(width)


def slope(values: xr.DataArray, over: xr.DataArray) -> xr.DataArray:
    """d log(values) / d log(over) by least squares over alpha, seed by seed."""
    x, y = log(over), log(values)
    x, y = x - x.mean("alpha"), y - y.mean("alpha")
    return (x * y).sum("alpha") / (x**2).sum("alpha")


def log(values: xr.DataArray) -> xr.DataArray:
    return xr.apply_ufunc(np.log, values)


def name(delta_w: float, side: str | None = None, alpha: float | None = None) -> str:
    parts = [f"delta_w = {delta_w:.3g}"]
    return ", ".join(parts + ([f"side {side}"] if side else []) + ([f"alpha = {alpha:.3g}"] if alpha else []))


def settings(dataset: xr.Dataset) -> Iterator[tuple[float, str, xr.Dataset]]:
    for delta_w in DELTA_W:
        for side in SIDES:
            yield delta_w, side, dataset.sel(delta_w=delta_w, side=side)


def near(where: str, predicted: float, values: Any, within: float) -> Case:
    """The mean over seeds is the prediction, to an absolute tolerance."""
    mean, width = estimate(values)
    return Case(where, predicted, mean, width, bool(abs(mean - predicted) <= within))


def at_least(where: str, predicted: float, values: Any) -> Case:
    """The mean over seeds is at least the prediction; the interval decides where they are close."""
    mean, width = estimate(values)
    return Case(where, predicted, mean, width, bool(mean + width >= predicted))


def of_all(where: str, predicted: float, measured: float, holds: bool | np.bool_) -> Case:
    """The worst of all runs and times, without an interval."""
    return Case(where, float(predicted), float(measured), None, bool(holds))


def sine2(error: xr.DataArray) -> xr.DataArray:
    """1 - cos^2 from 1 - cos."""
    return error * (2 - error)


def frobenius2(dataset: xr.Dataset, layer: int) -> xr.DataArray:
    return dataset[f"norm_along{layer}"] ** 2 + dataset[f"norm_across{layer}"] ** 2


# The flow itself


@claim
def conservation(ev: Evidence) -> Line:
    cases = []
    for delta_w in DELTA_W:
        drift = np.asarray(_linear(ev, delta_w, "B").observables["drift"]).max()
        cases.append(of_all(name(delta_w), 0.0, drift, drift < 1e-9))
    return Line(f"{PAPER}, section 1", "A A^T - B^T B is conserved (change / ||Z||^2)", _LINEAR_RUNS, tuple(cases))


@claim
def exact_split(ev: Evidence) -> Line:
    cases = []
    for delta_w in DELTA_W:
        c, problem = ev.gains(delta_w), ev.problem(delta_w)
        flat = jax.tree.map(
            lambda leaf: np.asarray(leaf)[:, 0].reshape(-1, *leaf.shape[-2:]), _linear(ev, delta_w, "B").history
        )
        field = jax.vmap(problem.field)(flat)
        errors = [_split_error(problem, c, one(flat, i), one(field, i)) for i in range(len(flat[0].a))]
        cases.append(of_all(name(delta_w), 0.0, max(errors), max(errors) < 1e-10))
    statement = "dZ_i/dt = (sigma s H_i + [0 D_i; D_i^T 0]) Z_i, the error relative to dZ_i/dt"
    return Line(f"{PAPER}, (7), (8)", statement, _LINEAR_RUNS, tuple(cases))


# Early alignment


def _closed_form(ev: Evidence, formula: Callable[..., np.ndarray]) -> tuple[Case, ...]:
    """The exponent in alpha of the distance between the flow and a closed form at tau = 1.5."""
    cases = []
    for delta_w in DELTA_W:
        problem, c = ev.problem(delta_w), ev.gains(delta_w)
        u, _, vt = np.linalg.svd(problem.shift)
        pair = np.asarray(problem.w2).T @ u[:, 0] / c.s2, vt[0]
        growth = c.rate * (_LINEAR_TAU[-1] / c.rate)
        for side in SIDES:
            layer = _linear(ev, delta_w, side).history[0]
            z = np.asarray(layer.stacked)  # (alpha, seed, time, h + n, r)
            distance = [[np.linalg.norm(run[-1] - formula(run[0], *pair, growth)) for run in row] for row in z]
            errors = xr.DataArray(distance, dims=("alpha", "seed"), coords={"alpha": list(LINEAR_ALPHAS)})
            cases.append(near(name(delta_w, side), 3.0, slope(errors, errors["alpha"]), 0.05))
    return tuple(cases)


@claim
def closed_form(ev: Evidence) -> Line:
    statement = "Z_1 is the closed form, constant term included, up to O(alpha^3): exponent"
    return Line(f"{PAPER}, Claim 3.1", statement, _LINEAR_RUNS, _closed_form(ev, theory.linearised_flow))


@claim
def closed_form_as_printed(ev: Evidence) -> Line:
    statement = "the same as printed in (10), without the constant term: exponent"
    runs = _LINEAR_RUNS
    return Line(f"{PAPER}, (10) as printed", statement, runs, _closed_form(ev, theory.linearised_flow_as_printed))


def _rate(dataset: xr.Dataset, variable: str, tau: float = 6.0) -> xr.DataArray:
    """The mean growth rate of log variable^2 up to tau, at the smallest alpha."""
    values = 2 * log(dataset[variable].isel(alpha=-1))
    return (values.sel(time=tau, method="nearest") - values.isel(time=0)) / tau


@claim
def growth(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in settings(ev.tiny):
        c = ev.gains(delta_w)
        cases.append(near(name(delta_w, side), theory.growth_rate(c) / c.rate, _rate(part, "norm_along1"), 1e-3))
    statement = "d/dt log ||gamma_1^T Z_1||^2 = 2 sigma sigma_W2, in units of sigma sigma_W2"
    return Line(f"{PAPER}, Claim 3.1", statement, _TINY_RUNS, tuple(cases))


@claim
def selection(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in settings(ev.tiny):
        c = ev.gains(delta_w)
        difference = _rate(part, "norm_along1") - _rate(part, "norm_along2")
        cases.append(near(name(delta_w, side), theory.selection_rate(c) / c.rate, difference, 1e-3))
    statement = "layer 1 outgrows layer 2 at the rate 2 sigma (sigma_W2 - sigma_W1), same units"
    return Line(f"{PAPER}, Claim 3.1", statement, _TINY_RUNS, tuple(cases))


@claim
def selection_from_zero_as_printed(ev: Evidence) -> Line:
    cases = []
    for delta_w in DELTA_W:
        problem, c = ev.problem(delta_w), ev.gains(delta_w)
        for side in SIDES:
            start = gaussian_init(jax.random.key(0), problem, rank=4, alpha=1e-3, side=side)
            speed = problem.field(start)
            rates = [
                2 * float(np.sum(np.asarray(z.stacked) * dz.stacked)) / float(np.sum(np.asarray(z.stacked) ** 2))
                for z, dz in zip(start, speed, strict=True)
            ]
            at_zero = (rates[0] - rates[1]) / c.rate
            cases.append(of_all(name(delta_w, side), (1 - c.d), at_zero, at_zero >= (1 - c.d)))
    statement = "||Z_1||_F^2 / ||Z_2||_F^2 grows at a rate of order 1 - delta_w from t = 0 on"
    return Line(f"{PAPER}, Lemma C.1 as printed", statement, "gaussian, alpha = 1e-3, at t = 0", tuple(cases))


def early_times(ev: Evidence, dataset: xr.Dataset, delta_w: float) -> tuple[xr.DataArray, xr.DataArray]:
    """That1 and Ttil1 of every run, in tau."""
    problem, c = ev.problem(delta_w), ev.gains(delta_w)
    alpha = dataset["alpha"]
    start = dataset.isel(time=0)
    z_max = np.sqrt(np.maximum(frobenius2(start, 1), frobenius2(start, 2))) / alpha
    w1, w2 = (float(np.linalg.norm(np.asarray(w), 2)) for w in (problem.w1, problem.w2))
    return c.rate * theory.early_time(c, alpha, z_max, w1, w2), c.rate * theory.escape_time(c, alpha, z_max)


def _at_that1(
    ev: Evidence, quantity: Callable[[xr.Dataset], xr.DataArray], exponent: Callable[..., Any], sign: int
) -> tuple[Case, ...]:
    cases = []
    for delta_w, side, part in settings(ev.tiny):
        when, _ = early_times(ev, part, delta_w)
        slopes = sign * slope(at_times(quantity(part), when), part["alpha"])
        cases.append(at_least(name(delta_w, side), exponent(ev.gains(delta_w).d), slopes))
    return tuple(cases)


@claim
def early_alignment(ev: Evidence) -> Line:
    cases = _at_that1(ev, lambda part: sine2(part["alignment_error"]), theory.alignment_exponent, 1)
    statement = "at That1, 1 - cos^2(U_Z1, gamma_1) <= b2 alpha^p: p = (3 + delta_w)/(5 - delta_w), fitted"
    return Line(f"{PAPER}, Theorem C.1", statement, _TINY_RUNS, cases)


@claim
def early_imbalance(ev: Evidence) -> Line:
    cases = _at_that1(ev, lambda part: frobenius2(part, 1) / frobenius2(part, 2), theory.imbalance_exponent, -1)
    statement = "at That1, ||Z_1||_F^2/||Z_2||_F^2 >= b1 alpha^-p: p = 2 (1 - delta_w)/(5 - delta_w), fitted"
    return Line(f"{PAPER}, Theorem C.1", statement, _TINY_RUNS, cases)


@claim
def early_smallness(ev: Evidence) -> Line:
    cases = _at_that1(ev, lambda part: frobenius2(part, 1), lambda d: 1.0, 1)
    return Line(f"{PAPER}, Theorem C.1", "at That1, ||Z_1||_F^2 <= b3 alpha: exponent", _TINY_RUNS, cases)


@claim
def early_smallness_as_printed(ev: Evidence) -> Line:
    cases = _at_that1(ev, lambda part: frobenius2(part, 1) ** 0.5, lambda d: 1.0, 1)
    statement = "the same for ||Z_1||_F, not squared"
    return Line(f"{PAPER}, Theorem C.1 as printed", statement, _TINY_RUNS, cases)


@claim
def early_update(ev: Evidence) -> Line:
    cases = _at_that1(ev, lambda part: part["update_singular_values"].isel(mode=0), lambda d: 1.0, 1)
    return Line("slides", "at That1, ||F||_2 <= O(alpha): exponent", _TINY_RUNS, cases)


@claim
def update_alignment(ev: Evidence) -> Line:
    cases = _at_that1(ev, lambda part: sine2(part["update_alignment_error"]), theory.alignment_exponent_claim, 1)
    statement = "at That1, F's top singular vectors have turned to (u; v): 1 - cos^2 <= c4 alpha^p, p of Claim 3.2"
    return Line("slides", statement, _TINY_RUNS, cases)


# T1


@claim
def t1_window(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in settings(ev.gaussian):
        t1 = ev.t1.sel(delta_w=delta_w, side=side)
        early, escape = early_times(ev, part, delta_w)
        inside = float(((t1 >= early) & (t1 <= early + escape)).mean())
        cases.append(of_all(name(delta_w, side), 1.0, inside, inside == 1.0))
    return Line(f"{PAPER}, Theorem C.2", "T1 lies in [That1, That1 + Ttil1]: share of runs", _RUNS, tuple(cases))


@claim
def t1_ratio(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, _ in settings(ev.gaussian):
        c = ev.gains(delta_w)
        for alpha in ALPHAS:
            t1 = ev.t1.sel(delta_w=delta_w, side=side, alpha=alpha)
            mean, width = estimate(t1 / (c.rate * theory.t1_slides(c, alpha)))
            cases.append(Case(name(delta_w, side, alpha), 1.0, mean, width, 0.6 <= mean <= 1.1))
    statement = "T1 = log(1/alpha) / (sigma sigma_W2): measured over predicted, between 0.6 and 1.1"
    return Line("slides", statement, _RUNS, tuple(cases))


@claim
def t1_slope(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in settings(ev.gaussian):
        c = ev.gains(delta_w)
        t1 = ev.t1.sel(delta_w=delta_w, side=side)
        per_log = slope(xr.apply_ufunc(np.exp, t1), 1 / part["alpha"])
        unit = c.rate * (theory.t1_slides(c, 1e-6) - theory.t1_slides(c, 1e-3)) / np.log(1e3)
        cases.append(near(name(delta_w, side), unit, per_log, 0.02))
    statement = "T1 grows by 1/(sigma sigma_W2) for each factor e in 1/alpha, in that unit"
    return Line("slides", statement, _RUNS, tuple(cases))


def _at_t1(
    ev: Evidence, quantity: Callable[[xr.Dataset], xr.DataArray], exponent: Callable[..., Any], sign: int
) -> tuple[Case, ...]:
    cases = []
    for delta_w, side, part in settings(ev.gaussian):
        values = at_times(quantity(part), ev.t1.sel(delta_w=delta_w, side=side))
        slopes = sign * slope(values, part["alpha"])
        cases.append(at_least(name(delta_w, side), exponent(ev.gains(delta_w).d), slopes))
    return tuple(cases)


@claim
def t1_alignment(ev: Evidence) -> Line:
    cases = _at_t1(ev, lambda part: sine2(part["alignment_error"]), theory.alignment_exponent, 1)
    statement = "at T1, 1 - cos^2 <= b2 alpha^p: p = (3 + delta_w)/(5 - delta_w), fitted"
    return Line(f"{PAPER}, Theorem C.2", statement, _RUNS, cases)


@claim
def t1_alignment_claim(ev: Evidence) -> Line:
    cases = _at_t1(ev, lambda part: sine2(part["alignment_error"]), theory.alignment_exponent_claim, 1)
    statement = "the same with the weaker p = (1 + delta_w)/(3 + delta_w)"
    return Line(f"{PAPER}, Claim 3.2", statement, _RUNS, cases)


@claim
def t1_imbalance(ev: Evidence) -> Line:
    cases = _at_t1(ev, lambda part: frobenius2(part, 1) / frobenius2(part, 2), theory.imbalance_exponent, -1)
    statement = "at T1, ||Z_1||_F^2/||Z_2||_F^2 >= b1 alpha^-p: p = 2 (1 - delta_w)/(5 - delta_w), fitted"
    return Line(f"{PAPER}, Theorem C.2", statement, _RUNS, cases)


@claim
def t1_imbalance_claim(ev: Evidence) -> Line:
    ratio = lambda part: part["norm_z1"] ** 2 / part["norm_z2"] ** 2  # noqa: E731
    cases = _at_t1(ev, ratio, theory.imbalance_exponent_claim, -1)
    statement = "at T1, ||Z_1||^2/||Z_2||^2 >= c5 alpha^-p: p = 4 (1 - delta_w)/(5 - delta_w), fitted"
    return Line(f"{PAPER}, Claim 3.2", statement, _RUNS, cases)


@claim
def t1_imbalance_products(ev: Evidence) -> Line:
    ratio = lambda part: part["norm_b1a1"] ** 2 / part["norm_b2a2"] ** 2  # noqa: E731
    cases = _at_t1(ev, ratio, theory.imbalance_exponent_claim, -1)
    statement = "at T1, ||B1 A1||_2^2/||B2 A2||_2^2 >= O(alpha^-p), the same p"
    return Line("slides", statement, _RUNS, cases)


# Local convergence and where the loss stops


@claim
def local_alignment(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in settings(ev.gaussian):
        t1 = ev.t1.sel(delta_w=delta_w, side=side)
        error = sine2(part["alignment_error"])
        kept = np.log1p(-error.where(error["time"] >= t1)) / np.log1p(-at_times(error, t1))
        worst = float(kept.max())
        cases.append(of_all(name(delta_w, side), 1.0, worst, worst <= 1.0))
    statement = "after T1, cos^2(t) >= cos^(2 c6)(T1): the smallest c6 that will do, at most 1"
    return Line(f"{PAPER}, Theorem 3.2", statement, _RUNS, tuple(cases))


@claim
def local_imbalance(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in settings(ev.gaussian.isel(alpha=-1)):
        t1 = ev.t1.isel(alpha=-1).sel(delta_w=delta_w, side=side)
        ratio = part["norm_z1"] / part["norm_z2"]
        kept = log(ratio.where(ratio["time"] >= t1)) / log(at_times(ratio, t1))
        worst = float(kept.min())
        cases.append(of_all(name(delta_w, side), 0.0, worst, worst > 0))
    statement = "after T1, ||Z_1||/||Z_2||(t) >= (||Z_1||/||Z_2||(T1))^c7: the largest c7 at alpha = 1e-6, positive"
    return Line(f"{PAPER}, Theorem 3.2", statement, _RUNS, tuple(cases))


@claim
def local_bound(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in settings(ev.gaussian):
        c, t1 = ev.gains(delta_w), ev.t1.sel(delta_w=delta_w, side=side)
        elapsed = (part["time"] - t1) / c.rate
        ratio = at_times(part["norm_z2"], t1) / part["norm_z1"].isel(time=-1)
        bound = theory.local_loss_bound(c, at_times(part["loss"], t1), elapsed, ratio, 0.0)
        excess = (part["loss"] - bound).where(elapsed >= 0).max("time").clip(min=0)
        c8 = excess / sine2(at_times(part["alignment_error"], t1))
        worst = float(c8.max())
        cases.append(of_all(name(delta_w, side), 1.0, worst, worst <= 1.0))
    statement = "after T1, L <= 2 exp(-(1 - ratio)(1 - delta_w) sigma s2 (t - T1)/16) L(T1) + c8 (1 - cos^2): c8 needed"
    return Line(f"{PAPER}, Theorem 3.2", statement, _RUNS, tuple(cases))


@claim
def local_decay(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in settings(ev.gaussian):
        c, t1 = ev.gains(delta_w), ev.t1.sel(delta_w=delta_w, side=side)
        start, loss = at_times(part["loss"], t1), part["loss"]
        fell = (loss <= 1e-4 * start) & (part["time"] >= t1)
        first = part["time"].where(fell).min("time")
        rate = np.log(start / at_times(loss, first)) / (first - t1)
        cases.append(at_least(name(delta_w, side), theory.local_rate(c) / c.rate, rate))
    statement = "the loss falls at a rate of at least (1 - delta_w)/32 after T1, in sigma sigma_W2; over four decades"
    return Line(f"{PAPER}, Theorem 3.2", statement, _RUNS, tuple(cases))


@claim
def final_loss(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in settings(ev.gaussian):
        last = part["loss"].isel(time=-1)
        resolved = last.where((last > 1e-25 * part["loss"].isel(time=0)).all("seed"), drop=True)
        where = name(delta_w, side)
        if resolved.sizes["alpha"] < 5:
            cases.append(Case(where, 0.0, np.nan, None, None))
        else:
            mean, width = estimate(slope(resolved, resolved["alpha"]))
            cases.append(Case(where, 0.0, mean, width, mean - width > 0))
    statement = "the loss comes down to 2 alpha^c3 with some c3 > 0: fitted at tau = 100, above 1e-25"
    return Line(f"{PAPER}, Theorem 3.1", statement, _RUNS, tuple(cases))


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
            cases.append(near(name(delta_w, "B", alpha), float(floor), log10(run["alignment_error"]), 0.1))
    statement = "side B: 1 - cos stops at (h - m) alpha^2 / (2 ||Z_1||^2); log10, within 0.1"
    return Line("derived here", statement, _RUNS, tuple(cases))


def _published(ev: Evidence, side: str) -> tuple[Case, ...]:
    cases = []
    for delta_w, row in zip(DELTA_W, FIGURE_3.values(), strict=True):
        for alpha, published in zip(row.settings.alpha, row.alignment, strict=True):
            errors = ev.gaussian["alignment_error"].sel(delta_w=delta_w, side=side).sel(alpha=alpha, method="nearest")
            there = errors.interp(time=row.alignment_until * ev.gains(delta_w).rate)
            cases.append(near(name(delta_w, side, alpha), published, log10(there), 0.25))
    return tuple(cases)


@claim
def published_with_side_b(ev: Evidence) -> Line:
    statement = "Figure 3, log10(1 - cos) at panel end, with B random: within 0.25"
    return Line(f"{PAPER}, Figure 3", statement, _RUNS, _published(ev, "B"))


@claim
def published_with_side_a(ev: Evidence) -> Line:
    statement = "the same with A random, as the text says"
    return Line(f"{PAPER}, section 2 as printed", statement, _RUNS, _published(ev, "A"))


# Spectral initialisation


@claim
def spectral_diagonal(ev: Evidence) -> Line:
    cases = [of_all(name(d), 0.0, modes.off_diagonal, modes.off_diagonal < 1e-12) for d, modes in ev.modes.items()]
    statement = "spectral: the factors stay diagonal (inner products of different modes, relative)"
    return Line(f"{PAPER}, section 4", statement, _SPECTRAL_RUNS, tuple(cases))


@claim
def spectral_scalars(ev: Evidence) -> Line:
    cases = []
    for delta_w, modes in ev.modes.items():
        c = ev.gains(delta_w)
        predicted = np.stack([theory.mode_field(c, run) for run in np.moveaxis(modes.state, 1, 0)], axis=1) / c.rate
        scale = np.abs(modes.speed).max(axis=(0, 2), keepdims=True)
        error = float(np.max(np.abs(predicted - modes.speed) / scale))
        cases.append(of_all(name(delta_w), 0.0, error, error < 1e-9))
    statement = "spectral: a mode follows its four scalar equations (error relative to the largest speed)"
    return Line(f"{PAPER}, Theorem 4.1", statement, _SPECTRAL_RUNS, tuple(cases))


def _level_times(ev: Evidence, delta_w: float) -> np.ndarray:
    """When z1 or z2 of each run first comes to the level of T1, in tau; z2 is first where it started much larger."""
    modes, level = ev.modes[delta_w], theory.mode_t1_level(ev.gains(delta_w))
    grown = np.maximum.accumulate(np.maximum(modes.size(1), modes.size(2)), axis=-1)
    return np.array([np.interp(np.log(level), np.log(z), modes.tau) for z in grown])


def _formula_times(formula: Callable[..., Any]) -> Callable[..., np.ndarray]:
    return lambda ev, d: ev.gains(d).rate * formula(ev.gains(d), ev.modes[d].size(1)[:, 0])


def _growth_cases(
    ev: Evidence,
    until: Callable[[Evidence, float], np.ndarray],
    start: Callable[..., Any] | None = None,
    selection: bool = False,
) -> tuple[Case, ...]:
    """The smallest rate of log z1, or of log z1/z2, over all runs between two times, against the least one."""
    cases = []
    for delta_w, modes in ev.modes.items():
        c = ev.gains(delta_w)
        rates = modes.growth(1) - (modes.growth(2) if selection else 0.0)
        begin = theory.mode_growth_start(c) if start is None else start(c)
        inside = (modes.tau >= c.rate * begin) & (modes.tau <= until(ev, delta_w)[:, None])
        least = (theory.mode_selection_rate(c) if selection else theory.mode_growth_rate(c)) / c.rate
        measured = float(np.min(rates[inside]))
        cases.append(of_all(name(delta_w), least, measured, measured >= least))
    return tuple(cases)


@claim
def mode_growth(ev: Evidence) -> Line:
    statement = "spectral: log z1 grows at least at (3 + delta_w)/2, from artanh((3 + delta_w)/4)/2 on until T1"
    return Line(f"{PAPER}, Theorem 4.1, F.1", statement, _SPECTRAL_RUNS, _growth_cases(ev, _level_times))


@claim
def mode_growth_from_zero_as_printed(ev: Evidence) -> Line:
    cases = _growth_cases(ev, _level_times, start=lambda c: 0.0)
    return Line(f"{PAPER}, Theorem 4.1 as printed", "the same from t = 0", _SPECTRAL_RUNS, cases)


@claim
def mode_growth_until_formula_as_printed(ev: Evidence) -> Line:
    cases = _growth_cases(ev, _formula_times(theory.mode_t1))
    statement = "the same until T1 = 2 log(X) / ((3 + delta_w) sigma sigma_W2), X = (1 - delta_w) sigma/(8 s2 z1(0))"
    return Line(f"{PAPER}, Theorem F.1 as printed", statement, _SPECTRAL_RUNS, cases)


@claim
def mode_growth_until_main_text_as_printed(ev: Evidence) -> Line:
    cases = _growth_cases(ev, _formula_times(theory.mode_t1_main_text))
    return Line(f"{PAPER}, section 4 as printed", "the same with X = sigma/(16 z1(0))", _SPECTRAL_RUNS, cases)


@claim
def mode_selection(ev: Evidence) -> Line:
    cases = _growth_cases(ev, _level_times, selection=True)
    statement = "spectral: log (z1/z2) grows at least at 3 (1 - delta_w)/2, in the same window"
    return Line(f"{PAPER}, Theorem 4.1", statement, _SPECTRAL_RUNS, cases)


@claim
def mode_t1_bound(ev: Evidence) -> Line:
    cases = []
    for delta_w in ev.modes:
        latest = float(np.max(_level_times(ev, delta_w) / _formula_times(theory.mode_t1)(ev, delta_w)))
        cases.append(of_all(name(delta_w), 1.0, latest, latest <= 1.0))
    statement = "spectral: z1 or z2 comes to (1 - delta_w) sigma/(8 sigma_W2) by that formula's T1 (ratio)"
    return Line(f"{PAPER}, Theorem F.1", statement, _SPECTRAL_RUNS, tuple(cases))


@claim
def mode_convergence(ev: Evidence) -> Line:
    cases = []
    for delta_w, modes in ev.modes.items():
        c = ev.gains(delta_w)
        slowest = np.inf
        for run, tau1 in zip(modes.loss, _level_times(ev, delta_w), strict=True):
            after = (modes.tau > tau1 + 0.1) & (run > 1e-25 * run[0])
            start = np.exp(np.interp(tau1, modes.tau, np.log(run)))
            slowest = min(slowest, float(np.min(np.log(start / run[after]) / (modes.tau[after] - tau1))))
        least = theory.mode_local_rate(c) / c.rate
        cases.append(of_all(name(delta_w), least, slowest, slowest >= least))
    statement = "spectral: after T1 the loss falls at least at (1 - delta_w)/8, down to rounding"
    return Line(f"{PAPER}, Theorem 4.1", statement, _SPECTRAL_RUNS, tuple(cases))


@claim
def spectral_floor(ev: Evidence) -> Line:
    cases = []
    for delta_w, modes in ev.modes.items():
        last = modes.loss[:, -1].max() / modes.loss[0, 0]
        cases.append(of_all(name(delta_w), 0.0, last, last < 1e-25))
    statement = "spectral: any precision is reached (L / L(0) at tau = 40: rounding)"
    return Line(f"{PAPER}, section 4", statement, _SPECTRAL_RUNS, tuple(cases))


@claim
def incremental_learning(ev: Evidence) -> Line:
    """Three modes, whose order by sigma_shift is not their order by sigma_shift sigma_W2."""
    scales = (1.0, 3.0, 4.0)
    problem = aligned_problem(jax.random.key(0), component=[0, 3, 7], shift_scale=scales)
    u, sigma, vt = (x[:, :3] if i == 0 else x[:3] for i, x in enumerate(np.linalg.svd(problem.shift)))
    rates = sigma * np.linalg.norm(np.asarray(problem.w2).T @ u, axis=0)
    alpha, r = 1e-6, 3
    learned = []
    for seed in range(ev.seeds):
        size = alpha * (1 + 0.1 * np.random.default_rng(seed).normal(size=r))  # modes that start alike, nearly
        g = np.asarray(problem.w2).T @ u / np.linalg.norm(np.asarray(problem.w2).T @ u, axis=0)
        start = _without_b(problem, size[:, None] * vt, size[:, None] * g.T)
        end = 2 * np.log(1 / alpha) / rates.min()
        run = solve(problem, start, t1=end, saves=401, save_adapters=True)
        history = jax.tree.map(np.asarray, run.history)
        update = jax.vmap(problem.update)(history)
        share = np.einsum("mk,tmn,kn->kt", u, update, vt) / sigma[:, None]
        learned.append([float(np.interp(0.5, one, run.times)) for one in share])
    times = np.array(learned)
    cases = [
        near(f"mode with sigma {s:.3g}", 1.0, times[:, k] * rates[k] / np.log(1 / alpha), 0.25)
        for k, s in enumerate(sigma)
    ]
    ordered = np.all(np.argsort(times, axis=1) == np.argsort(-rates)[None, :])
    cases.append(of_all("order of sigma_shift sigma_W2, not of sigma_shift", 1.0, float(ordered), bool(ordered)))
    statement = "spectral: modes are learned one by one, each near log(1/alpha) / (sigma_shift sigma_W2)"
    runs = f"spectral along three modes, sigma = 4, 3, 1, alpha = 1e-6, {ev.seeds} seeds"
    return Line(f"{PAPER}, Theorem 4.1", statement, runs, tuple(cases))


# Initialisations from the pretrained weights alone


def _stuck(ev: Evidence, x: float) -> tuple[float, float]:
    """Loss at the start and at t = 20, from A_i = a_i e1^T, with Yft = diag(100, 1 + x)."""
    weights = np.diag([10.0, 1.0])
    problem = Factorization(weights, weights, np.diag([0.0, x])) if x else None
    if problem is None:
        return 0.0, 0.0  # Yft = Ypre: there is nothing to learn, and no problem
    e1 = np.array([[1.0, 0.0]])
    start = _without_b(problem, 0.1 * e1, 0.2 * e1)
    loss = solve(problem, start, t1=20.0, saves=2).observables["loss"]
    return float(loss[0]), float(loss[-1])


@claim
def stuck(ev: Evidence) -> Line:
    cases = []
    for x in (1.0, np.sqrt(2), 3.0):
        _, last = _stuck(ev, x)
        cases.append(of_all(f"x = {x:.3g}", x**2 / 2, last, abs(last - x**2 / 2) < 1e-12))
    statement = "from the pretrained weights alone, W1 = W2 = diag(10, 1), Yft = diag(100, 1 + x): L stays at x^2/2"
    return Line(f"{PAPER}, Theorem G.1", statement, "A_i = a_i e1^T, B_i = 0, r = 1, t = 20", tuple(cases))


@claim
def stuck_as_printed(ev: Evidence) -> Line:
    _, last = _stuck(ev, 0.0)
    cases = (of_all("Yft = diag(100, 1)", 1.0, last, abs(last - 1.0) < 1e-12),)
    statement = "the same with Yft = diag(100, 1), which is Ypre: L stays at 1"
    return Line(f"{PAPER}, Theorem G.1 as printed", statement, "none needed: there is nothing to learn", cases)


# delta_w > 1


@claim
def mirror(ev: Evidence) -> Line:
    cases = []
    for delta_w in DELTA_W:
        problem = ev.problem(delta_w)
        turned = Factorization(problem.w2.T, problem.w1.T, problem.shift.T)
        start = gaussian_init(jax.random.key(0), problem, rank=4, alpha=1e-4, side="B")
        end = 30 / ev.gains(delta_w).rate
        swapped = tuple(Adapter(b.T, a.T) for a, b in reversed(start))
        losses = [
            np.asarray(solve(one, adapters, t1=end, saves=61).observables["loss"])
            for one, adapters in ((problem, start), (turned, swapped))
        ]
        error = float(np.max(np.abs(np.log10(losses[1] / losses[0]))[losses[0] > 1e-24]))
        where = f"delta_w = {1 / delta_w:.3g} for {delta_w:.3g}"
        cases.append(of_all(where, 0.0, error, error < 1e-3))
    statement = "delta_w -> 1/delta_w: transposing the problem exchanges the layers and leaves L(t) (decades)"
    return Line("symmetry", statement, "gaussian, side B, alpha = 1e-4, to tau = 30", tuple(cases))


@claim
def mirror_t1(ev: Evidence) -> Line:
    cases = []
    for inverse in (1 / 4, 1 / 100):
        problem = aligned_problem(jax.random.key(0), delta_w=1 / inverse)
        c = theory.gains(problem)
        exchanged = theory.Gains(c.sigma, c.s2, c.s1)
        swept = sweep(problem, alpha=1e-5, seeds=ev.seeds, t1=20 / exchanged.rate, saves=201, progress=False)
        measured = phases(swept)["t1"] / theory.t1_slides(exchanged, 1e-5)
        chosen = bool((swept["norm_b2a2"] > swept["norm_b1a1"]).isel(time=-1).all())
        mean, width = estimate(measured)
        where = f"{name(1 / inverse)}, layer 2 {'wins' if chosen else 'does not win'}"
        cases.append(Case(where, 1.0, mean, width, chosen and 0.6 <= mean <= 1.1))
    statement = "delta_w > 1: layer 2 is selected, at T1 = log(1/alpha) / (sigma sigma_W1)"
    return Line("symmetry", statement, "gaussian, side A, alpha = 1e-5", tuple(cases))


def _without_b(problem: Factorization, *factors: np.ndarray) -> Adapters:
    """Adapters with these A_i and B_i = 0."""
    shapes = zip(factors, problem.layers, strict=True)
    return tuple(Adapter(jnp.asarray(a), jnp.zeros((n_out, len(a)))) for a, (n_out, _) in shapes)


_LINEAR_TAU = (0.0, 0.5, 1.0, 1.5)
_LINEAR_RUNS = "gaussian, alpha = 1e-2 to 1e-4, to tau = 1.5, rtol = 1e-10"
_TINY_RUNS = "gaussian, alpha = 1e-10 to 1e-18, both sides"
_RUNS = "gaussian, alpha = 1e-3 to 1e-6, both sides, to tau = 100"
_SPECTRAL_RUNS = "spectral, alpha = 1e-4, to tau = 40, rtol = 1e-10"


def _linear(ev: Evidence, delta_w: float, side: str) -> Any:
    return ev.precise(delta_w, "gaussian", side, LINEAR_ALPHAS, _LINEAR_TAU)


def one(adapters: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], adapters)


def _split_error(problem: Factorization, c: theory.Gains, adapters: Any, field: Any) -> float:
    """How far dZ_i/dt is from its split (7), (8), relative to it; the larger of the two layers."""
    (a1, b1), (a2, b2) = adapters
    w1, w2, shift = (np.asarray(x) for x in (problem.w1, problem.w2, problem.shift))
    u, _, vt = np.linalg.svd(shift)
    u, v = u[:, 0], vt[0]
    g = w2.T @ u / c.s2
    update = w2 @ b1 @ a1 + b2 @ a2 @ w1 + b2 @ a2 @ b1 @ a1
    residual = shift - update
    drives = (
        (c.sigma * c.s2 * np.outer(g, v), a2.T @ b2.T @ residual - w2.T @ update),
        (c.sigma * c.s1 * np.outer(u, g), residual @ a1.T @ b1.T - update @ w1.T),
    )
    errors = []
    for (a, b), (da, db), (leading, rest) in zip(adapters, field, drives, strict=True):
        whole = leading + rest
        distance = np.hypot(np.linalg.norm(db - whole @ a.T), np.linalg.norm(da.T - whole.T @ b))
        errors.append(distance / np.hypot(np.linalg.norm(db), np.linalg.norm(da)))
    return max(errors)

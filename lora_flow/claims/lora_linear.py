"""The flow itself, and its linearisation: conservation, the exact split, Claim 3.1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import xarray as xr

from lora_flow.claims.frame import (
    PAPER,
    Case,
    Line,
    by_construction,
    case_name,
    claim,
    each_setting,
    log,
    near,
    of_all,
    slope,
)
from lora_flow.claims.lora_runs import DELTA_W, SIDES, Evidence
from lora_flow.initialization import gaussian_init
from lora_flow.problems.base import Factorization
from lora_flow.theory import gradient_flow as theory

LINEAR_ALPHAS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
_LINEAR_TAU = (0.0, 0.5, 1.0, 1.5)
_LINEAR_RUNS = "gaussian, alpha = 1e-2 to 1e-4, to tau = 1.5, rtol = 1e-10"
_TINY_RUNS = "gaussian, alpha = 1e-10 to 1e-18, both sides"


@claim
@by_construction
def conservation(ev: Evidence) -> Line:
    cases = []
    for delta_w in DELTA_W:
        drift = np.asarray(_linear(ev, delta_w, "B").observables["drift"]).max()
        cases.append(of_all(case_name(delta_w), 0.0, drift, drift < 1e-9))
    return Line(f"{PAPER}, section 1", "A A^T - B^T B is conserved (change / ||Z||^2)", _LINEAR_RUNS, tuple(cases))


@claim
@by_construction
def exact_split(ev: Evidence) -> Line:
    cases = []
    for delta_w in DELTA_W:
        c, problem = ev.gains(delta_w), ev.problem(delta_w)
        flat = jax.tree.map(
            lambda leaf: np.asarray(leaf)[:, 0].reshape(-1, *leaf.shape[-2:]), _linear(ev, delta_w, "B").history
        )
        field = jax.vmap(problem.field)(flat)
        errors = [_split_error(problem, c, _at(flat, i), _at(field, i)) for i in range(len(flat[0].a))]
        cases.append(of_all(case_name(delta_w), 0.0, np.max(errors), np.max(errors) < 1e-10))
    statement = "dZ_i/dt = (sigma s H_i + [0 D_i; D_i^T 0]) Z_i, the error relative to dZ_i/dt"
    return Line(f"{PAPER}, (7), (8)", statement, _LINEAR_RUNS, tuple(cases))


def _closed_form(ev: Evidence, formula: Callable[..., np.ndarray]) -> tuple[Case, ...]:
    """The exponent in alpha of the distance between the flow and a closed form at tau = 1.5."""
    cases = []
    for delta_w in DELTA_W:
        problem, c = ev.problem(delta_w), ev.gains(delta_w)
        u, _, vt = np.linalg.svd(problem.shift)
        pair = np.asarray(problem.w2).T @ u[:, 0] / c.s2, vt[0]
        for side in SIDES:
            layer = _linear(ev, delta_w, side).history[0]
            z = np.asarray(layer.stacked)  # (alpha, seed, time, h + n, r)
            distance = [[np.linalg.norm(run[-1] - formula(run[0], *pair, _LINEAR_TAU[-1])) for run in row] for row in z]
            errors = xr.DataArray(distance, dims=("alpha", "seed"), coords={"alpha": list(LINEAR_ALPHAS)})
            cases.append(near(case_name(delta_w, side), 3.0, slope(errors, errors["alpha"]), 0.05))
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
    for delta_w, side, part in each_setting(ev.tiny):
        c = ev.gains(delta_w)
        cases.append(near(case_name(delta_w, side), theory.growth_rate(c) / c.rate, _rate(part, "norm_along1"), 1e-3))
    statement = "d/dt log ||gamma_1^T Z_1||^2 = 2 sigma sigma_W2, in units of sigma sigma_W2"
    return Line(f"{PAPER}, Claim 3.1", statement, _TINY_RUNS, tuple(cases))


@claim
def selection(ev: Evidence) -> Line:
    cases = []
    for delta_w, side, part in each_setting(ev.tiny):
        c = ev.gains(delta_w)
        difference = _rate(part, "norm_along1") - _rate(part, "norm_along2")
        cases.append(near(case_name(delta_w, side), theory.selection_rate(c) / c.rate, difference, 1e-3))
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
            cases.append(of_all(case_name(delta_w, side), (1 - c.d), at_zero, at_zero >= (1 - c.d)))
    statement = "||Z_1||_F^2 / ||Z_2||_F^2 grows at a rate of order 1 - delta_w from t = 0 on"
    return Line(f"{PAPER}, Lemma C.1 as printed", statement, "gaussian, alpha = 1e-3, at t = 0", tuple(cases), ">=")


def _linear(ev: Evidence, delta_w: float, side: str) -> Any:
    return ev.precise(delta_w, "gaussian", side, LINEAR_ALPHAS, _LINEAR_TAU)


def _at(adapters: Any, index: int) -> Any:
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

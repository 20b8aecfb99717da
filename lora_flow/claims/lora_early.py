"""The flow itself, and its linearisation: conservation, the exact split, Claim 3.1."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import xarray as xr

from lora_flow.adapter import Adapters
from lora_flow.claims import lora_runs as runs
from lora_flow.claims.frame import Cases, claim
from lora_flow.claims.lora_runs import DELTA_W, PAPER, SIDES, TINY, case_name, each_setting, log, slope
from lora_flow.dynamics.solve import Trajectory
from lora_flow.initialization import gaussian_init
from lora_flow.problems.factorization import Factorization
from lora_flow.theory import gradient_flow as theory

ALPHAS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
TAU = np.array([0.0, 0.5, 1.0, 1.5])
LINEAR = "gaussian, alpha = 1e-2 to 1e-4, to tau = 1.5, rtol = 1e-10"


@functools.cache
def linear(delta_w: float, side: str, seeds: int) -> Trajectory:
    """From alpha = 1e-2 to 1e-4, to tau = 1.5, `(alpha, seed, time)`."""
    return runs.precise(delta_w, "gaussian", side, ALPHAS, TAU, seeds, "drift")


@claim(f"{PAPER}, section 1", LINEAR, within=1e-9, identity=True)
def conservation(seeds: int) -> Cases:
    """A A^T - B^T B is conserved (change / ||Z||^2)"""
    for delta_w in DELTA_W:
        yield case_name(delta_w), 0, np.max(linear(delta_w, "B", seeds).observables["drift"])


@claim(f"{PAPER}, (7), (8)", LINEAR, within=1e-10, identity=True)
def exact_split(seeds: int) -> Cases:
    """dZ_i/dt = (sigma s H_i + [0 D_i; D_i^T 0]) Z_i, the error relative to dZ_i/dt"""
    for delta_w in DELTA_W:
        problem, c = runs.problem(delta_w), runs.gains(delta_w)
        passed = _flat(linear(delta_w, "B", seeds).history, lambda leaf: np.asarray(leaf)[:, 0])
        field = jax.tree.map(np.asarray, jax.vmap(problem.field)(passed))
        pairs = ([jax.tree.map(lambda leaf, i=i: leaf[i], x) for x in (passed, field)] for i in range(len(passed[0].a)))
        yield case_name(delta_w), 0, max(_split_error(problem, c, *pair) for pair in pairs)


def _flat(adapters: Any, pick: Callable[[Any], np.ndarray]) -> Adapters:
    """What is picked of the adapters, with one leading axis."""
    return jax.tree.map(lambda leaf: pick(leaf).reshape(-1, *leaf.shape[-2:]), adapters)


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


def _orders(formula: Callable[..., np.ndarray], seeds: int) -> Cases:
    """The exponent in alpha of the distance between the flow and a closed form at tau = 1.5."""
    for delta_w in DELTA_W:
        problem, c = runs.problem(delta_w), runs.gains(delta_w)
        u, _, vt = np.linalg.svd(problem.shift)
        pair = np.asarray(problem.w2).T @ u[:, 0] / c.s2, vt[0]
        for side in SIDES:
            history: Any = linear(delta_w, side, seeds).history
            z = np.asarray(history[0].stacked)  # (alpha, seed, time, h + n, r)
            distance = [[np.linalg.norm(run[-1] - formula(run[0], *pair, TAU[-1])) for run in row] for row in z]
            errors = xr.DataArray(distance, dims=("alpha", "seed"), coords={"alpha": list(ALPHAS)})
            yield case_name(delta_w, side), 3, slope(errors, errors["alpha"])


@claim(f"{PAPER}, Claim 3.1", LINEAR, within=0.05)
def closed_form(seeds: int) -> Cases:
    """Z_1 is the closed form, constant term included, up to O(alpha^3): exponent"""
    yield from _orders(theory.linearised_flow, seeds)


@claim(f"{PAPER}, (10) as printed", LINEAR, within=0.05)
def closed_form_as_printed(seeds: int) -> Cases:
    """the same as printed in (10), without the constant term: exponent"""
    yield from _orders(theory.linearised_flow_as_printed, seeds)


def _rate(dataset: xr.Dataset, variable: str, tau: float = 6.0) -> xr.DataArray:
    """The mean growth rate of log variable^2 up to tau, at the smallest alpha."""
    values = 2 * log(dataset[variable].isel(alpha=-1))
    return (values.sel(time=tau, method="nearest") - values.isel(time=0)) / tau


@claim(f"{PAPER}, Claim 3.1", TINY, within=1e-3)
def growth(seeds: int) -> Cases:
    """d/dt log ||gamma_1^T Z_1||^2 = 2 sigma sigma_W2, in units of sigma sigma_W2"""
    for where, c, part in each_setting(runs.tiny(seeds)):
        yield where, theory.growth_rate(c) / c.rate, _rate(part, "norm_along1")


@claim(f"{PAPER}, Claim 3.1", TINY, within=1e-3)
def selection(seeds: int) -> Cases:
    """layer 1 outgrows layer 2 at the rate 2 sigma (sigma_W2 - sigma_W1), same units"""
    for where, c, part in each_setting(runs.tiny(seeds)):
        yield where, theory.selection_rate(c) / c.rate, _rate(part, "norm_along1") - _rate(part, "norm_along2")


@claim(f"{PAPER}, Lemma C.1 as printed", "gaussian, alpha = 1e-3, at t = 0", ">=")
def selection_from_zero_as_printed(seeds: int) -> Cases:
    """||Z_1||_F^2 / ||Z_2||_F^2 grows at a rate of order 1 - delta_w from t = 0 on"""
    for delta_w in DELTA_W:
        problem, c = runs.problem(delta_w), runs.gains(delta_w)
        for side in SIDES:
            start = gaussian_init(jax.random.key(0), problem, rank=4, alpha=1e-3, side=side)
            pairs = zip(start, problem.field(start), strict=True)
            first, second = (_growth(*(np.asarray(x.stacked) for x in pair)) for pair in pairs)
            yield case_name(delta_w, side), 1 - c.d, (first - second) / c.rate


def _growth(z: np.ndarray, speed: np.ndarray) -> float:
    """d/dt log ||Z||_F^2."""
    return float(2 * np.sum(z * speed) / np.sum(z**2))

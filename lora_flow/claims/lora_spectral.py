"""Initialisation from the spectrum: Theorem 4.1, incremental learning, and Theorem G.1; delta_w > 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_flow.adapter import Adapter, Adapters
from lora_flow.claims.frame import (
    PAPER,
    Case,
    Line,
    between,
    by_construction,
    case_name,
    claim,
    near,
    of_all,
)
from lora_flow.claims.lora_runs import DELTA_W, Evidence
from lora_flow.dynamics.solve import solve
from lora_flow.initialization import gaussian_init
from lora_flow.problems.base import Factorization
from lora_flow.problems.rounding import resolved
from lora_flow.recipes.targets import aligned_problem
from lora_flow.results.phases import phases
from lora_flow.sweeps.sweep import sweep
from lora_flow.theory import gradient_flow as theory

_SPECTRAL_RUNS = "spectral, alpha = 1e-4, to tau = 40, rtol = 1e-10"


@claim
def spectral_diagonal(ev: Evidence) -> Line:
    cases = [of_all(case_name(d), 0.0, modes.off_diagonal, modes.off_diagonal < 1e-12) for d, modes in ev.modes.items()]
    statement = "spectral: the factors stay diagonal (inner products of different modes, relative)"
    return Line(f"{PAPER}, section 4", statement, _SPECTRAL_RUNS, tuple(cases))


@claim
@by_construction
def spectral_scalars(ev: Evidence) -> Line:
    cases = []
    for delta_w, modes in ev.modes.items():
        c = ev.gains(delta_w)
        predicted = np.stack([theory.mode_field(c, run) for run in np.moveaxis(modes.state, 1, 0)], axis=1) / c.rate
        scale = np.abs(modes.speed).max(axis=(0, 2), keepdims=True)
        error = float(np.max(np.abs(predicted - modes.speed) / scale))
        cases.append(of_all(case_name(delta_w), 0.0, error, error < 1e-9))
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
        cases.append(of_all(case_name(delta_w), least, measured, measured >= least))
    return tuple(cases)


@claim
def mode_growth(ev: Evidence) -> Line:
    statement = "spectral: log z1 grows at least at (3 + delta_w)/2, from artanh((3 + delta_w)/4)/2 on until T1"
    return Line(f"{PAPER}, Theorem 4.1, F.1", statement, _SPECTRAL_RUNS, _growth_cases(ev, _level_times), ">=")


@claim
def mode_growth_from_zero_as_printed(ev: Evidence) -> Line:
    cases = _growth_cases(ev, _level_times, start=lambda c: 0.0)
    return Line(f"{PAPER}, Theorem 4.1 as printed", "the same from t = 0", _SPECTRAL_RUNS, cases, ">=")


@claim
def mode_growth_until_formula_as_printed(ev: Evidence) -> Line:
    cases = _growth_cases(ev, _formula_times(theory.mode_t1))
    statement = "the same until T1 = 2 log(X) / ((3 + delta_w) sigma sigma_W2), X = (1 - delta_w) sigma/(8 s2 z1(0))"
    return Line(f"{PAPER}, Theorem F.1 as printed", statement, _SPECTRAL_RUNS, cases, ">=")


@claim
def mode_growth_until_main_text_as_printed(ev: Evidence) -> Line:
    cases = _growth_cases(ev, _formula_times(theory.mode_t1_main_text))
    return Line(f"{PAPER}, section 4 as printed", "the same with X = sigma/(16 z1(0))", _SPECTRAL_RUNS, cases, ">=")


@claim
def mode_selection(ev: Evidence) -> Line:
    cases = _growth_cases(ev, _level_times, selection=True)
    statement = "spectral: log (z1/z2) grows at least at 3 (1 - delta_w)/2, in the same window"
    return Line(f"{PAPER}, Theorem 4.1", statement, _SPECTRAL_RUNS, cases, ">=")


@claim
def mode_t1_bound(ev: Evidence) -> Line:
    cases = []
    for delta_w in ev.modes:
        latest = float(np.max(_level_times(ev, delta_w) / _formula_times(theory.mode_t1)(ev, delta_w)))
        cases.append(of_all(case_name(delta_w), 1.0, latest, latest <= 1.0))
    statement = "spectral: z1 or z2 comes to (1 - delta_w) sigma/(8 sigma_W2) by that formula's T1 (ratio)"
    return Line(f"{PAPER}, Theorem F.1", statement, _SPECTRAL_RUNS, tuple(cases), "<=")


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
        cases.append(of_all(case_name(delta_w), least, slowest, slowest >= least))
    statement = "spectral: after T1 the loss falls at least at (1 - delta_w)/8, down to rounding"
    return Line(f"{PAPER}, Theorem 4.1", statement, _SPECTRAL_RUNS, tuple(cases), ">=")


@claim
def spectral_floor(ev: Evidence) -> Line:
    cases = []
    for delta_w, modes in ev.modes.items():
        last = resolved(float(modes.loss[:, -1].max() / modes.loss[0, 0]))
        cases.append(of_all(case_name(delta_w), 0.0, last, last == 0))
    statement = "spectral: any precision is reached (L / L(0) at tau = 40, 0 at rounding)"
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


def _loss_from_pretrained(x: float) -> float:
    """Loss at t = 20 from A_i = a_i e1^T and B_i = 0, with Yft = diag(100, 1 + x)."""
    weights = np.diag([10.0, 1.0])
    shift = np.diag([100.0, 1 + x]) - weights @ weights
    if not shift.any():
        return 0.5 * float(np.sum(shift**2))  # there is nothing to learn, and no flow
    problem = Factorization(weights, weights, shift)
    e1 = np.array([[1.0, 0.0]])
    start = _without_b(problem, 0.1 * e1, 0.2 * e1)
    return float(solve(problem, start, t1=20.0, saves=2).observables["loss"][-1])


@claim
def stuck(ev: Evidence) -> Line:
    cases = []
    for x in (1.0, np.sqrt(2), 3.0):
        last = _loss_from_pretrained(x)
        cases.append(of_all(f"x = {x:.3g}", x**2 / 2, last, abs(last - x**2 / 2) < 1e-12))
    statement = "from the pretrained weights alone, W1 = W2 = diag(10, 1), Yft = diag(100, 1 + x): L stays at x^2/2"
    return Line(f"{PAPER}, Theorem G.1", statement, "A_i = a_i e1^T, B_i = 0, r = 1, t = 20", tuple(cases))


@claim
def stuck_as_printed(ev: Evidence) -> Line:
    last = _loss_from_pretrained(0.0)
    cases = (of_all("Yft = diag(100, 1)", 1.0, last, abs(last - 1.0) < 1e-12),)
    statement = "the same with Yft = diag(100, 1), which is Ypre: L stays at 1"
    return Line(f"{PAPER}, Theorem G.1 as printed", statement, "none needed: there is nothing to learn", cases)


@claim
@by_construction
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
    problems = {ratio: aligned_problem(jax.random.key(0), delta_w=ratio) for ratio in (4.0, 100.0)}
    swept = sweep(problems, alpha=1e-5, seeds=ev.seeds, t1=0.8, saves=401, progress=False)
    t1, chosen = phases(swept)["t1"], (swept["norm_b2a2"] > swept["norm_b1a1"]).isel(time=-1)
    cases = []
    for ratio, problem in problems.items():
        c = theory.gains(problem)
        exchanged = theory.Gains(c.sigma, c.s2, c.s1)
        wins = bool(chosen.sel(problem=ratio).all())
        where = f"{case_name(ratio)}, layer 2 {'wins' if wins else 'does not win'}"
        case = between(where, 1.0, t1.sel(problem=ratio) / theory.t1_slides(exchanged, 1e-5), 0.6, 1.1)
        cases.append(case if wins else dataclasses.replace(case, holds=False, decided=True))
    statement = "delta_w > 1: layer 2 is selected, at T1 = log(1/alpha) / (sigma sigma_W1)"
    return Line("symmetry", statement, "gaussian, side A, alpha = 1e-5", tuple(cases))


def _without_b(problem: Factorization, *factors: np.ndarray) -> Adapters:
    """Adapters with these A_i and B_i = 0."""
    shapes = zip(factors, problem.layers, strict=True)
    return tuple(Adapter(jnp.asarray(a), jnp.zeros((n_out, len(a)))) for a, (n_out, _) in shapes)

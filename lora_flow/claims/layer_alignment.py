"""What one layer aligns with, when and how far: LoRA-One's Theorems 3.1 and 3.2, and its toy experiment."""

from __future__ import annotations

import numpy as np

from lora_flow.claims.frame import Line, claim, near, of_all
from lora_flow.claims.layer_regression_runs import TOY_ALPHAS2
from lora_flow.claims.layer_runs import SINGULAR_VALUES, SMALL_ALPHAS
from lora_flow.claims.lora_runs import Evidence
from lora_flow.claims.runs import Run, spaces
from lora_flow.theory import lora_one as theory

PAPER = "LoRA-One"
_TOY_RUNS = "one layer, d = 100, N = 1600, r = 8, r* = 4, kappa = 1: 1500 steps of gradient descent, eta = 1/64"
_WHITE_RUNS = "one layer, white inputs, d = 60, r = 8, singular values 1, .8, .6, .5, alpha = 1e-6, 1e-9, 1e-12"
_SMALL = 1e-2  # alpha e^(lam_1 t) up to which A and B are small
_THETAS = (0.1, 0.01, 0.001)


@claim
def gradient_column_space(ev: Evidence) -> Line:
    toy = ev.regressions.toy
    columns = theory.top_rows(np.swapaxes(toy.shift @ toy.covariance, -1, -2), 4)
    cases = []
    for alpha2, b in zip(TOY_ALPHAS2, toy.run.b, strict=True):
        later = theory.top_rows(np.swapaxes(b[:, 1:], -1, -2), 4)
        worst = float(np.max(theory.sine(later, columns[:, None])))
        cases.append(of_all(f"alpha^2 = {alpha2:g}", 0.0, worst, worst < 1e-12))
    statement = "B's top r* left singular vectors stay in the gradient's column space: sine of the angle, all t >= 1"
    return Line(f"{PAPER}, Theorem 3.1", statement, _TOY_RUNS, tuple(cases))


def _small(alpha: float, run: Run) -> np.ndarray:
    """The times after 0 up to which A and B are small."""
    return np.flatnonzero((run.times > 0) & (alpha * np.exp(SINGULAR_VALUES[0] * run.times) <= _SMALL))


def _closed_form(run: Run, shift: np.ndarray, at: np.ndarray) -> Run:
    pairs = [theory.linear_phase(shift, a[0], run.times[at]) for a in run.a]
    return Run(run.times[at], np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]))


@claim
def linear_phase(ev: Evidence) -> Line:
    one, cases = ev.one_layer, []
    for alpha, run in one.aligning.items():
        at = _small(alpha, run)
        formula = _closed_form(run, one.shift, at)
        errors = [
            np.linalg.norm(x[:, at] - y, axis=(-2, -1)) / np.linalg.norm(y, axis=(-2, -1))
            for x, y in zip(run[1:], formula[1:], strict=True)
        ]
        cases.append(of_all(f"alpha = {alpha:g}", 0.0, np.max(errors), np.max(errors) < 1e-3))
    statement = "A(t) = A(0) + A(0) V (cosh(S t) - I) V^T, B(t) = U sinh(S t) V^T A(0)^T: error, alpha e^(s1 t) <= .01"
    return Line("derived here", statement, _WHITE_RUNS, tuple(cases))


@claim
def linear_phase_angles(ev: Evidence) -> Line:
    one, cases = ev.one_layer, []
    for alpha, run in one.aligning.items():
        at = _small(alpha, run)
        rows = theory.top_rows(_closed_form(run, one.shift, at).a, 4)
        expected = theory.sine(rows, theory.top_rows(one.shift, 4))
        worst = np.max(np.abs(one.angles[alpha][:, at] / expected - 1))
        cases.append(of_all(f"alpha = {alpha:g}", 0.0, worst, worst < 1e-3))
    statement = "the largest principal angle between A's and the gradient's row spaces is that form's: relative error"
    return Line("derived here", statement, _WHITE_RUNS, tuple(cases))


def _alignment_times(ev: Evidence) -> dict[float, np.ndarray]:
    """When the sine first is theta, over (theta, seed), by alpha."""
    one, levels = ev.one_layer, -np.log(_THETAS)
    return {
        alpha: np.array([np.interp(levels, -np.log(row), run.times) for row in one.angles[alpha]]).T
        for alpha, run in one.aligning.items()
    }


@claim
def alignment_time(ev: Evidence) -> Line:
    one, cases = ev.one_layer, []
    misaligned = np.array([theory.misalignment(one.shift, np.asarray(start.a), 4) for start in one.gaussian(1.0)])
    for alpha, measured in _alignment_times(ev).items():
        for theta, times in zip(_THETAS, measured, strict=True):
            ratio = times / theory.alignment_time(misaligned, SINGULAR_VALUES[3], theta)
            cases.append(near(f"theta = {theta:g}, alpha = {alpha:g}", 1.0, ratio, 0.02))
    statement = "the angle is theta at T* = ln(c sqrt(d)/theta)/lam_r*, c from A(0): measured over predicted, within 2%"
    return Line("derived here", statement, _WHITE_RUNS, tuple(cases))


@claim
def alignment_time_without_alpha(ev: Evidence) -> Line:
    times, cases = _alignment_times(ev), []
    for alpha in SMALL_ALPHAS[:-1]:
        change = np.max(np.abs(times[alpha] / times[SMALL_ALPHAS[-1]] - 1))
        cases.append(of_all(f"alpha = {alpha:g}", 0.0, change, change < 1e-4))
    statement = "T* does not depend on alpha: relative change from its value at alpha = 1e-12, theta = .1 to .001"
    return Line("derived here", statement, _WHITE_RUNS, tuple(cases))


def _toy_angles(ev: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """A's top rows against the gradient's, `(alpha^2, seed, time)`, and the shift's against the gradient's."""
    toy = ev.regressions.toy
    rows = theory.top_rows(toy.shift @ toy.covariance, 4)
    return theory.sine(theory.top_rows(toy.run.a, 4), rows[:, None]), theory.sine(theory.top_rows(toy.shift, 4), rows)


@claim
def sampling_plateau(ev: Evidence) -> Line:
    measured, plateau = _toy_angles(ev)
    cases = []
    for alpha2, angles in zip(TOY_ALPHAS2, measured, strict=True):
        cases.append(near(f"alpha^2 = {alpha2:g}", 1.0, angles[:, -1] / plateau, 0.02))
    statement = (
        "in the end A's angle to G = shift X^T X/N is the shift's own, by sampling: sine between row spaces over the "
        "shift's, within 2%"
    )
    return Line("derived here", statement, _TOY_RUNS, tuple(cases))


@claim
def sampling_angle(ev: Evidence) -> Line:
    d, cases = 60, []
    for samples in (240, 960, 3840, 15360):
        sines = []
        for seed in range(ev.seeds):
            rng = np.random.default_rng(seed)
            _, v = spaces(rng, d, d, 4)
            x = rng.normal(size=(samples, d))
            sines.append(theory.sine(v.T, theory.top_rows((x @ v).T @ x, 4)))
        level = float(theory.sampling_angle(d, samples))
        cases.append(near(f"N = {samples}", level, sines, 0.2 * level))
    statement = "the shift's angle to shift X^T X/N is about sqrt(d/N): within 20%"
    return Line("derived here", statement, "d = 60, r* = 4, N = 240 to 15360", tuple(cases))


@claim
def published_toy(ev: Evidence) -> Line:
    measured, _ = _toy_angles(ev)
    least, last = measured.min(axis=-1), measured[..., -1]
    cases = (
        near("alpha^2 = 1e-3, lowest", 0.2, least[0], 0.05),
        near("alpha^2 = 1e-4, lowest", 0.16, least[1], 0.05),
        near("alpha^2 = 1e-3, last", 0.265, last[0], 0.05),
        near("alpha^2 = 1e-4, last", 0.265, last[1], 0.05),
    )
    statement = "the toy experiment's angle of A falls to .2 and .16, then rises to .265: within .05"
    return Line(f"{PAPER}, toy experiments", statement, _TOY_RUNS, cases)

"""Other flows than the gradient's: preconditioned ones and their rates, what is conserved, how W moves; ReLU layers."""

from __future__ import annotations

import equinox as eqx
import jax
import numpy as np
from scipy.integrate import cumulative_simpson

from lora_flow.adapter import Adapter
from lora_flow.claims.frame import Case, Line, by_construction, claim, near, of_all
from lora_flow.claims.layer_alignment import PAPER
from lora_flow.claims.layer_regression_runs import RELU_ETA, RELU_KAPPAS, RELU_SHIFT
from lora_flow.claims.layer_runs import KAPPAS, SAVES
from lora_flow.claims.lora_runs import Evidence
from lora_flow.claims.runs import adapter
from lora_flow.dynamics.flows import Flow, LoRAPro, ScaledGD
from lora_flow.theory import lora_one as theory

_NEAR_RUNS = "one layer, white inputs, d = 60, r = r* = 4, kappa = 1 to 1000, from near the solution"
_FAR_RUNS = "one layer, white inputs, d = 60, r = r* = 4, kappa = 1 to 1000, A's rows mixed by I + .3 N(0, 1)"
_DRIVEN_RUNS = "one layer, white inputs, d = 60, r = 8, alpha = .1, B = 0, to t = 12"
_SCALED_RUNS = "one layer, white inputs, d = 60, r = r* = 4, random factors, to t = 4"
_RELU_RUNS = "ReLU layer, d = 6, r = r* = 2, N = 24000, kappa = 1, 10, 100, eta = 1/2, 24 steps, a small shift"


def _decay(sizes: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The mean rate of decay of every seed, from sizes over (seed, time)."""
    return np.log(sizes[:, 0] / sizes[:, -1]) / (times[-1] - times[0])


@claim
def scaled_rate(ev: Evidence) -> Line:
    cases, times = [], np.linspace(0.0, 4.0, SAVES)
    for kappa, residual in ev.one_layer.scaled_far.items():
        rates = _decay(np.linalg.norm(residual, axis=(-2, -1)), times)
        rate = theory.preconditioned_rate(sides=2)
        cases.append(near(f"kappa = {kappa:g}", rate, rates, 0.02 * rate))
    statement = "ScaledGD, E in the factors' spaces on both sides: ||E|| decays at 2 for any kappa, within 2%"
    return Line("derived here", statement, _FAR_RUNS, tuple(cases))


@claim
def scaled_rate_one_sided(ev: Evidence) -> Line:
    cases, times = [], np.linspace(0.0, 4.0, SAVES)
    for kappa, residual in ev.one_layer.scaled_one_sided.items():
        rates = _decay(np.linalg.norm(residual, axis=(-2, -1)), times)
        rate = theory.preconditioned_rate(sides=1)
        cases.append(near(f"kappa = {kappa:g}", rate, rates, 0.02 * rate))
    statement = "ScaledGD, E in B's column space only: ||E|| decays at 1 for any kappa, within 2%"
    return Line("derived here", statement, _NEAR_RUNS, tuple(cases))


@claim
def plain_rates(ev: Evidence) -> Line:
    cases, times = [], np.linspace(0.0, 12.0, SAVES)
    for kappa in KAPPAS:
        sigma = np.geomspace(1.0, 1 / kappa, 4)
        for i, j in ((0, 0), (0, 3), (3, 3)):
            rate = theory.plain_rate(sigma[i], sigma[j])
            inside = rate * times <= 4
            sizes = np.abs(ev.one_layer.plain_near[kappa][:, inside, i, j])
            rates = _decay(sizes, times[inside])
            cases.append(near(f"kappa = {kappa:g}, component ({i + 1}, {j + 1})", rate, rates, 0.02 * rate))
    statement = "gradient flow: component (i, j) of E decays at sigma_i + sigma_j, slowly with kappa; within 2%"
    return Line("derived here", statement, _NEAR_RUNS, tuple(cases))


@claim
@by_construction
def scaled_determinants(ev: Evidence) -> Line:
    run = ev.one_layer.scaled
    ratio = theory.scaled_invariant(run.a, run.b)
    worst = float(np.max(np.abs(ratio - ratio[:, :1])))
    statement = "ScaledGD conserves det(B^T B)/det(A A^T): change of its logarithm"
    return Line("derived here", statement, _SCALED_RUNS, (of_all("all seeds", 0.0, worst, worst < 1e-7),))


@claim
@by_construction
def lora_plus_conserves(ev: Evidence) -> Line:
    cases = []
    for ratio, run in ev.one_layer.lora_plus.items():
        kept = theory.imbalance(run.a, run.b, ratio)
        size = np.linalg.norm(theory.imbalance(run.a, run.b, -ratio), axis=(-2, -1))
        worst = float(np.max(np.linalg.norm(kept - kept[:, :1], axis=(-2, -1)) / size))
        cases.append(of_all(f"ratio = {ratio:g}", 0.0, worst, worst < 1e-8))
    statement = "LoRA+ conserves ratio A A^T - B^T B: change over ||ratio A A^T + B^T B||"
    return Line("derived here", statement, _DRIVEN_RUNS, tuple(cases))


@claim
@by_construction
def stable_lora(ev: Evidence) -> Line:
    cases = []
    for rate, run in ev.one_layer.shrinking.items():
        imbalance = theory.imbalance(run.a, run.b)
        change = imbalance[:, 1:] - imbalance[:, :1]
        expected = cumulative_simpson(theory.shrinking_imbalance(run.a, rate), x=run.times, axis=1)
        worst = float(np.max(np.linalg.norm(change - expected, axis=(-2, -1)) / np.linalg.norm(change, axis=(-2, -1))))
        cases.append(of_all(f"k = {rate:g}", 0.0, worst, worst < 1e-3))
    statement = "Stable-LoRA's A' = -dL/dA - k A: d/dt (A A^T - B^T B) = -2 k A A^T, integrated: relative error"
    return Line("derived here", statement, _DRIVEN_RUNS, tuple(cases))


def _movement_error(ev: Evidence, flow: Flow, formula: str) -> float:
    """The largest relative distance of B'A + B A' from its formula, along the preconditioned flow."""
    run = ev.one_layer.scaled
    a, b = (np.concatenate(x[:, ::40]) for x in (run.a, run.b))
    g = ev.one_layer.shift - b @ a
    descent = adapter(np.swapaxes(b, -1, -2) @ g, g @ np.swapaxes(a, -1, -2))
    velocity = _velocities(flow, descent, adapter(a, b))
    moved = np.asarray(velocity.b) @ a + b @ np.asarray(velocity.a)
    expected = getattr(theory, formula)(_projection(b), g, _projection(np.swapaxes(a, -1, -2)))
    return float(np.max(np.linalg.norm(moved - expected, axis=(-2, -1)) / np.linalg.norm(expected, axis=(-2, -1))))


@eqx.filter_jit
def _velocities(flow: Flow, descents: Adapter, adapters: Adapter) -> Adapter:
    return jax.vmap(flow.velocity)(descents, adapters)


def _projection(columns: np.ndarray) -> np.ndarray:
    q = np.linalg.qr(columns)[0]
    return q @ np.swapaxes(q, -1, -2)


@claim
@by_construction
def scaled_moves(ev: Evidence) -> Line:
    error = _movement_error(ev, ScaledGD(), "scaled_movement")
    statement = "ScaledGD moves W by P_B G + G P_A, G = -dL/dW: relative error"
    return Line("derived here", statement, _SCALED_RUNS, (of_all("all seeds", 0.0, error, error < 1e-10),))


@claim
@by_construction
def lora_pro_moves(ev: Evidence) -> Line:
    error = _movement_error(ev, LoRAPro(), "tangent_projection")
    statement = "LoRA-Pro moves W by P_B G + G P_A - P_B G P_A, G on the tangent space: relative error"
    return Line("derived here", statement, _SCALED_RUNS, (of_all("all seeds", 0.0, error, error < 1e-10),))


def _relu_gain(ev: Evidence, gain: float) -> tuple[Case, ...]:
    cases = []
    for kappa, shift, descent in zip(RELU_KAPPAS, ev.regressions.relu.shift, ev.regressions.relu.descent, strict=True):
        along = np.sum(descent * shift, axis=(-2, -1)) / np.sum(shift**2, axis=(-2, -1))
        cases.append(near(f"kappa = {kappa:g}", gain, along, 0.05))
    return tuple(cases)


@claim
def relu_gradient(ev: Evidence) -> Line:
    statement = "-dL/dW = (shift - B A)/2 + Xi: the coefficient at B A = 0, within .05"
    return Line(f"{PAPER}, section 4", statement, _RELU_RUNS, _relu_gain(ev, theory.RELU_GAIN))


@claim
def relu_convergence(ev: Evidence) -> Line:
    cases = []
    for kappa, distance in zip(RELU_KAPPAS, ev.regressions.relu.distance, strict=True):
        start = distance[:, 0] / (RELU_SHIFT / kappa)
        near_enough = start <= theory.RHO
        bound = theory.RHO * RELU_SHIFT / kappa * theory.relu_bound(RELU_ETA, np.arange(distance.shape[1]))
        where = f"kappa = {kappa:g}, starts at {start.min():.2g} to {start.max():.2g}"
        counted = (int(near_enough.sum()), start.size)
        worst = float(np.max((distance / bound)[near_enough if near_enough.any() else slice(None)]))
        cases.append(Case(where, 1.0, worst, None, worst <= 1.0 if near_enough.any() else None, counted=counted))
    statement = "||B A - shift||_F <= (1 - eta/4)^t rho lam_r* from starts within rho = 1/20: ratio, over the steps"
    return Line(f"{PAPER}, Theorem 4.2", statement, _RELU_RUNS, tuple(cases), "<=")


@claim
def relu_convergence_from_farther(ev: Evidence) -> Line:
    cases = []
    for kappa, distance in zip(RELU_KAPPAS, ev.regressions.relu.distance, strict=True):
        bound = distance[:, :1] * theory.relu_bound(RELU_ETA, np.arange(distance.shape[1]))
        worst = float(np.max((distance / bound)[:, 1:]))
        cases.append(of_all(f"kappa = {kappa:g}", 1.0, worst, worst <= 1.0))
    statement = "||B A - shift||_F <= (1 - eta/4)^t times what it was, from the start with gamma = 2 wherever that is"
    return Line("derived here, for Theorem 4.2", statement, _RELU_RUNS, tuple(cases), "<=")


@claim
def relu_rate(ev: Evidence) -> Line:
    cases = []
    for kappa, distance in zip(RELU_KAPPAS, ev.regressions.relu.distance, strict=True):
        factor = (distance[:, 20] / distance[:, 10]) ** 0.1
        cases.append(near(f"kappa = {kappa:g}", theory.relu_factor(RELU_ETA), factor, 0.02))
    statement = "in the end each step leaves 1 - eta/2 of it, whatever kappa is: within .02"
    return Line("derived here", statement, _RELU_RUNS, tuple(cases))

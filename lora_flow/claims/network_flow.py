"""Gradient flow of linear networks that are trained from scratch: the rates and the implicit bias of Min et al."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lora_flow.claims.frame import Case, Line, by_construction, claim, near, of_all
from lora_flow.claims.lora_runs import Evidence
from lora_flow.claims.network_runs import (
    BIASED,
    FLOOR,
    OBLONG,
    RANDOM_SHAPES,
    SHAPES,
    STARTS,
    TRAINED,
    WIDTHS,
    Flows,
)
from lora_flow.theory import linear_flow as theory

PAPER, LATER = "Min et al. 2021", "Min et al. 2022"
FAILURE = 0.05  # the probability that Theorem 2 may fail with
APART = 1e-2  # a distance from the solution of least norm that is not rounding
WIDE_ENOUGH = (1 - 0.5**0.5) ** -2  # h/(r + m) from which (1 - sqrt((r + m)/h))^2 >= 1/2
_RUNS = "gradient flow, n = m = 4 and n = 8, m = 4, X of rank 5, h = 40, starts even, uneven, near and balanced"
_BIAS_RUNS = "gradient flow, n = 8, m = 4, X of rank 5, h = 40, to L/L(0) < 1e-16"
_SCALAR_RUNS = "gradient flow, n = m = h = 1, four networks a seed, |W1|, |W2|, |X|, |Y| from .5 to 1.5"
_WIDTH_RUNS = "gradient flow, n = 8, m = 4, X of rank 5, entries N(0, h^(-2p)), h = 50 to 3200"
_TRAINED_RUNS = "gradient flow to the end, X = I, n = m = 4, h = 1000, weights of the given ratio"
_RANDOM = "300 random pairs of weights a shape, hidden units of sizes from .1 to 3, layers of sizes up to 10 apart"


def _each_flow(ev: Evidence) -> Iterator[tuple[str, Flows]]:
    for (shape, start), run in ev.networks.flows.items():
        if start in STARTS:
            yield f"{shape}, {start}", run


def _seen(run: Flows) -> np.ndarray:
    """Where the loss is more than rounding."""
    return run.loss > FLOOR * run.loss[:, :1]


@claim
@by_construction
def network_imbalance(ev: Evidence) -> Line:
    cases = []
    for where, run in _each_flow(ev):
        worst = np.max(run.drift)
        cases.append(of_all(where, 0.0, worst, worst < 1e-10))
    statement = "D = W1^T W1 - W2 W2^T stays: ||D(t) - D(0)||_F over ||W1(0)||_F^2 + ||W2(0)||_F^2, at rtol = 1e-10"
    return Line(f"{PAPER}, section 2", statement, _RUNS, tuple(cases))


def _decay(where: str, run: Flows, rate: np.ndarray) -> Case:
    """The least over seeds and times of how far log L fell, in units of how far it must."""
    must = -np.log(np.asarray(theory.loss_bound(rate[:, None], run.times[:, 1:], 1.0)))
    if np.max(must) < 1e-9:
        return Case(f"{where}: a rate of 0", 1.0, np.nan, None, None)
    fell = np.log(run.loss[:, :1] / run.loss)[:, 1:]
    least = np.min((fell / must)[_seen(run)[:, 1:]])
    return of_all(where, 1.0, least, least >= 1 - 1e-9)


@claim
def imbalance_decay(ev: Evidence) -> Line:
    cases = tuple(_decay(where, run, run.imbalance_rate) for where, run in _each_flow(ev))
    statement = (
        "L <= L(0) e^(-2 lambda_r(S) c t), c = [lambda_r(Lam)]+ + [lambda_m(-Lam)]+; Lam = U1^T U1 - V^T V: least fall "
        "of log L over that"
    )
    return Line(f"{PAPER}, Theorem 1", statement, _RUNS, cases, ">=")


@claim
def instantaneous_decay(ev: Evidence) -> Line:
    cases = []
    for where, run in _each_flow(ev):
        least = np.min((run.speed / run.instantaneous)[_seen(run)])
        cases.append(of_all(where, 1.0, least, least >= 1 - 1e-9))
    statement = "||grad L||^2/L >= 2 lambda_r(S) alpha(Lam; sigma_m(U1 V^T), sigma_r(U1 V^T)) at all t: least ratio"
    return Line(f"{LATER}, Proposition 1", statement, _RUNS, tuple(cases), ">=")


@claim
def global_decay(ev: Evidence) -> Line:
    cases = tuple(_decay(where, run, run.global_rate) for where, run in _each_flow(ev))
    statement = (
        "L <= L(0) e^(-rate t), that rate with the least that each sigma_k can get: least fall of log L over that"
    )
    return Line(f"{LATER}, Theorem 3", statement, _RUNS, cases, ">=")


@claim
def scalar_decay(ev: Evidence) -> Line:
    run = ev.networks.scalar
    s, u, v = run.s[:, None], run.u, run.v
    left = run.target[:, None] - s * u * v
    seen = left**2 > FLOOR * left[:, :1] ** 2
    speed = left**2 * (u**2 + v**2) / np.where(seen, left**2 / (2 * s), np.nan)
    rate = theory.scalar_rate(u[:, :1] ** 2 - v[:, :1] ** 2, u * v, s)
    worst = np.nanmax(np.abs(speed / rate - 1))
    statement = (
        "n = m = h = 1: -d/dt log L = ||grad L||^2/L is 2 X^2 sqrt(D(0)^2 + 4 W^2) itself: relative error, all t"
    )
    return Line(LATER, statement, _SCALAR_RUNS, (of_all("all seeds", 0.0, worst, worst < 1e-8),))


def _distances(ev: Evidence, start: str) -> np.ndarray:
    """||W1 W2 - X^+ Y||_F in the end, over seeds that have all come to a solution."""
    run = ev.networks.flows[OBLONG, start]
    return np.where(run.loss[:, -1] < FLOOR * run.loss[:, 0], run.distance[:, -1], np.nan)


@claim
def invariant_set(ev: Evidence) -> Line:
    worst = np.max(_distances(ev, BIASED[0]))
    case = of_all('start "invariant"', 0.0, worst, worst < 1e-8)
    statement = "from V U2^T = 0 and U1 U2^T = 0 the flow goes to X^+ Y: ||W1 W2 - X^+ Y||_F in the end, below 1e-8"
    return Line(f"{PAPER}, Proposition 1", statement, _BIAS_RUNS, (case,))


@claim
def invariant_set_halves(ev: Evidence) -> Line:
    cases = []
    for start in BIASED[1:]:
        least = np.min(_distances(ev, start))
        cases.append(of_all(start, APART, least, least >= APART))
    statement = (
        "from either of the two conditions alone it does not: the least ||W1 W2 - X^+ Y||_F in the end is above .01"
    )
    return Line("derived here", statement, _BIAS_RUNS, tuple(cases), ">=")


@claim
def width_distance(ev: Evidence) -> Line:
    cases = []
    for p, run in ev.networks.widths.items():
        slopes = np.polyfit(np.log(WIDTHS), np.log(run.distance), 1)[0]
        cases.append(near(f"p = {p:g}", 0.5 - 2 * p, slopes, 0.1))
    statement = "||W1 W2(inf) - X^+ Y||_2 falls with the width as h^(1/2 - 2p): fitted exponent, within .1"
    return Line(f"{PAPER}, Theorem 2 and section 5", statement, _WIDTH_RUNS, tuple(cases))


@claim
def width_distance_bound(ev: Evidence) -> Line:
    cases, (_, n, m, _) = [], SHAPES[OBLONG]
    for p, run in ev.networks.widths.items():
        ends = list(zip(run.s, run.y_norm, strict=True))
        for h, distances in zip(WIDTHS, run.distance, strict=True):
            worst = np.max(distances / [float(theory.width_bound(h, p, s, y, n, m, FAILURE)) for s, y in ends])
            cases.append(of_all(f"p = {p:g}, h = {h}", 1.0, worst, worst <= 1))
    statement = "||W1 W2(inf) - X^+ Y||_2 is within the bound, which may fail with probability .05: largest ratio"
    return Line(f"{PAPER}, Theorem 2", statement, _WIDTH_RUNS, tuple(cases), "<=")


@claim
def width_imbalance(ev: Evidence) -> Line:
    cases, (_, _, m, r) = [], SHAPES[OBLONG]
    for p, run in ev.networks.widths.items():
        for h, levels in zip(WIDTHS, run.imbalance, strict=True):
            least, wide = np.min(levels / theory.width_imbalance(h, p)), h >= WIDE_ENOUGH * (r + m)
            where = f"p = {p:g}, h = {h}" + ("" if wide else ": not wide enough")
            cases.append(Case(where, 1.0, float(least), None, bool(least > 1) if wide else None))
    statement = (
        "lambda_r(Lam) + lambda_m(-Lam) > h^(1-2p) at the start, h >= 11.7 (r + m), from where sigma_min([U1^T V^T])^2 "
        "is about half of that: least ratio"
    )
    return Line(f"{PAPER}, Lemma 1", statement, _WIDTH_RUNS, tuple(cases), ">=")


def _alpha_cases(ev: Evidence, kind: str) -> tuple[Case, ...]:
    cases = []
    for shape in RANDOM_SHAPES:
        drawn = ev.networks.spectra[shape]
        ratio = getattr(drawn, kind) / drawn.lowest
        where = "n = {}, m = {}, h = {}".format(*shape) + f", {np.mean(ratio > 1 + 1e-9):.0%} above"
        cases.append(of_all(where, 1.0, np.max(ratio), np.max(ratio) <= 1 + 1e-9))
    return tuple(cases)


@claim
def alpha_below_tau(ev: Evidence) -> Line:
    statement = "alpha(D; sigma_m(W), sigma_n(W)) <= lmin(tau), sigma_k(W) = 0 for k > min(n, m): largest ratio"
    return Line(f"{LATER}, Proposition 1", statement, _RANDOM, _alpha_cases(ev, "alpha"), "<=")


@claim
def alpha_below_tau_as_printed(ev: Evidence) -> Line:
    statement = (
        "the same with sigma_min(W) in both roots, as the tables of Xu et al. 2023 and 2025 have it: largest ratio"
    )
    return Line("Xu et al. 2023 and 2025", statement, _RANDOM, _alpha_cases(ev, "alpha_as_printed"), "<=")


def _trained(ev: Evidence, kind: str, within: float) -> tuple[Case, ...]:
    """The largest relative error of delta_w over seeds."""
    cases = []
    for start in (name for name in TRAINED if name.startswith(kind)):
        gains = ev.networks.trained[start]
        worst = float(np.max(np.abs(gains.measured / gains.predicted - 1)))
        cases.append(of_all(start, 0.0, worst, worst < within))
    return tuple(cases)


@claim
def trained_gains_spectral(ev: Evidence) -> Line:
    statement = (
        "what pretraining leaves: delta_w^2 = (s + d)/(s - d), s^2 = d^2 + 4 (sigma^2 + p), d and p of the start along "
        "a singular pair; from modes that do not meet: relative error"
    )
    return Line("derived here", statement, _TRAINED_RUNS, _trained(ev, "spectral", 1e-8))


@claim
def trained_gains_gaussian(ev: Evidence) -> Line:
    statement = "the same from wide Gaussian weights, whose modes hardly meet: within 1%"
    return Line("derived here", statement, _TRAINED_RUNS, _trained(ev, "gaussian", 0.01))

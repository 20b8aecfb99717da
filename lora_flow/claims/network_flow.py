"""Gradient flow of linear networks that are trained from scratch: the rates of Min et al."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lora_flow.claims import network_runs as runs
from lora_flow.claims.frame import Cases, Tried, claim
from lora_flow.claims.layer_runs import adapter
from lora_flow.claims.network_runs import FLOOR, STARTS, Flows
from lora_flow.dynamics.lanes import stack
from lora_flow.problems.network import LinearNetwork
from lora_flow.theory import linear_flow as theory

PAPER, LATER = "Min et al. 2021", "Min et al. 2022"
FLOW = "gradient flow, n = m = 4 and n = 8, m = 4, X of rank 5, h = 40, starts even, uneven, near and balanced"
SCALAR = "gradient flow, n = m = h = 1, four networks a seed, |W1|, |W2|, |X|, |Y| from .5 to 1.5"


def _each_flow(seeds: int) -> Iterator[tuple[str, Flows]]:
    for (shape, start), run in runs.flows(seeds).items():
        if start in STARTS:
            yield f"{shape}, {start}", run


def _seen(run: Flows) -> np.ndarray:
    """Where the loss is more than rounding."""
    return run.loss > FLOOR * run.loss[:, :1]


@claim(f"{PAPER}, section 2", FLOW, within=1e-10, identity=True)
def network_imbalance(seeds: int) -> Cases:
    """D = W1^T W1 - W2 W2^T stays: ||D(t) - D(0)||_F over ||W1(0)||_F^2 + ||W2(0)||_F^2, at rtol = 1e-10"""
    for where, run in _each_flow(seeds):
        yield where, 0, np.max(run.drift)


def _decays(rate_of: Callable[[Flows], np.ndarray], seeds: int) -> Cases:
    """The least over seeds and times of how far log L fell, in units of how far it must."""
    for where, run in _each_flow(seeds):
        must = -np.log(np.asarray(theory.loss_bound(rate_of(run)[:, None], run.times[:, 1:], 1.0)))
        if np.max(must) < 1e-9:
            yield Tried(f"{where}: a rate of 0", 1, np.nan, applies=False)
        else:
            fell = np.log(run.loss[:, :1] / run.loss)[:, 1:]
            yield where, 1, np.min((fell / must)[_seen(run)[:, 1:]])


@claim(f"{PAPER}, Theorem 1", FLOW, ">=", within=1e-9)
def imbalance_decay(seeds: int) -> Cases:
    """
    L <= L(0) e^(-2 lambda_r(S) c t), c = [lambda_r(Lam)]+ + [lambda_m(-Lam)]+; Lam = U1^T U1 - V^T V: least fall of log
    L over that
    """
    yield from _decays(lambda run: run.imbalance_rate, seeds)


@claim(f"{LATER}, Proposition 1", FLOW, ">=", within=1e-9)
def instantaneous_decay(seeds: int) -> Cases:
    """||grad L||^2/L >= 2 lambda_r(S) alpha(Lam; sigma_m(U1 V^T), sigma_r(U1 V^T)) at all t: least ratio"""
    for where, run in _each_flow(seeds):
        yield where, 1, np.min((run.speed / run.instantaneous)[_seen(run)])


@claim(f"{LATER}, Theorem 3", FLOW, ">=", within=1e-9)
def global_decay(seeds: int) -> Cases:
    """
    L <= L(0) e^(-rate t), that rate with the least that each sigma_k can get: least fall of log L over that
    """
    yield from _decays(lambda run: run.global_rate, seeds)


class Scalars(NamedTuple):
    """Gradient flow of networks with n = m = h = 1, over `(seed, time, network)`; X^2 and Y X without times."""

    s: np.ndarray
    target: np.ndarray
    u: np.ndarray
    v: np.ndarray


@functools.cache
def scalar(seeds: int) -> Scalars:
    """Four networks of one number each, side by side: everything is diagonal."""
    rng, eye, hidden = np.random.default_rng(0), np.eye(6, 4), np.eye(8, 4)
    x, y, u, v = rng.uniform(0.5, 1.5, (4, seeds, 4)) * rng.choice([-1, 1], (4, seeds, 4))
    problems = stack([LinearNetwork(eye * target, eye * root) for target, root in zip(y, x, strict=True)])
    start = adapter(hidden * u[:, None], (hidden * v[:, None]).mT)
    history: Any = runs.to_the_end(problems, (start,)).history
    a, b = (np.diagonal(np.asarray(factor), axis1=-2, axis2=-1) for factor in history[0])
    return Scalars(x**2, x * y, a, b)


@claim(LATER, SCALAR, within=1e-8)
def scalar_decay(seeds: int) -> Cases:
    """
    n = m = h = 1: -d/dt log L = ||grad L||^2/L is 2 X^2 sqrt(D(0)^2 + 4 W^2) itself: relative error, all t
    """
    run = scalar(seeds)
    s, u, v = run.s[:, None], run.u, run.v
    left = run.target[:, None] - s * u * v
    seen = left**2 > FLOOR * left[:, :1] ** 2
    speed = left**2 * (u**2 + v**2) / np.where(seen, left**2 / (2 * s), np.nan)
    rate = theory.scalar_rate(u[:, :1] ** 2 - v[:, :1] ** 2, u * v, s)
    yield "all seeds", 0, np.nanmax(np.abs(speed / rate - 1))

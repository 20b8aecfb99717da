"""Gradient descent on linear networks that are trained from scratch: rates and step sizes of Xu et al. 2023."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from lora_flow.claims import network_descent_runs as runs
from lora_flow.claims.frame import Cases, claim
from lora_flow.claims.network_descent_runs import (
    ADAPTIVE,
    EVERY_RULE,
    FIXED,
    NETWORKS,
    RULES,
    Steps,
    drift_share,
    fall_share,
    share,
    worst,
)
from lora_flow.claims.network_runs import SHAPES, STARTS
from lora_flow.runtime.compiling import compiled
from lora_flow.theory import linear_descent as theory

PAPER = "Xu et al. 2023"
PUBLISHED = {1: 0.505, 5: 0.555, 100: 0.600}  # alpha_0/beta_0 by sigma
FIXED_STEP = f"gradient descent by eta_max, c1 = 1/2, c2 = 3/2; {NETWORKS}"
ADAPTIVE_STEPS = f"gradient descent by adaptive steps, c1 = .9, c2 = 1.1; {NETWORKS}"


@claim(f"{PAPER}, section 3", EVERY_RULE, within=1e-12, identity=True)
def imbalance_of_descent(seeds: int) -> Cases:
    """
    a step changes D by eta^2 (W2 G^T G W2^T - W1^T G G^T W1) exactly: error over ||W1||_F^2 + ||W2||_F^2, all t
    """
    for shape in SHAPES:
        points = [runs.descents(seeds)[shape, start, rule].at for start in STARTS for rule in RULES]
        error, largest = (max(np.max(getattr(at, name)) for at in points) for name in ("change_error", "change"))
        yield f"{shape}, changes up to {largest:.1g}", 0, error


@claim(f"{PAPER}, Lemma 3.1", EVERY_RULE, "<=", within=1e-9)
def descent_rate(seeds: int) -> Cases:
    """L+ <= rho L wherever the lemma's condition holds: largest (1 - rho)/(1 - L+/L)"""

    def ratio(steps: Steps) -> np.ndarray:
        return np.where(steps.at.margin >= 0, fall_share(steps, steps.at.rho.at(steps.at.step)), np.nan)

    yield from worst(ratio, RULES, seeds)


def _f(steps: Steps) -> np.ndarray:
    """f(eta_t, t)."""
    bound = theory.rate_bound(steps.start, steps.at.loss, steps.rule.c1, steps.rule.c2)
    return np.asarray(bound.at(steps.at.step))


@claim(PAPER, f"{FIXED_STEP}; by adaptive steps, c1 = .9, c2 = 1.1", "<=", within=1e-9)
def descent_rate_bound(seeds: int) -> Cases:
    """rho(eta_t) <= f(eta_t, t) at every step: largest (1 - f)/(1 - rho)"""

    def ratio(steps: Steps) -> np.ndarray:
        return share(1 - _f(steps), 1 - np.asarray(steps.at.rho.at(steps.at.step)))

    yield from worst(ratio, (*FIXED, *ADAPTIVE), seeds)


# By eta_max


@claim(PAPER, FIXED_STEP, "<=", within=1e-9)
def largest_step_keeps_tau(seeds: int) -> Cases:
    """by eta_max, c1 alpha_0 <= lmin(tau) and lmax(tau) <= c2 beta_0 at all t: largest ratios"""
    below = lambda steps: steps.rule.c1 * steps.start.alpha / steps.at.lowest  # noqa: E731
    above = lambda steps: steps.at.highest / (steps.rule.c2 * steps.start.beta)  # noqa: E731
    yield from worst(below, FIXED, seeds, ", c1 alpha_0/lmin")
    yield from worst(above, FIXED, seeds, ", lmax/(c2 beta_0)")


@claim(PAPER, FIXED_STEP, "<=", within=1e-9)
def largest_step_rate(seeds: int) -> Cases:
    """by eta_max, L(t + 1) <= f(eta, t) L(t) at all t: largest (1 - f)/(1 - L+/L)"""
    yield from worst(lambda steps: fall_share(steps, _f(steps)), FIXED, seeds)


@claim(PAPER, FIXED_STEP, "<=", within=1e-9)
def largest_step_drift(seeds: int) -> Cases:
    """by eta_max, ||D(t) - D(0)||_F <= 2 c2 beta_0 K L_0 eta^2/(1 - f(eta, 0)) at all t: largest ratio"""

    def ratio(steps: Steps) -> np.ndarray:
        first, (c1, c2) = steps.at.step[:, :1], (steps.rule.c1, steps.rule.c2)
        return drift_share(steps, theory.imbalance_drift_bound(steps.start, first, c1, c2))

    yield from worst(ratio, FIXED, seeds)


# By adaptive steps


def _own_bound(steps: Steps) -> np.ndarray:
    """What the bound by which an adaptive rule chooses promises of its step."""
    at, start, rule = steps.at, steps.start, steps.rule
    bound: Any = {
        "rho": lambda: at.rho,
        "current": lambda: theory.rate_bound(at.constants, at.loss, 1.0, 1.0),
        "loss": lambda: theory.rate_bound(start, at.loss, rule.c1, rule.c2),
        "start": lambda: theory.rate_bound(start, start.loss, rule.c1, rule.c2),
    }[rule.rate]()
    return np.asarray(bound.at(at.step))


@claim(f"{PAPER}, adaptive steps", ADAPTIVE_STEPS, "<=", within=1e-9)
def adaptive_rates(seeds: int) -> Cases:
    """by each adaptive step the loss falls at least as its bound h(eta_t) says: largest (1 - h)/(1 - L+/L)"""
    yield from worst(lambda steps: fall_share(steps, _own_bound(steps)), ADAPTIVE, seeds)


# Published


@functools.cache
def published() -> dict[int, np.ndarray]:
    """alpha_0/beta_0 in experiment 4.2 by sigma, as the authors' code draws it: seeds 0 to 49."""
    side, h = 20, 1000
    draws = []
    for seed in range(50):
        rng = np.random.RandomState(seed)
        x = np.linalg.qr(rng.normal(size=(side, side)))[0]
        y = x @ rng.normal(0, side**-0.5, (side, side))
        draws.append((x, y, rng.normal(size=(side, h)), rng.normal(size=(h, side))))
    x, y, w1, w2 = map(np.stack, zip(*draws, strict=True))
    scale = {sigma: np.sqrt((sigma + np.sqrt(sigma**2 + 4)) / 2) for sigma in PUBLISHED}
    return {sigma: np.asarray(_conditions(x, y, rho * w1, w2 / rho)) for sigma, rho in scale.items()}


@compiled(quickly=True)
def _conditions(x: Array, y: Array, w1: Array, w2: Array) -> Array:
    """alpha_0/beta_0, over draws."""

    def one(*network: Array) -> Array:
        start = theory.constants(*network)
        return start.alpha / start.beta

    return jax.vmap(one)(x, y, w1, w2)


@claim(
    f"{PAPER}, Figure 2",
    "starts as the authors' code draws them: n = m = N = 20, h = 1000, X orthogonal",
    within=0.01,
)
def published_conditions(seeds: int) -> Cases:
    """alpha_0/beta_0 at the start of experiment 4.2, as Figure 2 titles it: mean over 50 seeds, within .01"""
    for sigma, told in PUBLISHED.items():
        yield f"sigma = {sigma}", told, published()[sigma]

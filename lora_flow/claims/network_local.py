"""Gradient descent on linear networks by what the loss is like nearby: rates and growing steps of Xu et al. 2025."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import Adapters
from lora_flow.claims.frame import Cases, claim
from lora_flow.claims.network_descent_runs import (
    EVERY_RULE,
    GROWING,
    NETWORKS,
    RULES,
    Steps,
    drift_share,
    seen,
    share,
    worst,
)
from lora_flow.claims.network_runs import OBLONG, begun, wide
from lora_flow.problems.network import LinearNetwork
from lora_flow.runtime.compiling import compiled
from lora_flow.theory import linear_local as theory
from lora_flow.theory import linear_networks as networks

PAPER = "Xu et al. 2025"
WIDTHS = (500, 1000, 2000, 4000, 8000, 16000)
POWERS = (0.275, 0.375, 0.475)
SOLUTIONS = (0.1, 1.0, 10.0)  # ||W*||_F
GROWING_STEPS = f"gradient descent by growing steps, c = 1/2, eta_0 = .9 of the largest; {NETWORKS}"


@claim(f"{PAPER}, Theorem 3.1", EVERY_RULE, "<=", within=1e-9)
def local_descent_lemma(seeds: int) -> Cases:
    """L - L+ is at least (eta - K_t eta^2/2) ||grad L||_F^2 at every step: largest ratio of that to L - L+"""

    def ratio(steps: Steps) -> np.ndarray:
        at = steps.at
        promised = (at.step - 0.5 * np.asarray(at.smooth.at(at.step)) * at.step**2) * at.gradient2
        return np.where(seen(steps), share(promised, at.loss - steps.after, at.loss), np.nan)

    yield from worst(ratio, RULES, seeds)


@claim(f"{PAPER}, Theorem 3.1", EVERY_RULE, "<=", within=1e-9)
def local_pl(seeds: int) -> Cases:
    """1/2 ||grad L||_F^2 >= mu_t L at every step: largest ratio of mu_t L to it"""
    yield from worst(lambda steps: steps.at.pl * steps.at.loss / (0.5 * steps.at.gradient2), RULES, seeds)


# By growing steps


@claim(f"{PAPER}, Theorem E.1", GROWING_STEPS, "<=", within=1e-9)
def growing_rate(seeds: int) -> Cases:
    """by growing steps, L(t) <= L_0 rhobar_0^t at all t: largest t log(1/rhobar_0)/log(L_0/L(t))"""

    def ratio(steps: Steps) -> np.ndarray:
        count = np.arange(1, steps.after.shape[1] + 1)[None]
        promised, kept = -np.log(np.asarray(steps.schedule.rhobar)) * count, np.log(steps.at.loss[:, :1] / steps.after)
        return np.where(seen(steps), share(promised, kept), np.nan)

    yield from worst(ratio, GROWING, seeds)


@claim(f"{PAPER}, Theorem E.1", GROWING_STEPS, "<=", within=1e-9)
def growing_drift(seeds: int) -> Cases:
    """
    by growing steps, ||D(t) - D(0)||_F <= 2 K eta_0^2 a2 e^(eta_0^c) L_0/(1 - Dbar) at all t: largest ratio
    """
    yield from worst(lambda steps: drift_share(steps, steps.schedule.imbalance_drift_bound()), GROWING, seeds)


# Wide networks


class Condition(NamedTuple):
    """a1/a2 and b2 of Theorem E.1 at the start, over `(width, run)`."""

    ratio: np.ndarray
    b2: np.ndarray


@functools.cache
def condition(size: float, p: float, seeds: int) -> Condition:
    """With W* brought to a Frobenius norm and entries N(0, h^{-2p}), at `WIDTHS`, X of rank 5."""
    problems, _ = begun(seeds)[OBLONG, "even"]
    each = np.array([_condition(problems, wide(h, p, seeds), jnp.asarray(size)) for h in WIDTHS])
    return Condition(*np.moveaxis(each, 1, 0).reshape(2, len(WIDTHS), -1))


@compiled(quickly=True)
def _condition(problems: LinearNetwork, starts: Adapters, size: Any) -> tuple[Array, Array]:
    """a1/a2 and b2, over `(repeat, seed)`."""

    def one(problem: LinearNetwork, start: Adapters) -> tuple[Array, Array]:
        x, _, w1, w2 = problem.network(start)
        optimum = size * problem.optimum / jnp.linalg.norm(problem.optimum)
        loss = networks.loss(x, x @ optimum, w1, w2)
        constants = theory.constants(networks.curvature(x), loss, optimum, w1, w2)
        return constants.a1 / constants.a2, constants.b2

    return jax.vmap(jax.vmap(one), (None, 0))(problems, starts)


@claim(
    f"{PAPER}, Theorem 3.3",
    "starts, n = 8, m = 4, X of rank 5, p = .275, .375, .475, ||W*||_F = .1, 1, 10",
    "<=",
)
def width_condition(seeds: int) -> Cases:
    """
    entries N(0, h^(-2p)): 1 - a1/a2 is O(h^(2p-1)), exponent fitted from h = 500 to 16000, with its interval; where
    b2 < h^(1-2p), as wide networks have it
    """
    for size in SOLUTIONS:
        for p in POWERS:
            ratio, b2 = condition(size, p, seeds)
            small = np.max(b2[0] / WIDTHS[0] ** (1 - 2 * p))
            where = f"||W*||_F = {size:g}, p = {p:g}, b2/h^(1-2p) = {small:.2g} at h = {WIDTHS[0]}"
            yield where, 2 * p - 1, np.polyfit(np.log(WIDTHS), np.log(1 - ratio), 1)[0], small < 1

"""Which solution gradient flow takes linear networks to: the implicit bias of Min et al., by the start and by width."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import Adapters
from lora_flow.claims import network_runs as runs
from lora_flow.claims.frame import DERIVED, Cases, claim
from lora_flow.claims.network_flow import PAPER
from lora_flow.claims.network_runs import BIASED, FLOOR, OBLONG, REPEATS, SHAPES
from lora_flow.problems.network import LinearNetwork
from lora_flow.runtime.compiling import compiled
from lora_flow.theory import linear_flow as theory
from lora_flow.theory import linear_networks as networks

WIDTHS, POWERS = (50, 100, 200, 400, 800, 1600, 3200), (0.5, 0.4)  # entries N(0, h^{-2p})
FAILURE = 0.05  # the probability that Theorem 2 may fail with
APART = 1e-2  # a distance from the solution of least norm that is not rounding
WIDE_ENOUGH = (1 - 0.5**0.5) ** -2  # h/(r + m) from which (1 - sqrt((r + m)/h))^2 >= 1/2
STARTS = "gradient flow, n = 8, m = 4, X of rank 5, h = 40, to L/L(0) < 1e-16"
WIDE = "gradient flow, n = 8, m = 4, X of rank 5, entries N(0, h^(-2p)), h = 50 to 3200"


def _distances(start: str, seeds: int) -> np.ndarray:
    """||W1 W2 - X^+ Y||_F in the end, over seeds; NaN for one that has not come to a solution."""
    run = runs.flows(seeds)[OBLONG, start]
    return np.where(run.loss[:, -1] < FLOOR * run.loss[:, 0], run.distance[:, -1], np.nan)


@claim(f"{PAPER}, Proposition 1", STARTS, within=1e-8)
def invariant_set(seeds: int) -> Cases:
    """from V U2^T = 0 and U1 U2^T = 0 the flow goes to X^+ Y: ||W1 W2 - X^+ Y||_F in the end, below 1e-8"""
    yield 'start "invariant"', 0, np.max(_distances(BIASED[0], seeds))


@claim(DERIVED, STARTS, ">=")
def invariant_set_halves(seeds: int) -> Cases:
    """from either of the two conditions alone it does not: the least ||W1 W2 - X^+ Y||_F in the end is above .01"""
    for start in BIASED[1:]:
        yield start, APART, np.min(_distances(start, seeds))


class Widths(NamedTuple):
    """Gradient flow from N(0, h^{-2p}), over `(width, run)`, and the problems' constants over runs."""

    distance: np.ndarray  # ||W1 W2(end) - X^+ Y||_2
    imbalance: np.ndarray  # lambda_r(Lam) + lambda_m(-Lam)
    s: np.ndarray
    y_norm: np.ndarray


@functools.cache
def widths(p: float, seeds: int) -> Widths:
    """At `WIDTHS`, with inputs that depend on each other."""
    problems, _ = runs.begun(seeds)[OBLONG, "even"]
    starts = [runs.wide(h, p, seeds) for h in WIDTHS]
    distances = [_limits(problems, one) for one in starts]
    levels = [np.ravel(_levels(problems, one)) for one in starts]
    x, solution = np.asarray(problems.features), np.asarray(problems.solution)
    s = np.linalg.svd(x, compute_uv=False)[:, : SHAPES[OBLONG].rank] ** 2
    y_norm = np.linalg.norm(x @ solution, axis=(-2, -1))
    return Widths(np.array(distances), np.array(levels), np.tile(s, (REPEATS, 1)), np.tile(y_norm, REPEATS))


def _limits(problems: LinearNetwork, starts: Adapters) -> np.ndarray:
    """||W1 W2(end) - X^+ Y||_2, over runs."""
    distances = []
    for repeat in range(REPEATS):
        ((a, b),) = runs.to_the_end(problems, jax.tree.map(lambda leaf, i=repeat: leaf[i], starts)).adapters
        distances.append(np.linalg.norm((b @ a).mT - problems.solution, 2, axis=(-2, -1)))
    return np.concatenate(distances)


@compiled(quickly=True)
def _levels(problems: LinearNetwork, starts: Adapters) -> Array:
    """lambda_r(Lam) + lambda_m(-Lam), over `(repeat, seed)`."""

    def one(problem: LinearNetwork, start: Adapters) -> Array:
        _, _, u1, v = problem.network(start)
        spectrum = networks.imbalance_spectrum(u1, v)
        return spectrum[u1.shape[0] - 1] - spectrum[-v.shape[1]]

    return jax.vmap(jax.vmap(one), (None, 0))(problems, starts)


@claim(f"{PAPER}, Theorem 2 and section 5", WIDE, within=0.1)
def width_distance(seeds: int) -> Cases:
    """||W1 W2(inf) - X^+ Y||_2 falls with the width as h^(1/2 - 2p): fitted exponent, within .1"""
    for p in POWERS:
        yield f"p = {p:g}", 0.5 - 2 * p, np.polyfit(np.log(WIDTHS), np.log(widths(p, seeds).distance), 1)[0]


@claim(f"{PAPER}, Theorem 2", WIDE, "<=")
def width_distance_bound(seeds: int) -> Cases:
    """||W1 W2(inf) - X^+ Y||_2 is within the bound, which may fail with probability .05: largest ratio"""
    _, n, m, _ = SHAPES[OBLONG]
    for p in POWERS:
        run = widths(p, seeds)
        ends = list(zip(run.s, run.y_norm, strict=True))
        for h, distances in zip(WIDTHS, run.distance, strict=True):
            bounds = [float(theory.width_bound(h, p, s, y, n, m, FAILURE)) for s, y in ends]
            yield f"p = {p:g}, h = {h}", 1, np.max(distances / bounds)


@claim(f"{PAPER}, Lemma 1", WIDE, ">=")
def width_imbalance(seeds: int) -> Cases:
    """
    lambda_r(Lam) + lambda_m(-Lam) > h^(1-2p) at the start, h >= 11.7 (r + m), from where sigma_min([U1^T V^T])^2 is
    about half of that: least ratio
    """
    _, _, m, r = SHAPES[OBLONG]
    for p in POWERS:
        for h, levels in zip(WIDTHS, widths(p, seeds).imbalance, strict=True):
            enough = h >= WIDE_ENOUGH * (r + m)
            where = f"p = {p:g}, h = {h}" + ("" if enough else ": not wide enough")
            yield where, 1, np.min(levels / theory.width_imbalance(h, p)), enough

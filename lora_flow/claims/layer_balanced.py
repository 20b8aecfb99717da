"""Balanced factors of one layer, BaLoRA: the projection, its flow in closed form, and what imbalance does to rates."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from lora_flow import oracles
from lora_flow.adapter import Adapter
from lora_flow.claims.frame import DERIVED, Cases, claim
from lora_flow.claims.layer_runs import Run, adapter, draws, norm, relative, spaces
from lora_flow.dynamics.descend import descend
from lora_flow.dynamics.flows import BaLoRA, Flow, Plain
from lora_flow.dynamics.lanes import solve_lanes, stack
from lora_flow.dynamics.spectral_flows import balance
from lora_flow.problems.one_layer import SingleLayer
from lora_flow.runtime.compiling import compiled
from lora_flow.theory import spectral_flows as theory

PAPER = "Castin et al. 2026"
M, N, RANK = 40, 30, 4
SIGMA = np.array([1.0, 0.5, 0.5, 0.2])
LEFT, RIGHT = spaces(np.random.default_rng(0), M, N, RANK)
SHIFT = (LEFT * SIGMA) @ RIGHT.T
STEPS = (0.02, 0.01, 0.005)
LAYER = f"one layer, {M} x {N}, singular values 1, .5, .5, .2"
UNBALANCED = f"{LAYER}, r = 4, A of size 1, B of .01"
NEAR = f"{LAYER}, r = 4, A A^T - B^T B = d I, 1e-6 from the solution"
IMBALANCES = (0.0, 1.0, 4.0)


def unbalanced(seeds: int) -> list[tuple[Adapter]]:
    """Random factors of two sizes."""
    sizes = 1 / np.sqrt(N), 0.01 / np.sqrt(M)
    return [
        (adapter(sizes[0] * rng.normal(size=(RANK, N)), sizes[1] * rng.normal(size=(M, RANK))),) for rng in draws(seeds)
    ]


@claim(f"{PAPER}, code", UNBALANCED, within=1e-12, identity=True)
def balora_projection(seeds: int) -> Cases:
    """BaLoRA's projection keeps B A and makes A A^T = B^T B: the larger relative error"""
    ((before),) = stack(unbalanced(seeds))
    ((a, b),) = balance((before,))
    kept = relative(np.asarray(b @ a), np.asarray(before.b @ before.a))
    yield "all draws", 0, max(kept, relative(np.asarray(b.mT @ b), np.asarray(a @ a.mT)))


@functools.cache
def flowing(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """B A along BaLoRA's flow, and in closed form, `(seed, time, m, n)`, to t = 20."""
    times, starts = np.linspace(0.0, 20.0, 21), unbalanced(seeds)
    how: Any = {"flow": BaLoRA(), "solver": "Dopri8", "rtol": 1e-10, "keep": (), "save_adapters": True}
    run = Run.of(solve_lanes(SingleLayer(SHIFT), stack(starts), times, **how), times)
    closed = [oracles.riccati(SHIFT, *balance(one)[0], times).product for one in starts]
    return run.change, np.stack([np.asarray(one) for one in closed])


@claim(DERIVED, f"{UNBALANCED}, to t = 20, rtol = 1e-10", within=1e-8)
def balora_closed_form(seeds: int) -> Cases:
    """BaLoRA's flow is the Riccati equation with lam = 0, from the projected start: largest error of B A"""
    balanced, closed = flowing(seeds)
    yield "all draws", 0, np.max(np.abs(balanced - closed))


@functools.cache
def off_the_flow(seeds: int) -> np.ndarray:
    """Distances of projected descent from the closed form at t = 4, `(step size, seed)`, from balanced starts."""
    starts = [balance(one) for one in unbalanced(seeds)]
    closed = np.stack([np.asarray(oracles.riccati(SHIFT, *one, 4.0).product) for (one,) in starts])
    found = []
    for size in STEPS:
        ((a, b),) = _descend(SingleLayer(SHIFT), stack(starts), round(4 / size), size)
        found.append(norm(np.asarray(b @ a) - closed))
    return np.array(found)


@compiled(quickly=True)
def _descend(problem: Any, starts: Any, steps: int, size: Any) -> Any:
    def one(start: Any) -> Any:
        how: Any = {"flow": BaLoRA(), "saves": [0, steps]}
        return descend(problem, start, steps=steps, step=jnp.asarray(size), **how).adapters

    return jax.vmap(one)(starts)


@claim(DERIVED, f"{UNBALANCED}, balanced at first, to t = 4, steps .02, .01, .005", within=0.1)
def balora_descent(seeds: int) -> Cases:
    """gradient descent projected after each step is off BaLoRA's flow by O(eta): fitted exponent"""
    yield "t = 4", 1, [np.polyfit(np.log(STEPS), row, 1)[0] for row in np.log(off_the_flow(seeds)).T]


# Rates against imbalance


@functools.cache
def decays(flow: str) -> np.ndarray:
    """The rates of the components (i, j) of E along the shift's singular vectors, for every imbalance.

    In the last column are those of what lies beyond these, of U^T E.
    """
    kinds: dict[str, Flow] = {"plain": Plain(), "balora": BaLoRA()}
    rng, starts = np.random.default_rng(1), []
    for imbalance in IMBALANCES:
        a, b = (np.sqrt(part) for part in theory.squared_sizes(SIGMA, imbalance))
        off = 1e-6 * rng.normal(size=(RANK, N)), 1e-6 * rng.normal(size=(M, RANK))
        starts.append((adapter(a[:, None] * RIGHT.T + off[0], LEFT * b + off[1]),))
    times = np.linspace(0.0, 0.5, 11)
    how: Any = {"flow": kinds[flow], "solver": "Dopri8", "rtol": 1e-10, "keep": (), "save_adapters": True}
    run = Run.of(solve_lanes(SingleLayer(SHIFT), stack(starts), times, **how), times)
    left = LEFT.T @ (SHIFT - run.change)
    beyond = np.linalg.norm(left - left @ RIGHT @ RIGHT.T, axis=-1, keepdims=True)
    sizes = np.concatenate([np.abs(left @ RIGHT), beyond], axis=-1)
    return np.log(sizes[:, 0] / sizes[:, -1]) / times[-1]


PAIRS = ((0, 0), (0, 3), (3, 0), (3, 3))


@claim(DERIVED, NEAR, within=0.01, relative=True)
def imbalanced_rates(seeds: int) -> Cases:
    """gradient flow: component (i, j) of E decays at b_i^2 + a_j^2, a^2 - b^2 = d and a b = sigma"""
    for imbalance, rates in zip(IMBALANCES, decays("plain"), strict=True):
        for i, j in PAIRS:
            predicted = theory.imbalanced_rate(SIGMA[i], SIGMA[j], imbalance)
            yield f"d = {imbalance:g}, component ({i + 1}, {j + 1})", predicted, rates[i, j]


@claim(DERIVED, NEAR, within=0.01, relative=True)
def one_sided_rates(seeds: int) -> Cases:
    """gradient flow: what lies beyond A's rows decays at b_i^2, sigma_i^2/d for a large d; under BaLoRA at sigma_i"""
    for imbalance, rates, balanced in zip(IMBALANCES, decays("plain"), decays("balora"), strict=True):
        for i in (0, 3):
            where = f"d = {imbalance:g}, sigma = {SIGMA[i]:g}"
            yield where, theory.one_sided_rate(SIGMA[i], imbalance), rates[i, -1]
            yield f"{where}, BaLoRA", SIGMA[i], balanced[i, -1]


@claim(DERIVED, NEAR, within=0.01, relative=True)
def balora_rates(seeds: int) -> Cases:
    """BaLoRA from the same starts: component (i, j) decays at sigma_i + sigma_j, whatever the imbalance was"""
    for imbalance, rates in zip(IMBALANCES, decays("balora"), strict=True):
        for i, j in PAIRS:
            yield f"d = {imbalance:g}, component ({i + 1}, {j + 1})", SIGMA[i] + SIGMA[j], rates[i, j]


@claim(f"{PAPER}, abstract; derived here", f"{LAYER}, r = 4, 200 random factorisations of the solution", ">=")
def balanced_conditioning(seeds: int) -> Cases:
    """no factors of the solution condition the loss better than balanced ones, at 2 sigma_1/sigma_r: least ratio"""
    least = theory.least_condition_number(SIGMA)
    rng, found = np.random.default_rng(2), []
    a, b = np.sqrt(SIGMA)[:, None] * RIGHT.T, LEFT * np.sqrt(SIGMA)
    for spread in np.geomspace(1e-3, 1.0, 200):
        mixing = np.eye(RANK) + spread * rng.normal(size=(RANK, RANK))
        found.append(theory.condition_number(np.linalg.solve(mixing, a), b @ mixing) / least)
    yield "random factors", 1, np.min(found)


@claim(DERIVED, f"{LAYER}, r = 4, eigenvalues of the Hessian", within=1e-8, relative=True)
def hessian_conditioning(seeds: int) -> Cases:
    """the loss's condition number at balanced factors of the solution: 2 sigma_1/sigma_r"""
    (start,) = balance((adapter(np.sqrt(SIGMA)[:, None] * RIGHT.T / 5, 5 * LEFT * np.sqrt(SIGMA)),))
    values = np.linalg.eigvalsh(np.asarray(_hessian(start)))
    alive = values[values > 1e-9]
    yield "balanced", theory.least_condition_number(SIGMA), alive[-1] / alive[0]


@jax.jit
def _hessian(one: Adapter) -> Any:
    flat, back = ravel_pytree(one)
    return jax.hessian(lambda x: SingleLayer(SHIFT).loss((back(x),)))(flat)

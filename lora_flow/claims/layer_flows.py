"""Other flows than the gradient's: preconditioned ones and their rates, what is conserved, how W moves; ReLU layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import cumulative_simpson

from lora_flow.adapter import Adapter, pad
from lora_flow.claims.frame import DERIVED, Cases, Tried, claim
from lora_flow.claims.layer_runs import (
    PAPER,
    RANK,
    SAVES,
    SHIFT,
    SIZE,
    Run,
    U,
    V,
    adapter,
    draws,
    driven,
    follow,
    norm,
    plain,
    relative,
    spaces,
)
from lora_flow.dynamics.descend import Descent, descend
from lora_flow.dynamics.flows import Flow, LoRAPro, ScaledGD
from lora_flow.dynamics.lanes import stack
from lora_flow.initialization import lora_one_theory_init
from lora_flow.problems.one_layer import Regression
from lora_flow.theory import lora_one as theory

KAPPAS = (1.0, 10.0, 100.0, 1000.0)
NEAR_BY, FAR_OFF = 1e-5, 0.3  # distances from the solution, relative to it
RELU_KAPPAS, ETA, RELU_SHIFT = (1.0, 10.0, 100.0), 0.5, 0.01
NEAR = "one layer, white inputs, d = 60, r = r* = 4, kappa = 1 to 1000, from near the solution"
FAR = "one layer, white inputs, d = 60, r = r* = 4, kappa = 1 to 1000, A's rows mixed by I + .3 N(0, 1)"
DRIVEN = "one layer, white inputs, d = 60, r = 8, alpha = .1, B = 0, to t = 12"
RANDOM = "one layer, white inputs, d = 60, r = r* = 4, random factors, to t = 4"
RELU = "ReLU layer, d = 6, r = r* = 2, N = 24000, kappa = 1, 10, 100, eta = 1/2, 24 steps, a small shift"


# Rates


def conditioned(kappa: float) -> tuple[np.ndarray, np.ndarray]:
    """The shift of rank 4 with singular values from 1 to 1/kappa, and the roots of these."""
    values = np.geomspace(1.0, 1 / kappa, 4)
    return (U * values) @ V.T, np.sqrt(values)


def mixed(kappa: float, distance: float, seeds: int) -> list[Adapter]:
    """The solution's balanced factors, the rows of A mixed."""
    _, root = conditioned(kappa)
    mixers = [np.eye(4) + distance * rng.normal(size=(4, 4)) for rng in draws(seeds)]
    return [adapter(mixer @ (root * V).T, U * root) for mixer in mixers]


def turned(kappa: float, distance: float, seeds: int) -> list[Adapter]:
    """The solution's balanced factors, the rows of A with a part across V."""
    _, root = conditioned(kappa)
    across = [np.linalg.qr(np.c_[V, rng.normal(size=V.shape)])[0][:, 4:] for rng in draws(seeds)]
    return [adapter(root[:, None] * (V + distance * w).T, U * root) for w in across]


def scaled_residuals(kappa: float, starts: list[Adapter]) -> tuple[np.ndarray, np.ndarray]:
    """Times, and E = shift - B A of the preconditioned flow, `(seed, time, 60, 60)`."""
    shift, _ = conditioned(kappa)
    run = follow(shift, starts, np.linspace(0.0, 4.0, SAVES), ScaledGD())
    return run.times, shift - run.change


def _decay(sizes: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The mean rate of decay of every seed, from sizes over (seed, time)."""
    return np.log(sizes[:, 0] / sizes[:, -1]) / (times[-1] - times[0])


@claim(DERIVED, FAR, within=0.02, relative=True)
def scaled_rate(seeds: int) -> Cases:
    """ScaledGD, E in the factors' spaces on both sides: ||E|| decays at 2 for any kappa, within 2%"""
    for kappa in KAPPAS:
        times, e = scaled_residuals(kappa, mixed(kappa, FAR_OFF, seeds))
        yield f"kappa = {kappa:g}", theory.preconditioned_rate(sides=2), _decay(norm(U.T @ e @ V), times)


@claim(DERIVED, NEAR, within=0.02, relative=True)
def scaled_rate_one_sided(seeds: int) -> Cases:
    """ScaledGD, E in B's column space only: ||E|| decays at 1 for any kappa, within 2%"""
    for kappa in KAPPAS:
        times, e = scaled_residuals(kappa, turned(kappa, NEAR_BY, seeds))
        yield f"kappa = {kappa:g}", theory.preconditioned_rate(sides=1), _decay(norm(e), times)


@claim(DERIVED, NEAR, within=0.02, relative=True)
def plain_rates(seeds: int) -> Cases:
    """gradient flow: component (i, j) of E decays at sigma_i + sigma_j, slowly with kappa; within 2%"""
    for kappa in KAPPAS:
        (shift, root), starts = conditioned(kappa), mixed(kappa, NEAR_BY, seeds)
        run = plain(shift, [pad((one,), RANK)[0] for one in starts], np.linspace(0.0, 12.0, SAVES))
        e, sigma = np.diag(root**2) - (U.T @ run.b) @ (run.a @ V), root**2
        for i, j in ((0, 0), (0, 3), (3, 3)):
            rate = theory.plain_rate(sigma[i], sigma[j])
            early = rate * run.times <= 4
            decays = _decay(np.abs(e[:, early, i, j]), run.times[early])
            yield f"kappa = {kappa:g}, component ({i + 1}, {j + 1})", rate, decays


# What is conserved


@functools.cache
def scaled(seeds: int) -> Run:
    """The preconditioned flow from random factors of rank 4."""
    starts = [adapter(rng.normal(size=(4, SIZE)), rng.normal(size=(SIZE, 4))) for rng in draws(seeds)]
    return follow(SHIFT, starts, np.linspace(0.0, 4.0, SAVES), ScaledGD())


@claim(DERIVED, RANDOM, within=1e-7, identity=True)
def scaled_determinants(seeds: int) -> Cases:
    """ScaledGD conserves det(B^T B)/det(A A^T): change of its logarithm"""
    ratio = theory.scaled_invariant(scaled(seeds).a, scaled(seeds).b)
    yield "all seeds", 0, np.max(np.abs(ratio - ratio[:, :1]))


@claim(DERIVED, DRIVEN, within=1e-8, identity=True)
def lora_plus_conserves(seeds: int) -> Cases:
    """LoRA+ conserves ratio A A^T - B^T B: change over ||ratio A A^T + B^T B||"""
    for ratio in (4.0, 16.0):
        run = driven(ratio, 0.0, seeds)
        kept, size = theory.imbalance(run.a, run.b, ratio), norm(theory.imbalance(run.a, run.b, -ratio))
        yield f"ratio = {ratio:g}", 0, np.max(norm(kept - kept[:, :1]) / size)


@claim(DERIVED, DRIVEN, within=1e-3, identity=True)
def stable_lora(seeds: int) -> Cases:
    """Stable-LoRA's A' = -dL/dA - k A: d/dt (A A^T - B^T B) = -2 k A A^T, integrated: relative error"""
    for rate in (0.1, 0.5):
        run = driven(1.0, rate, seeds)
        imbalance = theory.imbalance(run.a, run.b)
        change = imbalance[:, 1:] - imbalance[:, :1]
        expected = cumulative_simpson(theory.shrinking_imbalance(run.a, rate), x=run.times, axis=1)
        yield f"k = {rate:g}", 0, relative(expected, change)


# How W moves


def _movement_error(flow: Flow, formula: Callable[..., np.ndarray], seeds: int) -> float:
    """The largest relative distance of B'A + B A' from its formula, along the preconditioned flow."""
    run = scaled(seeds)
    a, b = (np.concatenate(x[:, ::40]) for x in (run.a, run.b))
    g = SHIFT - b @ a
    velocity = _velocities(flow, adapter(b.mT @ g, g @ a.mT), adapter(a, b))
    moved = np.asarray(velocity.b) @ a + b @ np.asarray(velocity.a)
    return relative(moved, formula(_projection(b), g, _projection(a.mT)))


@eqx.filter_jit
def _velocities(flow: Flow, descents: Adapter, adapters: Adapter) -> Adapter:
    return jax.vmap(flow.velocity)(descents, adapters)


def _projection(columns: np.ndarray) -> np.ndarray:
    q = np.linalg.qr(columns)[0]
    return q @ q.mT


@claim(DERIVED, RANDOM, within=1e-10, identity=True)
def scaled_moves(seeds: int) -> Cases:
    """ScaledGD moves W by P_B G + G P_A, G = -dL/dW: relative error"""
    yield "all seeds", 0, _movement_error(ScaledGD(), theory.scaled_movement, seeds)


@claim(DERIVED, RANDOM, within=1e-10, identity=True)
def lora_pro_moves(seeds: int) -> Cases:
    """LoRA-Pro moves W by P_B G + G P_A - P_B G P_A, G on the tangent space: relative error"""
    yield "all seeds", 0, _movement_error(LoRAPro(), theory.tangent_projection, seeds)


# ReLU layers


@functools.cache
def relu(seeds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Preconditioned descent from LoRA-One's start with gamma = 2, over (kappa, seed).

    The shift, of about 1% of the weight; -dL/dW where B A = 0; ||B A - shift||_F over 24 steps.
    """
    drawn = [
        (*spaces(rng, 6, 6, 2), rng.normal(size=(6, 6)) / np.sqrt(6), rng.normal(size=(24000, 6)))
        for rng in draws(seeds)
    ]

    def one(kappa: Any, draw: Any) -> tuple[Any, Any, Descent]:
        u, v, weight, inputs = draw
        shift = RELU_SHIFT * (u * jnp.stack([jnp.ones(()), 1 / kappa])[None]) @ v.T
        problem = Regression(inputs, shift, weight, "relu")
        start = lora_one_theory_init(jax.random.key(0), problem, rank=2, alpha=jnp.sqrt(2.0))
        how: Any = {"step": ETA, "flow": ScaledGD(), "save_adapters": True}
        return shift, problem.linearised_task()[0], descend(problem, start, steps=24, saves=25, **how)

    each = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
    shift, descent, descended = each(np.array(RELU_KAPPAS), stack(drawn))
    left = Run.of(descended, np.arange(25)).change - np.asarray(shift)[:, :, None]
    return np.asarray(shift), np.asarray(descent), norm(left)


@claim(f"{PAPER}, section 4", RELU, within=0.05)
def relu_gradient(seeds: int) -> Cases:
    """-dL/dW = (shift - B A)/2 + Xi: the coefficient at B A = 0, within .05"""
    for kappa, shift, descent, _ in zip(RELU_KAPPAS, *relu(seeds), strict=True):
        along = np.sum(descent * shift, axis=(-2, -1)) / np.sum(shift**2, axis=(-2, -1))
        yield f"kappa = {kappa:g}", theory.RELU_GAIN, along


@claim(f"{PAPER}, Theorem 4.2", RELU, "<=")
def relu_convergence(seeds: int) -> Cases:
    """||B A - shift||_F <= (1 - eta/4)^t rho lam_r* from starts within rho = 1/20: ratio, over the steps"""
    for kappa, distance in zip(RELU_KAPPAS, relu(seeds)[2], strict=True):
        start = distance[:, 0] / (RELU_SHIFT / kappa)
        near = start <= theory.RHO
        bound = theory.RHO * RELU_SHIFT / kappa * theory.relu_bound(ETA, np.arange(distance.shape[1]))
        where = f"kappa = {kappa:g}, starts at {start.min():.2g} to {start.max():.2g}"
        worst = np.max((distance / bound)[near if near.any() else slice(None)])
        yield Tried(where, 1, worst, applies=near.any(), counted=(int(near.sum()), near.size))


@claim("derived here, for Theorem 4.2", RELU, "<=")
def relu_convergence_from_farther(seeds: int) -> Cases:
    """||B A - shift||_F <= (1 - eta/4)^t times what it was, from the start with gamma = 2 wherever that is"""
    for kappa, distance in zip(RELU_KAPPAS, relu(seeds)[2], strict=True):
        bound = distance[:, :1] * theory.relu_bound(ETA, np.arange(distance.shape[1]))
        yield f"kappa = {kappa:g}", 1, np.max((distance / bound)[:, 1:])


@claim(DERIVED, RELU, within=0.02)
def relu_rate(seeds: int) -> Cases:
    """in the end each step leaves 1 - eta/2 of it, whatever kappa is: within .02"""
    for kappa, distance in zip(RELU_KAPPAS, relu(seeds)[2], strict=True):
        yield f"kappa = {kappa:g}", theory.relu_factor(ETA), (distance[:, 20] / distance[:, 10]) ** 0.1

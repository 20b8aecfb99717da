"""A problem of one layer, its flows and their trajectories: what the tests of flows share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings

from lora_flow import Adapter, Chain, LoRAPlus, LoRAPro, ScaledGD, ShrinkA, SingleLayer, solve

M, N, RANK, SAVES = 6, 5, 3, 61  # of every trajectory of one layer, so that a flow is compiled once
TIGHT = 1e-10
T1 = 3.0
NODES, WEIGHTS = np.polynomial.legendre.leggauss(SAVES - 2)
TIMES = np.concatenate([[0.0], T1 / 2 * (1 + NODES), [T1]])


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def adapter(seed, scale_a=1.0, scale_b=1.0):
    return Adapter(jnp.asarray(scale_a * random(seed, RANK, N)), jnp.asarray(scale_b * random(seed + 1, M, RANK)))


def conditioned(condition, seed=20):
    """(U, sigma, V^T) of an M x N matrix of rank RANK with singular values from 1 down to 1/condition."""
    u, v = (np.linalg.qr(random(seed + i, size, RANK))[0] for i, size in enumerate((M, N)))
    return u, np.geomspace(1.0, 1.0 / condition, RANK), v.T


def along(flow, problem, start, t1=T1, saves=SAVES, rtol=TIGHT):
    """One compiled program for each kind of flow: problem, start, tolerance and times are its arguments."""
    return solve(problem, (start,), t1=t1, saves=saves, flow=flow, rtol=rtol, solver="Tsit5", save_adapters=True)


PROBLEM = SingleLayer(random(1, M, N))
START = adapter(2, 0.8, 0.5)
PLAIN = LoRAPlus(1.0)  # the plain flow by the program of the other ratios
SHRINKING = Chain(LoRAPlus(2.0), ShrinkA(0.3))
DRIVEN = (PLAIN, LoRAPlus(4.0), ScaledGD(), LoRAPro(), SHRINKING)


@jax.jit
def driven(flow, descent, now):
    return flow.velocity(descent, now)


every = pytest.mark.parametrize("flow", DRIVEN, ids=str)
few = settings(deadline=None, max_examples=30)

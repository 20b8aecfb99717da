"""What the weights of linear networks say by themselves: of tau's least eigenvalue, and of what training leaves."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import Adapters
from lora_flow.claims import network_runs as runs
from lora_flow.claims.frame import DERIVED, Cases, claim
from lora_flow.claims.network_flow import LATER
from lora_flow.coordinates.narrow import narrow
from lora_flow.dynamics.lanes import stack
from lora_flow.initialization import initialize
from lora_flow.problems.network import LinearNetwork
from lora_flow.theory import linear_flow as theory
from lora_flow.theory import linear_networks as networks

SHAPES, DRAWS = ((4, 4, 10), (3, 5, 9), (6, 2, 7)), 300  # n, m, h
WIDTH, RATIOS = 1000, ("0.1", "1", "10")
RANDOM = "300 random pairs of weights a shape, hidden units of sizes from .1 to 3, layers of sizes up to 10 apart"
TRAINED = "gradient flow to the end, X = I, n = m = 4, h = 1000, weights of the given ratio"


# tau's least eigenvalue


class Spectra(NamedTuple):
    """Of random weights: the least eigenvalue of tau and its bounds."""

    lowest: Any
    alpha: Any
    alpha_as_printed: Any


@functools.cache
def spectra(n: int, m: int, h: int) -> Spectra:
    """Of random weights whose hidden units and whose layers differ in size, over draws."""

    def one(w1: Array, w2: Array) -> Spectra:
        spectrum = networks.imbalance_spectrum(w1, w2)
        s_m, s_n, least = networks.singular_values(w1 @ w2, m, n, min(n, m))
        return Spectra(
            networks.tau_smallest(w1, w2),
            networks.alpha(spectrum, s_m, s_n, n, m),
            networks.alpha_as_printed(spectrum, least, n, m),
        )

    return Spectra(*map(np.asarray, jax.jit(jax.vmap(one))(*_random_weights(n, m, h))))


def _random_weights(n: int, m: int, h: int) -> tuple[np.ndarray, np.ndarray]:
    """Hidden units of sizes from .1 to 3, one layer up to 10 times as large as the other, over draws."""
    rng = np.random.default_rng(0)
    w1, w2 = rng.normal(size=(DRAWS, n, h)), rng.normal(size=(DRAWS, h, m))
    layers, units = 10 ** rng.uniform(-0.5, 0.5, (DRAWS, 1, 1)), 10 ** rng.uniform(-1, 0.5, (2, DRAWS, h))
    return w1 * layers * units[0][:, None], w2 / layers * units[1][..., None]


def _alpha_over_lowest(kind: str) -> Cases:
    for shape in SHAPES:
        drawn = spectra(*shape)
        ratio = getattr(drawn, kind) / drawn.lowest
        where = "n = {}, m = {}, h = {}".format(*shape) + f", {np.mean(ratio > 1 + 1e-9):.0%} above"
        yield where, 1, np.max(ratio)


@claim(f"{LATER}, Proposition 1", RANDOM, "<=", within=1e-9)
def alpha_below_tau(seeds: int) -> Cases:
    """alpha(D; sigma_m(W), sigma_n(W)) <= lmin(tau), sigma_k(W) = 0 for k > min(n, m): largest ratio"""
    yield from _alpha_over_lowest("alpha")


@claim("Xu et al. 2023 and 2025", RANDOM, "<=", within=1e-9)
def alpha_below_tau_as_printed(seeds: int) -> Cases:
    """the same with sigma_min(W) in both roots, as the tables of Xu et al. 2023 and 2025 have it: largest ratio"""
    yield from _alpha_over_lowest("alpha_as_printed")


# What training leaves


class Gains(NamedTuple):
    """delta_w of a trained network along its target's top pair, over seeds, and what the start says of it."""

    measured: np.ndarray
    predicted: np.ndarray


@functools.cache
def trained(start: str, seeds: int) -> Gains:
    """X = I and n = m = 4, at `WIDTH`."""
    targets = np.random.default_rng(0).normal(size=(seeds, 4, 4))
    make = functools.partial(initialize, start, rank=WIDTH, alpha=WIDTH**-0.25, side="A")
    starts = narrow(stack([make(jax.random.key(i), LinearNetwork(target)) for i, target in enumerate(targets)]))
    run = runs.to_the_end(stack([LinearNetwork(target, np.eye(4)) for target in targets]), starts)
    return _gains(targets, starts, run.adapters)


def _gains(targets: np.ndarray, starts: Adapters, ends: Adapters) -> Gains:
    u, sigma, vt = np.linalg.svd(targets)  # Y = W1 W2 has u on the inputs' side

    def along(adapters: Adapters) -> tuple[np.ndarray, np.ndarray]:
        ((a, b),) = jax.tree.map(np.asarray, adapters)
        return (a @ u[:, :, :1])[..., 0], (vt[:, :1] @ b)[:, 0]

    first, second = (np.linalg.norm(gain, axis=-1) for gain in along(ends))
    predicted = jax.vmap(lambda *one: theory.trained_gains(*one).ratio)(sigma[:, 0], *along(starts))
    return Gains(first / second, np.asarray(predicted))


def _errors(kind: str, seeds: int) -> Cases:
    """The largest relative error of delta_w over seeds."""
    for ratio in RATIOS:
        gains = trained(f"{kind}-both:{ratio}", seeds)
        yield f"{kind}-both:{ratio}", 0, np.max(np.abs(gains.measured / gains.predicted - 1))


@claim(DERIVED, TRAINED, within=1e-8)
def trained_gains_spectral(seeds: int) -> Cases:
    """
    what pretraining leaves: delta_w^2 = (s + d)/(s - d), s^2 = d^2 + 4 (sigma^2 + p), d and p of the start along a
    singular pair; from modes that do not meet: relative error
    """
    yield from _errors("spectral", seeds)


@claim(DERIVED, TRAINED, within=0.01)
def trained_gains_gaussian(seeds: int) -> Cases:
    """the same from wide Gaussian weights, whose modes hardly meet: within 1%"""
    yield from _errors("gaussian", seeds)

"""LoRA's scaling factor against runs: what it is equal to, what it moves, and what a network and a layer bear."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from lora_flow.adapter import Adapter
from lora_flow.claims.frame import Cases, claim
from lora_flow.claims.layer_runs import SHIFT, Run, draws, gaussian, norm, spaces
from lora_flow.dynamics.descend import descend
from lora_flow.dynamics.lanes import solve_lanes, stack
from lora_flow.experiments import relu_layers
from lora_flow.problems.one_layer import SingleLayer
from lora_flow.runtime.compiling import compiled
from lora_flow.theory import scaling as theory

PAPER, OURS = "Zhang et al. 2026", "derived here, for 2606.12883"
SIZE, RANK, RANKS = 64, 8, (1, 4, 16, 64)
STD = 1 / np.sqrt(3 * SIZE)  # of PEFT's A, uniform between -1/sqrt(n) and 1/sqrt(n)
FACTORS = (1.0, 4.0, 16.0, 64.0)
WIDE, DRAWS = 128, 8192  # of the first steps; the draws are for rank 1
EDGES = np.geomspace(1.2, 1.8, 14)  # lora_alpha over that of the linear edge, 3 % apart
FLOW = "one layer, white inputs, d = 60, r = 8, B = 0; s = 3, 50, to s t = 6, Dopri8 at rtol = 1e-12"
DRIFT = "one layer 64 x 64, singular values 1/i, r = 8, B = 0, sign descent, 51 steps; means of {seeds} draws"
FIRST = "one layer 128 x 128, shift u v^T, B = 0, sign descent; means of 8192/r draws"
LAYERS = "five ReLU layers, n = 64, r = 8, LoRA on all, 256 inputs, 300 steps; eta = 1e-4 (Adam), .01; worst of 2 draws"
EDGE = "one layer 64 x 64, singular values 1/i, B = 0, gradient descent, 300 steps; r = 1, 4, 16, 64"


# What a scaling is equal to


@claim(OURS, FLOW, within=1e-9, identity=True)
def scaling_of_flow(seeds: int) -> Cases:
    """a scaling s is the same as sqrt(s) A(0) and time s t, for gradient flow: s B A apart, relative"""
    times, alpha = np.linspace(0.0, 6.0, 4), 0.1
    how: Any = {"solver": "Dopri8", "rtol": 1e-12, "save_adapters": True}

    def change(s: float, size: float, times: np.ndarray) -> np.ndarray:
        starts = (stack(gaussian(size, 1)),)
        return s * Run.of(solve_lanes(SingleLayer(SHIFT, s), starts, times, keep=(), **how), times).change[:, 1:]

    for s in (3.0, 50.0):
        size, clock = (float(one) for one in theory.effective(s, alpha, 1.0, "gd"))
        scaled, twin = change(s, alpha, times / clock), change(1.0, size, times)
        yield f"s = {s:g}", 0, np.max(norm(scaled - twin) / norm(twin))


# What lora_alpha moves


@functools.cache
def second_order(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """||dB dA|| over ||B dA + dB A|| of the 51st step, means of draws, over the factor on s, and on eta."""
    shift = jnp.asarray(_shift())
    starts = stack([_start(rng, RANK) for rng in draws(seeds)])

    def share(s: Any, step: Any, start: Any) -> Any:
        how: Any = {"step": optax.sign_sgd(step), "saves": [50, 51], "save_adapters": True}
        history: Any = descend(SingleLayer(shift, s), (start,), steps=51, **how).history
        ((a, b),) = history
        da, db = a[1] - a[0], b[1] - b[0]
        return jnp.linalg.norm(db @ da) / jnp.linalg.norm(b[0] @ da + db @ a[0])

    each = jax.jit(jax.vmap(jax.vmap(share, (None, None, 0)), (0, 0, None)))
    factors, ones = np.array(FACTORS), np.ones(len(FACTORS))
    of_scalings, of_rates = each(factors, 1e-4 * ones, starts), each(ones, 1e-4 * factors, starts)
    return np.asarray(of_scalings).mean(axis=1), np.asarray(of_rates).mean(axis=1)


def _shift() -> np.ndarray:
    """A shift of full rank whose singular values fall like 1/i."""
    left, right = spaces(np.random.default_rng(0), SIZE, SIZE, SIZE)
    return np.asarray(left / np.arange(1, SIZE + 1) @ right.T)


def _start(rng: np.random.Generator, rank: int) -> Adapter:
    """PEFT's: A uniform, B = 0."""
    bound = 1 / np.sqrt(SIZE)
    return Adapter(jnp.asarray(rng.uniform(-bound, bound, (rank, SIZE))), jnp.zeros((SIZE, rank)))


@claim(f"{PAPER}; {OURS}", DRIFT, "<=")
def drift_knows_no_alpha(seeds: int) -> Cases:
    """lora_alpha does not raise the drift, ||dB dA|| over ||B dA + dB A||: its largest over its least, s = 1 to 64"""
    shares, _ = second_order(seeds)
    yield "s = 1, 4, 16, 64", 3, shares.max() / shares.min()


@claim(f"{PAPER}; {OURS}", DRIFT, ">=")
def drift_knows_the_rate(seeds: int) -> Cases:
    """the step size does: the same at 64 eta over that at eta"""
    _, shares = second_order(seeds)
    yield "eta = 1e-4, 64e-4", 20, shares[-1] / shares[0]


@functools.cache
def first_steps(rank: int) -> tuple[float, float]:
    """Of the change of W by the first step the part along v and the rest, over what theory says; means of draws."""
    rng, step, alpha, std = np.random.default_rng(rank), 1e-3, 16.0, 0.05
    u, v = (one / np.linalg.norm(one) for one in rng.normal(size=(2, WIDE)))
    layer, zero = SingleLayer(np.outer(u, v), alpha / rank), jnp.zeros((WIDE, rank))

    def norms(a: Any) -> Any:
        how: Any = {"step": optax.sign_sgd(step), "saves": [0, 1], "save_adapters": True}
        history: Any = descend(layer, (Adapter(a, zero),), steps=1, **how).history
        b = history[0].b[1]
        along, total = jnp.sum((b @ (a @ v)) ** 2), jnp.sum((b.T @ b) * (a @ a.T))
        return layer.scaling * jnp.sqrt(jnp.stack([along, total - along]))

    drawn = jnp.asarray(std * rng.normal(size=(DRAWS // rank, rank, WIDE)))
    signal, noise = np.asarray(jax.jit(lambda drawn: jax.lax.map(norms, drawn, batch_size=16))(drawn)).mean(axis=0)
    predicted = theory.first_step(step, alpha, std, (WIDE, WIDE), rank)
    return signal / predicted[0], noise / predicted[1]


@claim(OURS, FIRST, within=0.03)
def first_step_signal(seeds: int) -> Cases:
    """the first step along the task is eta alpha std sqrt(2 m/pi), whatever the rank: ratio"""
    for rank in (4, 16, 64):
        yield f"r = {rank}", 1, first_steps(rank)[0]


@claim(OURS, FIRST, within=0.03)
def first_step_noise(seeds: int) -> Cases:
    """the first step off the task is eta alpha std sqrt(m n/r): ratio"""
    for rank in (4, 16, 64):
        yield f"r = {rank}", 1, first_steps(rank)[1]


# What a network bears


def _raised(optimizer: str, moved: str, factor: float) -> np.ndarray:
    """The largest loss on the way over the first, `(draw,)`."""
    (setting,) = relu_layers.settings(optimizer, moved, [factor])
    losses = relu_layers.trained(optimizer, (setting,), 2)[:, 0]
    return np.max(losses, axis=-1) / losses[:, 0]


@claim(PAPER, LAYERS, "<=")
def layers_bear(seeds: int) -> Cases:
    """Adam bears a large lora_alpha, gradient descent a large step size: the largest loss over the first"""
    yield "Adam, lora_alpha x 1024", 2, np.max(_raised("adam", "lora_alpha", 1024.0))
    yield "gradient descent, step size x 64", 2, np.max(_raised("gd", "step size", 64.0))


@claim(PAPER, LAYERS, ">=")
def layers_blow_up(seeds: int) -> Cases:
    """Adam does not bear a large step size, nor gradient descent a large lora_alpha: the same"""
    yield "Adam, step size x 512", 2, np.min(_raised("adam", "step size", 512.0))
    yield "gradient descent, lora_alpha x 256", 2, np.min(_raised("gd", "lora_alpha", 256.0))


# The edge of stability of gradient descent


@functools.cache
def largest_alphas(step: float) -> np.ndarray:
    """The largest lora_alpha before the first that diverges, over the linear edge, for each of the ranks."""
    shift, found = jnp.asarray(_shift()), []
    for rank in RANKS:
        alphas = EDGES * theory.largest_alpha(step, STD, SIZE, rank)
        start = _start(np.random.default_rng(rank), rank)
        first, ended = np.asarray(_ends(shift, start, jnp.asarray(alphas / rank), jnp.asarray(step))).T
        diverged = ~(ended < first)
        found.append(alphas[np.argmax(diverged) - 1] if diverged.any() and not diverged[0] else np.nan)
    return np.asarray(found)


@compiled(quickly=True)
def _ends(shift: Array, start: Adapter, scalings: Array, step: Array) -> Array:
    """The losses before and after descent, `(scaling, 2)`."""

    def one(s: Array) -> Array:
        return descend(SingleLayer(shift, s), (start,), steps=300, step=step, saves=2).observables["loss"]

    return jax.vmap(one)(scalings)


@claim(OURS, EDGE, within=0.1)
def edge_of_alpha(seeds: int) -> Cases:
    """gradient descent bears lora_alpha up to a constant times r/(1 + sqrt(r/n)): over the mean of the ranks"""
    for step in (0.1, 0.01):
        edges = [theory.largest_alpha(step, STD, SIZE, rank) for rank in RANKS]
        ratios = largest_alphas(step) / np.asarray(edges)
        for rank, ratio in zip(RANKS, ratios / ratios.mean(), strict=True):
            yield f"eta = {step:g}, r = {rank}", 1, ratio


@claim(OURS, EDGE, within=0.03)
def exponent_of_the_edge(seeds: int) -> Cases:
    """the largest lora_alpha grows like r/(1 + sqrt(r/n)): exponent from r = 1 to 64, fitted"""
    logs = np.log(RANKS)
    for step in (0.1, 0.01):
        edge = [theory.largest_alpha(step, STD, SIZE, rank) for rank in RANKS]
        predicted, measured = (np.polyfit(logs, np.log(one), 1)[0] for one in (edge, largest_alphas(step)))
        yield f"eta = {step:g}", predicted, measured

"""Starts: LoRA-One's from one gradient step, what gamma it takes, and the floor that an offset weight leaves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import Adapters, zero_adapters
from lora_flow.claims import lora_runs
from lora_flow.claims.frame import DERIVED, Cases, Tried, claim
from lora_flow.claims.layer_runs import PAPER, SHIFT, draws, spaces
from lora_flow.claims.lora_runs import DELTA_W, case_name
from lora_flow.dynamics.lanes import solve_lanes, stack
from lora_flow.initialization import INITIALIZATIONS, initialize, lora_one_init, lora_one_theory_init
from lora_flow.problems.base import Problem
from lora_flow.problems.offset import offset_where
from lora_flow.problems.one_layer import Regression, SingleLayer
from lora_flow.problems.rounding import resolved
from lora_flow.theory import lora_one as theory

SAMPLES = {1.0: 400, 2.0: 20000, 4.0: 20000, 10.0: 20000}  # by kappa; the last two would take millions
SCHEMES = {  # with their alphas
    "gaussian": 0.1,
    "lora-one-theory": 0.5,
    "gora": 0.5,
    "lora-ga": 0.1,
    "pissa": 1.0,
    "milora": 1.0,
    "olora": 1.0,
    "loram": 1.0,
}
SAMPLED = "lora-one-theory, gamma = 1, d = 10, r = r* = 4; N = 400 with kappa = 1, else 20000"
PRODUCT = "lora-one, gamma = 1/4, r = 3, singular values 1, .8, .6, .5"
FLOORS = "one layer, white inputs, 30 x 40, r = 4, r* = 2, L = .25 without adapters, to t = 300"
TWO_LAYERS = "lora-one-theory on the aligned problem, r = 4"


# From samples


class Sampled(NamedTuple):
    """LoRA-One's start from so many samples, over seeds; spectral norms, of which the shift's is 1."""

    sampling: np.ndarray  # ||X^T X/N - I||
    error: np.ndarray  # ||B A - shift||


@functools.cache
def sampled(kappa: float, seeds: int) -> Sampled:
    """Linear regressions with d = 10, r = r* = 4, started with gamma = 1."""
    drawn = [(*spaces(rng, 10, 10, 4), rng.normal(size=(SAMPLES[kappa], 10))) for rng in draws(seeds)]
    x = np.stack([x for *_, x in drawn])
    shift = np.stack([(u * np.geomspace(1.0, 1 / kappa, 4)) @ v.T for u, v, _ in drawn])
    errors = x.mT @ x / SAMPLES[kappa] - np.eye(10), _errors_of_start(x, shift)
    return Sampled(*(np.linalg.norm(matrices, 2, axis=(-2, -1)) for matrices in errors))


@jax.jit
@jax.vmap
def _errors_of_start(x: Array, shift: Array) -> Array:
    ((a, b),) = lora_one_theory_init(jax.random.key(0), Regression(x, shift), rank=4, alpha=1.0)
    return b @ a - shift


@claim(f"{PAPER}, Theorem 3.3 with c = 1/2", SAMPLED, "<=")
def one_step_start(seeds: int) -> Cases:
    """||B A - shift|| <= eps ||shift|| at the start, if ||X^T X/N - I|| <= eps = min{1/(2 kappa), c/kappa^3}"""
    for kappa, samples in SAMPLES.items():
        (sampling, error), allowed = sampled(kappa, seeds), float(theory.sampling_error_allowed(kappa))
        met = np.all(sampling <= allowed)
        unmet = "" if met else f", ||X^T X/N - I|| = {sampling.max():.2g} > eps"
        yield f"kappa = {kappa:g}, N = {samples}{unmet}", allowed, error.max(), met


@claim(DERIVED, SAMPLED, "<=")
def one_step_start_by_samples(seeds: int) -> Cases:
    """||B A - shift|| <= ||X^T X/N - I|| ||shift|| at the start for r >= r*, whatever kappa and N: ratio"""
    for kappa, samples in SAMPLES.items():
        sampling, error = sampled(kappa, seeds)
        yield f"kappa = {kappa:g}, N = {samples}", 1, np.max(error / sampling)


# The product


@jax.jit
def _product(layer: SingleLayer) -> Array:
    ((a, b),) = lora_one_init(jax.random.key(0), layer, rank=3, alpha=0.5)
    return b @ a


def _product_error(expected: np.ndarray) -> float:
    return float(np.linalg.norm(_product(SingleLayer(SHIFT)) - expected) / np.linalg.norm(expected))


@claim(f"{PAPER}, Algorithm 1", PRODUCT, within=1e-12, identity=True)
def one_step_product(seeds: int) -> Cases:
    """the start is B A = gamma (best rank-r approximation of G)/S_1, factors with S^(1/2): relative error"""
    yield "d = 60", 0, _product_error(theory.lora_one_product(SHIFT, 3, 0.25))


@claim(f"{PAPER}, README as printed", PRODUCT, within=1e-12)
def one_step_product_as_printed(seeds: int) -> Cases:
    """the same with Diag(S) in both factors, so that it is S^2: relative error"""
    yield "d = 60", 0, _product_error(theory.lora_one_product_as_printed(SHIFT, 3, 0.25))


# Where the flow ends


class Ended(NamedTuple):
    """Flows from starts made in many ways."""

    shift: np.ndarray  # over seeds
    change: np.ndarray  # B(0) A(0) over (scheme, seed)
    loss: np.ndarray  # over (scheme, seed), in the end


@functools.cache
def ended(seeds: int) -> Ended:
    """30 x 40, r = 4, r* = 2 and an initial loss of .25, to t = 300."""
    layers = stack([_pretrained(rng) for rng in draws(seeds)])
    starts, shifted = stack(_begin(np.arange(seeds), layers)), [INITIALIZATIONS[name].offset for name in SCHEMES]
    problems = jax.vmap(jax.vmap(offset_where, (None, 0, 0)), (0, None, 0))(jnp.asarray(shifted), layers, starts)
    how: Any = {"each": True, "solver": "Tsit5", "keep": ("loss",), "throw": True}
    loss = solve_lanes(problems, starts, np.array([0.0, 300.0]), **how).observables["loss"]
    return Ended(np.asarray(layers.shift), starts[0].b @ starts[0].a, np.asarray(loss[..., -1]))


@jax.jit
@jax.vmap
def _begin(seed: Array, layer: SingleLayer) -> list[Adapters]:
    key = jax.random.key(seed)
    return [initialize(name, key, layer, rank=4, alpha=alpha, side="A") for name, alpha in SCHEMES.items()]


def _pretrained(rng: np.random.Generator) -> SingleLayer:
    u, v = spaces(rng, 30, 40, 2)
    return SingleLayer(0.5 * u @ v.T, weight=rng.normal(size=(30, 40)) / np.sqrt(40))


@claim(DERIVED, FLOORS, within=1e-4)
def rank_floor(seeds: int) -> Cases:
    """the flow ends at L = 1/2 sum_(i>r) sigma_i(shift + s B(0) A(0))^2 with an offset weight, else at 0"""
    shift, changes, losses = ended(seeds)
    for name, change, loss in zip(SCHEMES, changes, losses, strict=True):
        offset = INITIALIZATIONS[name].offset
        frozen = change if offset else np.zeros_like(change)
        floors = np.array([theory.rank_floor(*pair, rank=4) for pair in zip(shift, frozen, strict=True)])
        where = f"{name}, {'weight offset' if offset else 'weight as it was'}"
        near = np.max(np.abs(loss - floors)) < 1e-4  # every seed
        yield Tried(where, np.round(np.mean(floors), 12), resolved(float(np.mean(loss))), also=near)


# What gamma


@jax.jit
def _relative_loss(problem: Problem, gamma: float | Array) -> Array:
    """L at LoRA-One's start over L without adapters."""
    start = lora_one_theory_init(jax.random.key(0), problem, rank=4, alpha=jnp.sqrt(gamma))
    return problem.loss(start) / problem.loss(zero_adapters(problem.layers, 1))


@claim(DERIVED, "lora-one-theory, singular values 1, .8, .6, .5", identity=True)
def solved_at_once(seeds: int) -> Cases:
    """one layer with white inputs and gamma = 1 is solved at t = 0: L/L(without adapters), 0 at rounding"""
    yield "d = 60", 0, resolved(float(_relative_loss(SingleLayer(SHIFT), 1.0)))


def _two_layers(gamma: Callable[..., float], overshoots: bool) -> Cases:
    for delta_w in DELTA_W:
        c = lora_runs.gains(delta_w)
        measured = float(_relative_loss(lora_runs.problem(delta_w), gamma(c)))
        expected = theory.two_layer_loss(c, gamma(c))
        yield Tried(case_name(delta_w), expected, measured, also=(measured > 1) == overshoots)


@claim(DERIVED, TWO_LAYERS, within=1e-9, relative=True, identity=True)
def two_layers_overshoot(seeds: int) -> Cases:
    """gamma = 1 in two layers overshoots: L/L(without) = (1 - gamma (s1^2 + s2^2) - gamma^2 sigma s1 s2)^2 > 1"""
    yield from _two_layers(lambda c: 1.0, overshoots=True)


@claim(DERIVED, TWO_LAYERS, within=1e-9, relative=True, identity=True)
def two_layers_scaled(seeds: int) -> Cases:
    """gamma = 1/(sigma_W1^2 + sigma_W2^2) in two layers does not: the same, < 1"""
    yield from _two_layers(theory.two_layer_gamma, overshoots=False)

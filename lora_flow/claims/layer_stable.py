"""Stable-LoRA: when the shrinking of A stops, what is conserved from then on, what it buys, and steps by signs."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_flow.claims.frame import DERIVED, Cases, claim
from lora_flow.claims.layer_runs import adapter, draws, norm, spaces
from lora_flow.dynamics.descend import Descent, descend
from lora_flow.dynamics.flows import StableLoRA
from lora_flow.dynamics.integrator import RTOL
from lora_flow.dynamics.lanes import finished, solve_lanes, stack
from lora_flow.problems.one_layer import Regression, SingleLayer
from lora_flow.theory import lora_one
from lora_flow.theory import stable_lora as theory

SOURCE = "Stable-LoRA"
LAYERS = {(60, 60): 8, (40, 90): 4, (90, 40): 4}  # the rank of each m x n
VALUES = np.array([1.0, 0.8, 0.6, 0.4])
RATES = (5.0, 20.0)  # k, over the largest singular value
SQUARE = (60, 60)
SMALL, USUAL = 0.01, 60**-0.5  # standard deviations of A_0, the second the source's
SIZES, SHRUNK = (SMALL, USUAL, 0.5, 1.0), (1.0, 5.0, 20.0)
TIMES = np.linspace(0.0, 40.0, 81)
WIDTHS, ETA, STEP = (256, 1024, 4096), 1e-4, 10
OUTPUTS, RANK, SAMPLES = 16, 8, 8
SIGN = optax.sign_sgd(ETA)
OF = "one layer, white inputs, singular values 1, .8, .6, .4"
SHORT = f"{OF}, 60 x 60 with r = 8, 40 x 90 and 90 x 40 with r = 4, k = 5 and 20, to t = 3"
LONG = f"{OF}, 60 x 60, r = 8, to t = 40, at the defaults"
SIGNS = (
    f"sign descent, eta = 1e-4, {OUTPUTS} outputs, r = {RANK}, {SAMPLES} samples, n = 256, 1024, 4096, at step {STEP}"
)


def shift_of(layer: tuple[int, int]) -> np.ndarray:
    left, right = spaces(np.random.default_rng(0), *layer, len(VALUES))
    return left * VALUES @ right.T


def starts(layer: tuple[int, int], size: float, seeds: int) -> Any:
    """A drawn at this size, B = 0, over seeds."""
    m, n = layer
    zero = np.zeros((m, LAYERS[layer]))
    return stack([(adapter(size * rng.normal(size=(LAYERS[layer], n)), zero),) for rng in draws(seeds)])


# When the shrinking stops


class Stopped(NamedTuple):
    """The time at which the shrinking stops, `(seed,)`; A and B at t = 0, then and later, `(seed, time, ...)`."""

    until: np.ndarray
    a: np.ndarray
    b: np.ndarray


@functools.cache
def stopped(layer: tuple[int, int], size: float, rate: float, tight: bool, seeds: int) -> Stopped:
    """Two runs of one program: the second saves at the time that the first has found."""
    problem, start = SingleLayer(shift_of(layer)), starts(layer, size, seeds)
    how: dict[str, Any] = {"keep": ("shrunk_until1",), "save_adapters": True, "flow": StableLoRA(rate)}
    how |= {"rtol": np.asarray(1e-10 if tight else RTOL)}  # an array: one program for both
    times = np.tile(np.linspace(0.0, 3.0, 5), (seeds, 1))
    until = np.asarray(finished(solve_lanes(problem, start, times, **how)).observables["shrunk_until1"])[:, -1]
    times[:, 1:] = np.linspace(until, 3.0, 4, axis=1)
    history: Any = finished(solve_lanes(problem, start, times, **how)).history
    ((a, b),) = jax.tree.map(np.asarray, history)
    return Stopped(until, a, b)


@claim(DERIVED, f"{SHORT}, at the defaults, {{seeds}} seeds", within=0.05, relative=True)
def stable_lora_stops(seeds: int) -> Cases:
    """
    k >= 5 sigma_1, std of A_0 up to n^(-1/2): shrinking stops at t* = log(1 + k m ||A_0||/(n ||Y A_0^T||))/k, within 5%
    """
    for layer in LAYERS:
        for size in (SMALL, layer[1] ** -0.5):
            for rate in RATES:
                run = stopped(layer, size, rate, False, seeds)
                predicted = theory.switch_off_time(shift_of(layer), run.a[:, 0], rate)
                worst = np.argmax(np.abs(run.until / predicted - 1))
                where = f"{layer[0]} x {layer[1]}, std {size:.3g}, k = {rate:g}"
                yield where, predicted[worst], run.until[worst]


@claim(DERIVED, f"{SHORT}, rtol = 1e-10, {{seeds}} seeds", within=1e-8)
def stable_lora_leaves(seeds: int) -> Cases:
    """(||A||^2 - ||B||^2)/||A(t*)||^2 is 1 - m^2/n^2 at t* and stays: the farthest from it"""
    for layer in LAYERS:
        for rate in RATES:
            run = stopped(layer, layer[1] ** -0.5, rate, True, seeds)
            kept = (norm(run.a[:, 1:]) ** 2 - norm(run.b[:, 1:]) ** 2) / norm(run.a[:, 1:2]) ** 2
            predicted = theory.norms_left(layer)
            worst = np.ravel(kept)[np.argmax(np.abs(kept - predicted))]
            yield f"{layer[0]} x {layer[1]}, k = {rate:g}", predicted, worst


# What shrinking buys


class Long(NamedTuple):
    """Losses `(size, seed, time)`, and A and B, `(size, seed, time, ...)`."""

    loss: np.ndarray
    a: np.ndarray
    b: np.ndarray


@functools.cache
def long(rate: float, seeds: int) -> Long:
    """From every size of A_0, shrinking at this rate; at rate 0 gradient flow."""
    start = stack([starts(SQUARE, size, seeds) for size in SIZES])
    how: dict[str, Any] = {"keep": ("loss",), "save_adapters": True, "flow": StableLoRA(rate)}
    solved: Any = finished(solve_lanes(SingleLayer(shift_of(SQUARE)), start, TIMES, **how))
    ((a, b),) = jax.tree.map(np.asarray, solved.history)
    return Long(np.asarray(solved.observables["loss"]), a, b)


def decades_saved(size: float, rate: float, time: float, seeds: int) -> np.ndarray:
    """log10 L without shrinking less that with it, for every seed."""
    index, at = SIZES.index(size), np.argmin(np.abs(TIMES - time))
    without, shrunk = (np.log10(long(k, seeds).loss[index, :, at]) for k in (0.0, rate))
    return without - shrunk


@claim(DERIVED, f"{LONG}, {{seeds}} seeds", "<=")
def stable_lora_balances(seeds: int) -> Cases:
    """shrinking at k = 5 sigma_1 leaves below .01 of the imbalance ||A A^T - B^T B|| of the start"""
    run = long(5.0, seeds)
    sizes = norm(lora_one.imbalance(run.a, run.b))
    for index, size in enumerate(SIZES[1:], start=1):
        yield f"std {size:.3g}", 0.01, np.max(sizes[index, :, -1] / sizes[index, :, 0])


@claim(DERIVED, f"{LONG}, {{seeds}} seeds", ">=")
def stable_lora_saves(seeds: int) -> Cases:
    """from A_0 of std n^(-1/2) or more, shrinking lowers L(40) by 5 decades at least, k = 1, 5, 20: least of them"""
    for size in SIZES[1:]:
        for rate in SHRUNK:
            yield f"std {size:.3g}, k = {rate:g}", 5, np.min(decades_saved(size, rate, 40.0, seeds))


@claim(DERIVED, f"{LONG}, {{seeds}} seeds", "<=")
def stable_lora_costs(seeds: int) -> Cases:
    """from A_0 of std .01 shrinking only costs time: the most decades that it lowers L(10) by, k = 1, 5, 20"""
    for rate in SHRUNK:
        yield f"k = {rate:g}", 0, np.max(decades_saved(SMALL, rate, 10.0, seeds))


@claim(f"{SOURCE}; derived here", f"{LONG}, {{seeds}} seeds", "<=")
def stable_lora_needs_shrinking(seeds: int) -> Cases:
    """without shrinking and with m = n, ||A||/n < ||B||/m is never met: largest ||B||/||A||, all times"""
    run = long(0.0, seeds)
    for index, size in enumerate(SIZES):
        yield f"std {size:.3g}", 1, np.max(norm(run.b[index]) / norm(run.a[index]))


# Steps by signs, over the width


class Signs(NamedTuple):
    """delta_1 over delta_2 at `STEP`, measured and by the formula, `(seed,)`."""

    measured: np.ndarray
    predicted: np.ndarray


@functools.cache
def sign_steps(n: int, seeds: int) -> Signs:
    """A_0 with entries N(0, 1/n), B = 0, a shift with entries N(0, 1/n), and Gaussian inputs."""
    drawn = stack(
        [
            (rng.normal(size=(RANK, n)) / n**0.5, rng.normal(size=(OUTPUTS, n)) / n**0.5, rng.normal(size=(SAMPLES, n)))
            for rng in draws(seeds)
        ]
    )
    saves = (0, 1, 2, STEP, STEP + 1)

    def one(draw: Any) -> Descent:
        a, shift, inputs = draw
        start = (adapter(a, jnp.zeros((OUTPUTS, RANK))),)
        how: Any = {"saves": saves, "save_adapters": True}
        return descend(Regression(inputs, shift), start, steps=saves[-1], step=SIGN, **how)

    history: Any = jax.jit(jax.vmap(one))(drawn).history
    ((a, b),) = jax.tree.map(np.asarray, history)
    (start, _, inputs), steps_a, steps_b = drawn, np.diff(a, axis=1), np.diff(b, axis=1)
    z = np.swapaxes(inputs, 1, 2)
    measured = norm(steps_b[:, -1] @ (a[:, -2] @ z)) / norm(b[:, -2] @ (steps_a[:, -1] @ z))
    signs = zip(steps_b[:, 0] / ETA, steps_a[:, 1] / ETA, start, z, strict=True)
    predicted = np.array([theory.share_of_b(*one, ETA, STEP) for one in signs])
    return Signs(measured, predicted)


@claim(f"{SOURCE}; derived here", f"{SIGNS}, {{seeds}} seeds", within=0.25)
def sign_steps_over_the_width(seeds: int) -> Cases:
    """by signs, delta_1/delta_2 of B's and A's parts of a step falls with n, as n^p with p from -1 to -1/2: fitted"""
    low, high = theory.STEP_EXPONENTS
    shares = np.array([sign_steps(n, seeds).measured for n in WIDTHS])
    yield "all widths", (low + high) / 2, np.polyfit(np.log(WIDTHS), np.log(shares), 1)[0]


@claim(DERIVED, f"{SIGNS}, {{seeds}} seeds", within=0.1)
def sign_steps_share(seeds: int) -> Cases:
    """
    delta_1/delta_2 = ||S_B (A_0 + (t - 1) eta S_A) Z||/(t eta ||S_B S_A Z||), signs S: it fades to 1; ratio, within 10%
    """
    for n in WIDTHS:
        ratio = sign_steps(n, seeds).measured / sign_steps(n, seeds).predicted
        yield f"n = {n}", 1, ratio[np.argmax(np.abs(ratio - 1))]

"""Large starts of one layer: Oja's flow, what it makes of the start's size, and where random B reverses it."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np

from lora_flow import oracles
from lora_flow.claims.frame import DERIVED, Cases, claim
from lora_flow.claims.layer_runs import adapter, draws, spaces
from lora_flow.dynamics.lanes import finished, solve_lanes, stack
from lora_flow.problems.one_layer import SingleLayer

M, N, RANK, DRAWS = 8, 60, 8, 2
TAUS = (0.5, 2.0, 5.0, 10.0, 20.0)  # t/a^2
SMALL, LARGE = (1e-4, 1e-3, 1e-2, 1e-1), (2.0, 4.0, 8.0)
ORTHONORMAL = (*((a, 1.0) for a in (*SMALL, *LARGE)), (4.0, 4.0))  # (a, s)
GAUSSIAN = (4.0, 8.0)
RANDOM_B = (0.5, 1.0, 2.0, 4.0)
LEFT, RIGHT = spaces(np.random.default_rng(0), M, N, 4)
SHIFT = LEFT * np.array([1.0, 0.8, 0.6, 0.4]) @ RIGHT.T
RUNS = f"one layer, {M} x {N}, r = {RANK}, singular values 1, .8, .6, .4, at the defaults, the worst of {DRAWS} draws"


class Large(NamedTuple):
    """Losses and their times, `(draw, time)` and `(time,)`, by the start; rows O, `(draw, r, n)`."""

    rows: np.ndarray
    orthonormal: dict[tuple[float, float], tuple[np.ndarray, np.ndarray]]
    gaussian: dict[float, tuple[np.ndarray, np.ndarray]]
    random_b: dict[float, tuple[np.ndarray, np.ndarray]]


@functools.cache
def runs() -> Large:
    """All of them in one program."""
    taus, count = np.linspace(0.0, 20.0, 41), M * RANK
    frames = np.stack([np.linalg.qr(rng.normal(size=(N, RANK)))[0].T for rng in draws(DRAWS)])
    normal = np.stack([rng.normal(size=(RANK, N)) for rng in draws(DRAWS)]) / np.sqrt(N)
    columns = np.stack([rng.normal(size=count).reshape(M, RANK) for rng in draws(DRAWS)])
    zero_a, zero_b = np.zeros((DRAWS, RANK, N)), np.zeros((DRAWS, M, RANK))
    lanes = []  # adapters over draws, scaling, times
    for a, s in ORTHONORMAL:
        lanes.append((a * frames, zero_b, s, np.linspace(0.0, 25.0, 41) if a in SMALL else a**2 * taus))
    lanes += [(a * normal, zero_b, 1.0, a**2 * taus) for a in GAUSSIAN]
    lanes += [(zero_a, b * columns, 1.0, np.linspace(0.0, 4.0, 41)) for b in RANDOM_B]
    starts = stack([stack([(adapter(*pair),) for pair in zip(a, b, strict=True)]) for a, b, _, _ in lanes])
    problems = stack([stack([SingleLayer(SHIFT, scaling=s)] * DRAWS) for _, _, s, _ in lanes])
    times = np.stack([np.tile(t, (DRAWS, 1)) for _, _, _, t in lanes])
    loss = np.asarray(finished(solve_lanes(problems, starts, times, each=True, keep=("loss",))).observables["loss"])
    told = [(one[0], values) for one, values in zip(times, loss, strict=True)]
    large, after = len(ORTHONORMAL), len(ORTHONORMAL) + len(GAUSSIAN)
    return Large(
        frames,
        dict(zip(ORTHONORMAL, told[:large], strict=True)),
        dict(zip(GAUSSIAN, told[large:after], strict=True)),
        dict(zip(RANDOM_B, told[after:], strict=True)),
    )


def _at(run: tuple[np.ndarray, np.ndarray], time: float) -> np.ndarray:
    """log10 L at a saved time, for every draw."""
    times, loss = run
    return np.log10(loss[:, np.argmin(np.abs(times - time))])


def _worst(differences: np.ndarray) -> float:
    """The one farthest from 0."""
    return float(differences[np.argmax(np.abs(differences))])


def _apart(a: float) -> Cases:
    found = runs()
    for tau in TAUS:
        exact = [np.log10(oracles.large_start(SHIFT, rows, a, a**2 * tau)) for rows in found.rows]
        yield f"a = {a:g}, t/a^2 = {tau:g}", 0, _worst(_at(found.orthonormal[a, 1.0], a**2 * tau) - np.array(exact))


@claim(DERIVED, RUNS, within=0.01)
def large_start(seeds: int) -> Cases:
    """from A = a O, B = 0, a^2 >> sigma_1: L = 1/2 ||Y (I - P)||^2, P on rows of O exp(Y^T Y t/a^2): log10, a = 4"""
    yield from _apart(4.0)


@claim(DERIVED, RUNS, within=0.05)
def large_start_at_two(seeds: int) -> Cases:
    """the same at a = 2, where the limit is farther"""
    yield from _apart(2.0)


@claim(DERIVED, RUNS, within=0.01)
def large_starts_collapse(seeds: int) -> Cases:
    """Gaussian A of size 4 and 8: the same log10 L at equal t/a^2, on a curve of their own"""
    found = runs().gaussian
    for tau in TAUS:
        yield f"t/a^2 = {tau:g}", 0, _worst(_at(found[4.0], 16 * tau) - _at(found[8.0], 64 * tau))


def _exponents(sizes: tuple[float, ...], predicted: float) -> Cases:
    """Of the time to L(0)/10 between neighbouring sizes."""
    found = runs().orthonormal
    reached = []
    for a in sizes:
        times, loss = found[a, 1.0]
        level = np.log(np.sum(SHIFT**2) / 20)
        reached.append(np.array([np.interp(-level, -np.log(one), times) for one in loss]))
    for i, (a, larger) in enumerate(itertools.pairwise(sizes)):
        exponent = np.log(reached[i + 1] / reached[i]) / np.log(larger / a)
        yield f"a = {a:g} to {larger:g}", predicted, predicted + _worst(exponent - predicted)


@claim(DERIVED, RUNS, within=0.06)
def large_start_time(seeds: int) -> Cases:
    """large starts slow down as the square of their size: exponent in a of the time to L(0)/10"""
    yield from _exponents(LARGE, 2.0)


@claim(DERIVED, RUNS, within=0.15)
def small_start_time(seeds: int) -> Cases:
    """small starts slow down as their logarithm: the same exponent lies between -.3 and 0"""
    yield from _exponents(SMALL, -0.15)


@claim(DERIVED, RUNS, within=0.01)
def scaling_cancels(seeds: int) -> Cases:
    """LoRA's scaling s cancels from a large start: log10 L at s = 4 less that at s = 1, a = 4"""
    found = runs().orthonormal
    for tau in TAUS:
        yield f"t/a^2 = {tau:g}", 0, _worst(_at(found[4.0, 4.0], 16 * tau) - _at(found[4.0, 1.0], 16 * tau))


@claim(DERIVED, RUNS, "<=")
def random_b_reverses(seeds: int) -> Cases:
    """
    B random, A = 0, r = m, sizes from .5 on: the larger has the lower loss at all times: largest L(b)/L(b'), b > b'
    """
    found = runs().random_b
    for smaller, larger in itertools.pairwise(RANDOM_B):
        low, high = found[larger][1][:, 1:], found[smaller][1][:, 1:]
        ratio = np.where(high > 1e-18 * high[:, :1], low / high, 0.0)
        yield f"b = {larger:g}, b' = {smaller:g}", 1, np.max(ratio)

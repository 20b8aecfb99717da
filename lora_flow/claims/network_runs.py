"""The runs of two-layer linear networks that several claims share, each made once: starts, and gradient flow from them.

Networks are trained as `narrow` makes them, with as many hidden directions as their two ends have, which changes
nothing but the basis. Lanes are the seeds, and settings come one after the other, so that a shape compiles once. What
LAPACK is needed for, spectra, is looked at afterwards.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters
from lora_flow.claims.layer_runs import adapter, spaces
from lora_flow.coordinates.narrow import narrow
from lora_flow.dynamics.lanes import solve_lanes, stack
from lora_flow.dynamics.solve import Trajectory
from lora_flow.initialization import initialize
from lora_flow.problems.network import LinearNetwork
from lora_flow.runtime.compiling import compiled
from lora_flow.theory import linear_flow as flow
from lora_flow.theory import linear_networks as networks

Begun = tuple[LinearNetwork, Adapters]

FLOOR = 1e-16  # of the start's loss: below it the loss is rounding
NEAR = 0.3  # ||Y - X W(0)||_F for targets near the start, in units of X W(0)'s smallest singular value
HIDDEN, WIDEST = 40, 16000
SAVES, FOLDS = 61, 24.0
REPEATS = 4  # of every width for each seed


class Shape(NamedTuple):
    """N samples of n inputs, X of a rank; m outputs."""

    samples: int
    n: int
    m: int
    rank: int


SQUARE, OBLONG = "n = m = 4", "n = 8, m = 4, X of rank 5"
SHAPES = {SQUARE: Shape(6, 4, 4, 4), OBLONG: Shape(7, 8, 4, 5)}
STARTS = {"even": "gaussian-both", "uneven": "gaussian-both:9", "near": "gaussian-both:4", "balanced": "balanced"}
BIASED = ("invariant", "V U2^T = 0 alone", "U1 U2^T = 0 alone")


# Problems and starts


@functools.cache
def begun(seeds: int) -> dict[tuple[str, str], Begun]:
    """Problems and starts, stacked over seeds, by shape and start."""
    found = {}
    for name, shape in SHAPES.items():
        drawn = [_begin(shape, seed) for seed in range(seeds)]
        for start in drawn[0]:
            problems, starts = zip(*(one[start] for one in drawn), strict=True)
            found[name, start] = stack(problems), narrow(stack(starts))
    return found


def _begin(shape: Shape, seed: int) -> dict[str, Begun]:
    """By start; those of `BIASED` where the inputs depend on each other."""
    rng = np.random.default_rng(seed)
    left, right = spaces(rng, shape.samples, shape.n, shape.rank)
    x, anything = left * rng.uniform(0.8, 1.25, shape.rank) @ right.T, rng.normal(size=(shape.samples, shape.m))
    problem, found = LinearNetwork(anything, x), {}
    make = functools.partial(
        initialize, key=jax.random.key(seed), problem=problem, rank=HIDDEN, alpha=HIDDEN**-0.25, side="A"
    )
    for name, scheme in STARTS.items():
        start = make(scheme)
        near = name in ("near", "balanced")
        found[name] = (LinearNetwork(_close_by(x, shape.rank, start, anything), x) if near else problem), start
    if shape.rank < shape.n:
        starts = make("invariant"), *_half_invariant(right.T, found["even"][1])
        found |= {name: (problem, start) for name, start in zip(BIASED, starts, strict=True)}
    return found


def _close_by(x: np.ndarray, rank: int, start: Adapters, anything: np.ndarray) -> np.ndarray:
    """Targets at a distance of `NEAR` from the outputs of the start."""
    ((a, b),) = start
    outputs = x @ np.asarray(b @ a).T
    least = np.linalg.svd(outputs, compute_uv=False)[min(rank, outputs.shape[1]) - 1]
    return outputs + NEAR * least * anything / np.linalg.norm(anything)


def _half_invariant(rows: np.ndarray, start: Adapters) -> tuple[Adapters, Adapters]:
    """The start with U_2 made orthogonal to V alone, and to U_1 alone; `rows` span the row space of X."""
    a, b = map(np.asarray, start[0])
    inside = (a @ rows.T) @ rows

    def without(spanned: np.ndarray) -> Adapters:
        basis, outside = np.linalg.qr(spanned.T)[0], a - inside
        return (adapter(inside + outside - basis @ (basis.T @ outside), b),)

    return without(b), without(rows @ a.T)


def wide(h: int, p: float, seeds: int) -> Adapters:
    """Starts with entries N(0, h^{-2p}), over `(repeat, seed)`, narrowed."""
    return jax.tree.map(lambda leaf: h**-p * leaf, _unscaled(h, seeds))


@functools.cache
def _unscaled(h: int, seeds: int) -> Adapters:
    """Narrowed starts with entries N(0, 1): each is the first directions of the next."""
    return _cut(_widest(seeds), jnp.asarray(h))


@functools.cache
def _widest(seeds: int) -> Adapters:
    return _draw_widest(jnp.arange(REPEATS * seeds).reshape(REPEATS, seeds))


@compiled(quickly=True)
def _draw_widest(seeds: Array) -> Adapters:
    """Entries N(0, 1) at the largest width, over `(repeat, seed)`."""
    problem = LinearNetwork(np.ones(SHAPES[OBLONG][1:3]))
    begin = functools.partial(initialize, "gaussian-wide:0", problem=problem, rank=WIDEST, alpha=1.0, side="A")
    return jax.vmap(jax.vmap(lambda seed: begin(jax.random.key(seed))))(seeds)


@compiled(quickly=True)
def _cut(widest: Adapters, h: Array) -> Adapters:
    """The first h directions, over `(repeat, seed)`, narrowed."""

    def one(start: Adapters) -> Adapters:
        ((a, b),) = start
        kept = jnp.where(jnp.arange(len(a)) < h, 1.0, 0.0)
        return narrow((Adapter(kept[:, None] * a, b * kept[None]),))

    return jax.vmap(jax.vmap(one))(widest)


# Gradient flow


class Flows(NamedTuple):
    """Gradient flow over `(seed, time)`, rates over seeds where they are of the start."""

    times: np.ndarray
    loss: np.ndarray
    distance: np.ndarray  # ||W1 W2 - X^+ Y||_F
    speed: np.ndarray  # -d/dt log L = ||grad L||^2/L
    drift: np.ndarray  # ||D(t) - D(0)||_F/(||W1(0)||_F^2 + ||W2(0)||_F^2)
    instantaneous: np.ndarray
    imbalance_rate: np.ndarray
    global_rate: np.ndarray


@functools.cache
def flows(seeds: int) -> dict[tuple[str, str], Flows]:
    """From every start, by shape and start."""
    return {at: _flows(*one) for at, one in begun(seeds).items()}


def to_the_end(problems: LinearNetwork, starts: Adapters) -> Trajectory:
    """Gradient flow over seeds, for `FOLDS` of the times that the residual takes at lmin(tau) of the start."""
    times = FOLDS / np.asarray(_slowest(problems, starts))[:, None] * np.linspace(0.0, 1.0, SAVES)
    how: Any = {"solver": "Dopri8", "rtol": 1e-10, "save_adapters": True, "throw": True}
    return solve_lanes(problems, starts, times, each=True, keep=("loss", "distance"), **how)


@compiled(quickly=True)
def _slowest(problems: LinearNetwork, starts: Adapters) -> Array:
    def one(problem: LinearNetwork, start: Adapters) -> Array:
        x, _, w1, w2 = problem.network(start)
        return networks.curvature(x).mu * networks.tau_smallest(w1, w2)

    return jax.vmap(one)(problems, starts)


def _flows(problems: LinearNetwork, starts: Adapters) -> Flows:
    run = to_the_end(problems, starts)
    loss = run.observables["loss"]
    seen = run.times, loss, run.observables["distance"], *_rates(problems, starts, run.history, loss)
    return Flows(*map(np.asarray, seen))


@compiled(quickly=True)
def _rates(problems: LinearNetwork, starts: Adapters, history: Adapters, losses: Array) -> tuple[Array, ...]:
    """-d/dt log L, the drift of the imbalance, and the rates of A' at the moment, of A, and of A' from the start on."""

    def one(problem: LinearNetwork, start: Adapters, passed: Adapters, loss: Array) -> tuple[Array, ...]:
        outputs, rank = problem.inputs @ problem.solution, len(problem.optimum)

        def reduced(adapters: Adapters) -> flow.Reduced:
            ((a, b),) = adapters
            return flow.reduce(problem.inputs, outputs, a.T, b.T, rank)

        gradients = jax.vmap(problem.field)(passed)
        speed = sum(jnp.sum(leaf**2, axis=(-2, -1)) for leaf in jax.tree.leaves(gradients)) / loss
        size = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(start))
        drift = jnp.linalg.norm(passed[0].imbalance - start[0].imbalance[None], axis=(-2, -1)) / size
        now = jax.vmap(lambda adapters: flow.instantaneous_rate(reduced(adapters)))(passed)
        return speed, drift, now, flow.imbalance_rate(reduced(start)), flow.global_rate(reduced(start))

    return jax.vmap(one)(problems, starts, history, losses)

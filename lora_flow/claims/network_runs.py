"""The runs of two-layer linear networks that theory is held against, each made when a claim first asks for it.

Networks are trained as `narrow` makes them, with as many hidden directions as their two ends have, which changes
nothing but the basis. Lanes are the seeds, and settings come one after the other, so that a shape compiles once. What
LAPACK is needed for, spectra, is looked at afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters, narrow
from lora_flow.claims.network_descent_runs import Steps, descend_by_all
from lora_flow.claims.runs import adapter, finished, only, spaces, stacked
from lora_flow.dynamics.solve import Trajectory, solve
from lora_flow.initialization import initialize
from lora_flow.problems.network import LinearNetwork
from lora_flow.runtime.compiling import compiled
from lora_flow.theory import linear_descent as descent
from lora_flow.theory import linear_flow as flow
from lora_flow.theory import linear_local as local
from lora_flow.theory import linear_networks as networks

Begun = tuple[LinearNetwork, Adapters]

FLOOR = 1e-16  # of the start's loss: below it the loss is rounding
NEAR = 0.3  # ||Y - X W(0)||_F for targets near the start, in units of X W(0)'s smallest singular value
HIDDEN = 40
SAVES, FOLDS = 61, 24.0
WIDTHS = (50, 100, 200, 400, 800, 1600, 3200)
FLOW_POWERS = (0.5, 0.4)  # entries N(0, h^{-2p})
LARGE_WIDTHS = (500, 1000, 2000, 4000, 8000, 16000)
CONDITION_POWERS = (0.275, 0.375, 0.475)  # C's
SOLUTIONS = (0.1, 1.0, 10.0)  # ||W*||_F
REPEATS = 4  # of every width for each seed
SPREADS = (1, 5, 100)  # sigma of B's Figure 2
DRAWS = 300


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
TRAINED_WIDTH = 1000
TRAINED = tuple(f"{kind}-both:{ratio}" for kind in ("spectral", "gaussian") for ratio in ("0.1", "1", "10"))
RANDOM_SHAPES = ((4, 4, 10), (3, 5, 9), (6, 2, 7))  # n, m, h


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


class Scalars(NamedTuple):
    """Gradient flow of networks with n = m = h = 1, over `(seed, time, network)`; X^2 and Y X without times."""

    s: np.ndarray
    target: np.ndarray
    u: np.ndarray
    v: np.ndarray


class Widths(NamedTuple):
    """Gradient flow from N(0, h^{-2p}), over `(width, run)`, and the problems' constants over runs."""

    distance: np.ndarray  # ||W1 W2(end) - X^+ Y||_2
    imbalance: np.ndarray  # lambda_r(Lam) + lambda_m(-Lam)
    s: np.ndarray
    y_norm: np.ndarray


class Condition(NamedTuple):
    """a1/a2 and b2 of Theorem E.1 at the start, over `(width, run)`."""

    ratio: np.ndarray
    b2: np.ndarray


class Gains(NamedTuple):
    """delta_w of a trained network along its target's top pair, over seeds, and what the start says of it."""

    measured: np.ndarray
    predicted: np.ndarray


class Spectra(NamedTuple):
    """Of random weights: the least eigenvalue of tau and its bounds."""

    lowest: Any
    alpha: Any
    alpha_as_printed: Any


class Networks:
    """Linear networks of two shapes, one of which has n != m and inputs that depend on each other."""

    def __init__(self, seeds: int):
        self.seeds = seeds

    @functools.cached_property
    def flows(self) -> dict[tuple[str, str], Flows]:
        """From every start, by shape and start; those of `BIASED` for the inputs that depend on each other."""
        return {at: _flows(*begun) for at, begun in self._starts.items()}

    @functools.cached_property
    def scalar(self) -> Scalars:
        """Four networks of one number each, side by side: everything is diagonal."""
        rng, eye = np.random.default_rng(0), np.eye(6, 4)
        x, y, u, v = rng.uniform(0.5, 1.5, (4, self.seeds, 4)) * rng.choice([-1, 1], (4, self.seeds, 4))
        problems = stacked([LinearNetwork(eye * target, eye * root) for target, root in zip(y, x, strict=True)])
        hidden = np.eye(8, 4)
        run, _ = _solve(problems, (adapter(hidden * u[:, None], np.swapaxes(hidden * v[:, None], -1, -2)),))
        history: Any = finished(run).history
        a, b = (np.diagonal(np.asarray(factor), axis1=-2, axis2=-1) for factor in history[0])
        return Scalars(x**2, x * y, a, b)

    @functools.cached_property
    def trained(self) -> dict[str, Gains]:
        """By start, X = I and n = m = 4, at `TRAINED_WIDTH`."""
        targets = np.random.default_rng(0).normal(size=(self.seeds, 4, 4))
        problems = stacked([LinearNetwork(target, np.eye(4)) for target in targets])
        trained = {}
        for name in TRAINED:
            make = functools.partial(initialize, name, rank=TRAINED_WIDTH, alpha=TRAINED_WIDTH**-0.25, side="A")
            drawn = [make(jax.random.key(i), LinearNetwork(target)) for i, target in enumerate(targets)]
            starts = narrow(stacked(drawn))
            run, _ = _solve(problems, starts)
            trained[name] = _gains(targets, starts, finished(run).adapters)
        return trained

    @functools.cached_property
    def descents(self) -> dict[tuple[str, str, str], Steps]:
        """By shape, start and rule."""
        runs = {}
        for (shape, start), (problems, starts) in self._starts.items():
            if start in STARTS:
                for rule, steps in descend_by_all(problems, starts, self.seeds).items():
                    runs[shape, start, rule] = steps
        return runs

    @functools.cached_property
    def widths(self) -> dict[float, Widths]:
        """By p, at `WIDTHS`, with inputs that depend on each other."""
        problems, _ = self._starts[OBLONG, "even"]
        return {p: _widths(problems, [self._wide(h, p) for h in WIDTHS]) for p in FLOW_POWERS}

    @functools.cached_property
    def conditions(self) -> dict[tuple[float, float], Condition]:
        """By ||W*||_F and p, at `LARGE_WIDTHS`, for the same inputs."""
        problems, _ = self._starts[OBLONG, "even"]
        conditions = {}
        for size in SOLUTIONS:
            for p in CONDITION_POWERS:
                each = np.array([_condition(problems, self._wide(h, p), jnp.asarray(size)) for h in LARGE_WIDTHS])
                ratio, b2 = np.moveaxis(each, 1, 0).reshape(2, len(LARGE_WIDTHS), -1)
                conditions[size, p] = Condition(ratio, b2)
        return conditions

    def _wide(self, h: int, p: float) -> Adapters:
        """Starts with entries N(0, h^{-2p}), over `(repeat, seed)`, narrowed."""
        return jax.tree.map(lambda leaf: h**-p * leaf, self._unscaled[h])

    @functools.cached_property
    def _unscaled(self) -> dict[int, Adapters]:
        """Narrowed starts with entries N(0, 1) by h: each is the first directions of the next."""
        widest = _widest(jnp.arange(REPEATS * self.seeds).reshape(REPEATS, self.seeds))
        return {h: _cut(widest, jnp.asarray(h)) for h in {*WIDTHS, *LARGE_WIDTHS}}

    @functools.cached_property
    def spectra(self) -> dict[tuple[int, int, int], Spectra]:
        """Of random weights whose hidden units and whose layers differ in size, by n, m and h."""
        return {shape: _spectra(*_random_weights(*shape)) for shape in RANDOM_SHAPES}

    @functools.cached_property
    def published(self) -> dict[int, np.ndarray]:
        """alpha_0/beta_0 in B's experiment 4.2 by sigma, as the authors' code draws it: seeds 0 to 49."""
        side, h = 20, 1000
        draws = []
        for seed in range(50):
            rng = np.random.RandomState(seed)
            x = np.linalg.qr(rng.normal(size=(side, side)))[0]
            y = x @ rng.normal(0, side**-0.5, (side, side))
            draws.append((x, y, rng.normal(size=(side, h)), rng.normal(size=(h, side))))
        x, y, w1, w2 = map(np.stack, zip(*draws, strict=True))
        scale = {spread: np.sqrt((spread + np.sqrt(spread**2 + 4)) / 2) for spread in SPREADS}
        return {spread: np.asarray(_ratio(x, y, rho * w1, w2 / rho)) for spread, rho in scale.items()}

    @functools.cached_property
    def _starts(self) -> dict[tuple[str, str], Begun]:
        """Problems and starts, stacked over seeds, by shape and start."""
        begun = {}
        for name, shape in SHAPES.items():
            drawn = [_begin(shape, seed) for seed in range(self.seeds)]
            for start in drawn[0]:
                problems, starts = zip(*(one[start] for one in drawn), strict=True)
                begun[name, start] = stacked(problems), narrow(stacked(starts))
        return begun


# Problems and starts


def _begin(shape: Shape, seed: int) -> dict[str, Begun]:
    """By start."""
    rng = np.random.default_rng(seed)
    left, right = spaces(rng, shape.samples, shape.n, shape.rank)
    x, anything = left * rng.uniform(0.8, 1.25, shape.rank) @ right.T, rng.normal(size=(shape.samples, shape.m))
    problem, begun = LinearNetwork(anything, x), {}
    make = functools.partial(
        initialize, key=jax.random.key(seed), problem=problem, rank=HIDDEN, alpha=HIDDEN**-0.25, side="A"
    )
    for name, scheme in STARTS.items():
        start = make(scheme)
        near = name in ("near", "balanced")
        begun[name] = (LinearNetwork(_close_by(x, shape.rank, start, anything), x) if near else problem), start
    if shape.rank < shape.n:
        starts = make("invariant"), *_half_invariant(right.T, begun["even"][1])
        begun |= {name: (problem, start) for name, start in zip(BIASED, starts, strict=True)}
    return begun


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


@compiled(quickly=True)
def _widest(seeds: Array) -> Adapters:
    """Entries N(0, 1) at the largest width, over `(repeat, seed)`."""
    problem, h = LinearNetwork(np.ones(SHAPES[OBLONG][1:3])), max(*WIDTHS, *LARGE_WIDTHS)
    begin = functools.partial(initialize, "gaussian-wide:0", problem=problem, rank=h, alpha=1.0, side="A")
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


@compiled(quickly=True)
def _solve(problems: LinearNetwork, starts: Adapters) -> tuple[Trajectory, Array]:
    """Over seeds, with -d/dt log L, for `FOLDS` of the times that the residual takes at lmin(tau) of the start."""

    def one(problem: LinearNetwork, start: Adapters) -> tuple[Trajectory, Array]:
        x, _, w1, w2 = problem.network(start)
        end = FOLDS / (networks.curvature(x).mu * networks.tau_smallest(w1, w2))
        how: Any = {"solver": "Dopri8", "rtol": 1e-10, "adjoint": diffrax.ForwardMode(), "save_adapters": True}
        run = solve(problem, start, t1=end, saves=SAVES, **how)
        history: Any = run.history
        gradients: Any = jax.vmap(problem.field)(history)
        speed = sum(jnp.sum(leaf**2, axis=(-2, -1)) for leaf in jax.tree.leaves(gradients)) / run.observables["loss"]
        return only(run, "loss", "distance"), speed

    return jax.vmap(one)(problems, starts)


@compiled(quickly=True)
def _rates(problems: LinearNetwork, starts: Adapters, history: Adapters) -> tuple[Array, Array, Array, Array]:
    """The drift of the imbalance, and the rates of A' at the moment, of A, and of A' from the start on."""

    def one(problem: LinearNetwork, start: Adapters, passed: Adapters) -> tuple[Array, Array, Array, Array]:
        outputs, rank = problem.inputs @ problem.solution, len(problem.optimum)

        def reduced(adapters: Adapters) -> flow.Reduced:
            ((a, b),) = adapters
            return flow.reduce(problem.inputs, outputs, a.T, b.T, rank)

        size = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(start))
        drift = jnp.linalg.norm(passed[0].imbalance - start[0].imbalance[None], axis=(-2, -1)) / size
        now = jax.vmap(lambda adapters: flow.instantaneous_rate(reduced(adapters)))(passed)
        return drift, now, flow.imbalance_rate(reduced(start)), flow.global_rate(reduced(start))

    return jax.vmap(one)(problems, starts, history)


def _flows(problems: LinearNetwork, starts: Adapters) -> Flows:
    run, speed = _solve(problems, starts)
    drift, now, by_imbalance, throughout = _rates(problems, starts, finished(run).history)
    seen = run.times, run.observables["loss"], run.observables["distance"], speed
    return Flows(*map(np.asarray, (*seen, drift, now, by_imbalance, throughout)))


def _gains(targets: np.ndarray, starts: Adapters, ends: Adapters) -> Gains:
    u, sigma, vt = np.linalg.svd(targets)  # Y = W1 W2 has u on the inputs' side

    def along(adapters: Adapters) -> tuple[np.ndarray, np.ndarray]:
        ((a, b),) = jax.tree.map(np.asarray, adapters)
        return (a @ u[:, :, :1])[..., 0], (vt[:, :1] @ b)[:, 0]

    first, second = (np.linalg.norm(gain, axis=-1) for gain in along(ends))
    predicted = jax.vmap(lambda *one: flow.trained_gains(*one).ratio)(sigma[:, 0], *along(starts))
    return Gains(first / second, np.asarray(predicted))


def _widths(problems: LinearNetwork, wide: Sequence[Adapters]) -> Widths:
    distances = [_wide_limit(problems, starts) for starts in wide]
    levels = [np.ravel(_level(problems, starts)) for starts in wide]
    x, solution = np.asarray(problems.features), np.asarray(problems.solution)
    s = np.linalg.svd(x, compute_uv=False)[:, : SHAPES[OBLONG].rank] ** 2
    y_norm = np.linalg.norm(x @ solution, axis=(-2, -1))
    return Widths(np.array(distances), np.array(levels), np.tile(s, (REPEATS, 1)), np.tile(y_norm, REPEATS))


def _wide_limit(problems: LinearNetwork, starts: Adapters) -> np.ndarray:
    """||W1 W2(end) - X^+ Y||_2, over runs."""
    distances = []
    for repeat in range(REPEATS):
        run, _ = _solve(problems, jax.tree.map(lambda leaf, i=repeat: leaf[i], starts))
        ((a, b),) = finished(run).adapters
        distances.append(np.linalg.norm((b @ a).mT - problems.solution, 2, axis=(-2, -1)))
    return np.concatenate(distances)


@compiled(quickly=True)
def _level(problems: LinearNetwork, starts: Adapters) -> Array:
    """lambda_r(Lam) + lambda_m(-Lam), over `(repeat, seed)`."""

    def one(problem: LinearNetwork, start: Adapters) -> Array:
        _, _, u1, v = problem.network(start)
        spectrum = networks.imbalance_spectrum(u1, v)
        return spectrum[u1.shape[0] - 1] - spectrum[-v.shape[1]]

    return jax.vmap(jax.vmap(one), (None, 0))(problems, starts)


# Starts alone


@compiled(quickly=True)
def _condition(problems: LinearNetwork, starts: Adapters, size: Any) -> tuple[Array, Array]:
    """a1/a2 and b2 of C, over `(repeat, seed)`, with W* brought to a Frobenius norm."""

    def one(problem: LinearNetwork, start: Adapters) -> tuple[Array, Array]:
        x, _, w1, w2 = problem.network(start)
        optimum = size * problem.optimum / jnp.linalg.norm(problem.optimum)
        loss = networks.loss(x, x @ optimum, w1, w2)
        constants = local.constants(networks.curvature(x), loss, optimum, w1, w2)
        return constants.a1 / constants.a2, constants.b2

    return jax.vmap(jax.vmap(one), (None, 0))(problems, starts)


@compiled(quickly=True)
def _ratio(x: Array, y: Array, w1: Array, w2: Array) -> Array:
    """alpha_0/beta_0 of B, over draws."""

    def one(*network: Array) -> Array:
        start = descent.constants(*network)
        return start.alpha / start.beta

    return jax.vmap(one)(x, y, w1, w2)


def _random_weights(n: int, m: int, h: int) -> tuple[np.ndarray, np.ndarray]:
    """Hidden units of sizes from .1 to 3, one layer up to 10 times as large as the other, over draws."""
    rng = np.random.default_rng(0)
    w1, w2 = rng.normal(size=(DRAWS, n, h)), rng.normal(size=(DRAWS, h, m))
    layers, units = 10 ** rng.uniform(-0.5, 0.5, (DRAWS, 1, 1)), 10 ** rng.uniform(-1, 0.5, (2, DRAWS, h))
    return w1 * layers * units[0][:, None], w2 / layers * units[1][..., None]


def _spectra(w1: np.ndarray, w2: np.ndarray) -> Spectra:
    def one(w1: Array, w2: Array) -> Spectra:
        n, m = w1.shape[0], w2.shape[1]
        spectrum = networks.imbalance_spectrum(w1, w2)
        s_m, s_n, least = networks.singular_values(w1 @ w2, m, n, min(n, m))
        return Spectra(
            networks.tau_smallest(w1, w2),
            networks.alpha(spectrum, s_m, s_n, n, m),
            networks.alpha_as_printed(spectrum, least, n, m),
        )

    return Spectra(*map(np.asarray, jax.jit(jax.vmap(one))(w1, w2)))

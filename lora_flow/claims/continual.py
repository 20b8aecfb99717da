"""Continual learning of one layer: what each rule conserves, what it can reach, and what it forgets.

The document behind these lines derives them for this project, from the question of Janus-LoRA (arXiv 2605.28495), of
which the abstract was read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_flow.adapter import Adapter
from lora_flow.claims.frame import DERIVED, Cases, claim
from lora_flow.claims.layer_runs import adapter, norm
from lora_flow.dynamics.descend import descend
from lora_flow.dynamics.flows import Chain, Flow, LoRAPro
from lora_flow.dynamics.lanes import require_finished
from lora_flow.dynamics.protected import Protected, SafeGradient
from lora_flow.dynamics.solve import Trajectory, solve
from lora_flow.experiments import continual as experiment
from lora_flow.initialization import keep_away
from lora_flow.problems.one_layer import Regression, SingleLayer
from lora_flow.runtime.compiling import compiled
from lora_flow.theory import continual as theory

SHAPES = ((20, 24, 6, 4), (7, 11, 3, 5), (11, 8, 6, 4))  # m, n, r, k
SMALL, FLOWED = SHAPES[1:], SHAPES[:2]  # n <= 12; with fewer protected directions than the rank, and more
AT_RANDOM = "points with Gaussian A, B and G"
STEP, STEPS, END = 0.2, 400, 20.0


def told(shapes: Any) -> str:
    return "m, n, r, k = " + "; ".join(", ".join(map(str, shape)) for shape in shapes)


class Point(NamedTuple):
    """G `(m, n)`, A, B and orthonormal columns V."""

    g: np.ndarray
    a: np.ndarray
    b: np.ndarray
    basis: np.ndarray


def points(shape: tuple[int, int, int, int], count: int) -> Iterator[Point]:
    (m, n, r, k), rng = shape, np.random.default_rng(sum(shape))
    for _ in range(count):
        basis = np.linalg.qr(rng.normal(size=(n, k)))[0]
        yield Point(rng.normal(size=(m, n)), rng.normal(size=(r, n)), rng.normal(size=(m, r)), basis)


@compiled(quickly=True)
def _moves(flow: Flow, g: Any, now: Adapter) -> Any:
    """dW = B A' + B' A where the negative gradient of W is G."""
    change = flow.velocity(Adapter(now.b.T @ g, g @ now.a.T), now)
    return now.b @ change.a + change.b @ now.a


def motion(flow: Flow, point: Point) -> np.ndarray:
    return np.asarray(_moves(flow, jnp.asarray(point.g), adapter(point.a, point.b)))


def size(matrix: np.ndarray) -> float:
    """The Frobenius norm."""
    return float(np.linalg.norm(matrix))


def of_gradient(point: Point) -> SingleLayer:
    """A layer whose loss has the gradient -G at the point."""
    return SingleLayer(point.g + point.b @ point.a)


@claim(DERIVED, f"{AT_RANDOM}, {told(SHAPES)}; 10 draws each", within=1e-10)
def safe_motion(seeds: int) -> Cases:
    """
    the exact rule moves W by P_B G N + (I - P_B) G P, P on the rows of Pi A, Pi = I - (A V)(A V)^+: largest error
    relative to G
    """
    for shape in SHAPES:
        errors = [
            size(motion(Protected(one.basis, exact=True), one) - theory.exact_motion(*one)) / size(one.g)
            for one in points(shape, 10)
        ]
        yield f"m, n, r, k = {shape}", 0, max(errors)


@claim(DERIVED, f"{AT_RANDOM}, {told(SMALL)}; 5 draws each", within=1e-10)
def safe_optimum(seeds: int) -> Cases:
    """
    the exact rule's motion is the closest to G N among all B dA + dB A that are zero on V, by brute force: largest
    error relative to G
    """
    for shape in SMALL:
        errors = [
            size(motion(Protected(one.basis, exact=True), one) - theory.constrained_optimum(*one)) / size(one.g)
            for one in points(shape, 5)
        ]
        yield f"m, n, r, k = {shape}", 0, max(errors)


def safe_runs(shape: tuple[int, int, int, int]) -> Iterator[tuple[str, SingleLayer, Adapter, Flow, np.ndarray]]:
    """The safe rules on a shift of norm 1: the exact one, damped too, and project-A from A(0) V = 0."""
    (point,), n = points(shape, 1), shape[1]
    problem, scale = SingleLayer(point.g / size(point.g)), 1 / np.sqrt(n)
    both, half = adapter(scale * point.a, scale * point.b), adapter(scale * point.a, 0 * point.b)
    yield "exact", problem, both, Protected(point.basis, exact=True), point.basis
    yield "exact, damping 1e-3, B(0) = 0", problem, half, Protected(point.basis, exact=True, damping=1e-3), point.basis
    (away,) = keep_away((half,), point.basis)
    yield "project-A, A(0) V = 0", problem, away, Protected(point.basis), point.basis


@compiled(quickly=True)
def _flowed(problem: SingleLayer, start: Adapter, flow: Flow) -> Trajectory:
    how: Any = {"save_adapters": True, "derivatives": "forward"}
    return solve(problem, (start,), t1=END, saves=21, flow=flow, **how)


@compiled(quickly=True)
def _stepped(problem: SingleLayer, start: Adapter, flow: Flow) -> Trajectory:
    how: Any = {"save_adapters": True, "derivatives": "forward"}
    return descend(problem, (start,), steps=STEPS, step=STEP, saves=21, flow=flow, **how)


def drift(run: Trajectory, basis: np.ndarray) -> float:
    """The largest ||B A V - B(0) A(0) V||_F over a run."""
    require_finished(run.status)
    history: Any = run.history
    a, b = history[0]
    kept = np.asarray(b) @ np.asarray(a) @ basis
    return float(np.max(norm(kept - kept[0])))


@claim(DERIVED, f"flow to t = {END:g} at the defaults, shift of norm 1, {told(FLOWED)}", within=1e-10)
def safe_flow(seeds: int) -> Cases:
    """B A V is conserved by the flow of the exact rule, and by that of project-A from A(0) V = 0: largest change"""
    for shape in FLOWED:
        for name, problem, start, flow, basis in safe_runs(shape):
            yield f"{name}, m, n, r, k = {shape}", 0, drift(_flowed(problem, start, flow), basis)


@claim(DERIVED, f"{STEPS} steps of {STEP:g}, shift of norm 1, {told(FLOWED)}", within=1e-10)
def safe_descent(seeds: int) -> Cases:
    """the same by gradient descent, with steps of any size: largest change of B A V"""
    for shape in FLOWED:
        for name, problem, start, flow, basis in safe_runs(shape):
            yield f"{name}, m, n, r, k = {shape}", 0, drift(_stepped(problem, start, flow), basis)


@claim(DERIVED, f"{AT_RANDOM}, m, n, r, k = 12, 14, 4, 6, A V of rank 0 to 4; and 7, 11, 3, 5")
def safe_rank(seeds: int) -> Cases:
    """
    outside B's columns the exact motion has the rank max(r - rank(A V), 0): 0 for k >= r and a generic A, where B's
    column space can never turn
    """
    (generic,), (other,) = points((12, 14, 4, 6), 1), points((7, 11, 3, 5), 1)
    cases = [(generic._replace(a=_blocked(generic, rank)), rank) for rank in (0, 1, 2, 3)]
    for point, blocked in (*cases, (generic, 4), (other, 3)):
        moved = motion(Protected(point.basis, exact=True), point)
        outside = moved - point.b @ np.linalg.lstsq(point.b, moved, rcond=None)[0]
        rank, r = np.linalg.matrix_rank(outside, tol=1e-10 * size(point.g)), len(point.a)
        k = point.basis.shape[1]
        yield f"r = {r}, k = {k}, rank(A V) = {blocked}", theory.rank_outside(r, blocked), rank


def _blocked(point: Point, rank: int) -> np.ndarray:
    """A, with A V reduced to that rank."""
    u, s, vt = np.linalg.svd(point.a @ point.basis, full_matrices=False)
    return point.a - u[:, rank:] * s[rank:] @ vt[rank:] @ point.basis.T


@claim("Janus-LoRA, abstract; derived here", f"{AT_RANDOM}, 200 draws for each shape", within=0.15)
def safe_gradients_violate(seeds: int) -> Cases:
    """the closest motion to G N that is not forced to be safe violates by .1 to .4: mean of ||dW V||/||dW||"""
    for shape in SHAPES[:2]:
        found = []
        for one in points(shape, 200):
            flow = Chain(SafeGradient(of_gradient(one), one.basis), LoRAPro())
            found.append(float(theory.violation(motion(flow, one), one.basis)))
        yield f"m, n, r, k = {shape}", 0.25, np.mean(found)


SIZES = experiment.SIZES
SINGLE = (
    f"one new task, {SIZES.m} x {SIZES.n}, r = {SIZES.r}, k = {SIZES.k}, rank 2, norm 1, to t = {experiment.END:g} at "
    "the defaults, {seeds} draws"
)


@functools.cache
def single(name: str, seeds: int) -> np.ndarray:
    """Forgetting and new loss, `(overlap, seed, 2)`."""
    return experiment.one_task(name, seeds)


def shift_of(overlap: float) -> np.ndarray:
    """A shift of these sizes, `(m, n)`; all have the same norm on the protected inputs."""
    return np.asarray(experiment.shared_shift(jax.random.key(0), m=SIZES.m, n=SIZES.n, k=SIZES.k, overlap=overlap))


@claim("Janus-LoRA, abstract; derived here", SINGLE, ">=")
def projected_forgets(seeds: int) -> Cases:
    """
    each factor's safe gradient forgets even at overlap 0, where the plain flow does not: least forgetting over draws,
    and the plain flow's is below 1e-6
    """
    place = SIZES.overlaps.index(0.0)
    plain, projected = (single(name, seeds)[place, :, 0] for name in ("plain", "projected"))
    yield "overlap 0", 1e-4, np.min(projected), True, bool(np.max(plain) < 1e-6)


@claim(DERIVED, f"{SINGLE}; with 200 correlated samples, 12 x 10", within=0.02, relative=True)
def safe_floor(seeds: int) -> Cases:
    """
    with exact protection and r >= the shift's rank the new loss ends at 1/2 ||Delta V||^2, with inputs of covariance C
    at 1/2 tr(Delta V (V^T C^-1 V)^-1 V^T Delta^T): the farthest of all draws
    """
    basis = np.eye(SIZES.n)[:, : SIZES.k]
    for name in ("exact", "safe-start"):
        for i, overlap in enumerate(SIZES.overlaps):
            if overlap > 0:
                predicted = theory.floor(shift_of(overlap), basis)
                yield f"{name}, overlap {overlap:g}", predicted, _farthest(single(name, seeds)[i, :, 1], predicted)
    shift, inputs, basis, ended = correlated()
    yield "safe start, correlated", theory.floor(shift, basis, inputs.T @ inputs / len(inputs)), ended


def _farthest(values: np.ndarray, predicted: float) -> float:
    return float(values[np.argmax(np.abs(values - predicted))])


@functools.cache
def correlated() -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Delta, X, V, and the loss at the end of a safe start on correlated inputs."""
    rng, (m, n, r, k) = np.random.default_rng(0), (12, 10, 6, 3)
    inputs = rng.normal(size=(200, n)) @ (np.eye(n) + 0.3 * rng.normal(size=(n, n)))
    basis = np.linalg.qr(rng.normal(size=(n, k)))[0]
    shift = rng.normal(size=(m, 2)) @ rng.normal(size=(2, n)) / 10
    problem = Regression(inputs, shift)
    start = keep_away((adapter(rng.normal(size=(r, n)) / np.sqrt(n), np.zeros((m, r))),), basis)
    run = solve(problem, start, t1=1000.0, saves=2, flow=Protected(basis), derivatives="forward")
    require_finished(run.status)
    return shift, inputs, basis, float(run.observables["loss"][-1])


@claim(DERIVED, SINGLE, within=1e-3)
def plain_forgets(seeds: int) -> Cases:
    """the plain flow's forgetting grows with the overlap, to 1/2 ||Delta V||^2: the farthest of all draws"""
    basis, before = np.eye(SIZES.n)[:, : SIZES.k], -1.0
    for i, overlap in enumerate(SIZES.overlaps):
        found = single("plain", seeds)[i, :, 0]
        predicted = float(theory.forgetting(shift_of(overlap), basis))
        yield f"overlap {overlap:g}", predicted, _farthest(found, predicted), True, bool(np.min(found) > before)
        before = float(np.max(found))


TURNS = (
    f"three tasks in turn, {SIZES.side} x {SIZES.side}, r = {SIZES.turn_rank}, inputs of 4 dimensions each, to t = "
    f"{experiment.END:g} at the defaults, 2 draws"
)
"""Fewer than the figure's."""


@functools.cache
def turns(name: str) -> np.ndarray:
    """Forgetting and losses when learned, `(overlap, seed, 2, task)`, at overlaps 0 and 1/2; of plain LoRA at 0."""
    return experiment.in_turn(name, 2, SIZES._replace(turn_overlaps=(0.0,) if name == "plain" else (0.0, 0.5)))


@claim(DERIVED, TURNS, "<=")
def safe_start_in_turn(seeds: int) -> Cases:
    """
    A(0) V = 0 with project-A forgets nothing and learns every task, inputs overlapping or not: largest loss of any
    task at the end
    """
    for overlap, found in zip((0.0, 0.5), turns("safe-start"), strict=True):
        yield f"overlap {overlap:g}", 1e-6, np.max(np.abs(found).sum(axis=1))


@claim(DERIVED, TURNS, ">=")
def orthogonal_tasks_are_forgotten(seeds: int) -> Cases:
    """
    plain LoRA forgets tasks even of orthogonal inputs, since A(0) is random on all inputs: least loss of tasks 1 and 2
    in the end
    """
    yield "overlap 0", 1e-3, np.min(turns("plain")[0, :, 0, :2])


@claim(DERIVED, TURNS, ">=")
def exact_loses_plasticity(seeds: int) -> Cases:
    """
    from a generic A the exact rule forgets less than 1e-3, what B(0) A(0) changes, and cannot learn, k >= r: least loss
    of tasks 2 and 3 when learned, of 1/2 at first
    """
    for overlap, found in zip((0.0, 0.5), turns("exact"), strict=True):
        yield f"overlap {overlap:g}", 0.2, np.min(found[:, 1, 1:]), True, bool(np.max(np.abs(found[:, 0])) < 1e-3)

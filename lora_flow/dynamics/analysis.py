"""Observables that are too expensive at every step: computed afterwards, from saved adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_flow.adapter import Adapter, Adapters, as_adapters, zero_adapters
from lora_flow.algebra.angles import one_minus_cosine
from lora_flow.algebra.spectra import norm_on_host
from lora_flow.coordinates.base import Coordinates
from lora_flow.dynamics.flows import Flow, as_flow
from lora_flow.dynamics.measurements import Direction, directions_of
from lora_flow.dynamics.observable_tables import Observables
from lora_flow.dynamics.observables import OBSERVABLES
from lora_flow.problems.base import Problem, as_problem, on_host, vector_field
from lora_flow.problems.stale import check_problem
from lora_flow.runtime.compiling import compiled

DETAILS = Observables()
AT_ONCE = 2**27  # bytes of states that leave their coordinates together


class SavedLayer(NamedTuple):
    """One layer's adapters, NumPy's arrays with an axis of states in front, and their change."""

    adapter: Adapter
    descent: Adapter  # the negative gradient
    velocity: Adapter  # along the flow
    direction: Direction


def analyse(problem: Problem, adapters: Adapters, flow: Flow | str = "plain") -> dict[str, np.ndarray]:
    r"""Further observables of adapters with any leading axes, `Trajectory.history` for instance.

    **Returns:** name -> array with these leading axes: `DETAILS`, whose meanings `DETAILS.meanings(layers)` has, and
    the problem's own `details`. NaN where a quantity is undefined: the direction of a zero matrix, or adapters at times
    that were not reached.

    **Raises:** `InputError` for a problem that has changed since it was solved, and for a bad flow or adapters.
    """
    check_problem(problem)
    driven, adapters = as_flow(flow), as_adapters("adapters", adapters, problem.layers)
    lead = adapters[0].a.shape[:-2]
    states = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[-2:]), adapters)
    named = analyse_states(problem, driven, states, Coordinates(problem, adapters[0].rank), problem)
    return {name: values.reshape((*lead, *values.shape[1:])) for name, values in named.items()}


def analyse_states(
    problem: Problem,
    flow: Flow,
    states: Adapters,
    coordinates: Coordinates,
    solved: Problem,
    bases: Any = None,
    lanes: np.ndarray | None = None,
    on: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """`analyse` of states, NumPy's arrays with one axis in front, that were solved in the given coordinates.

    There the problem is `solved`: that of the coordinates, or this one offset. A state leaves the coordinates by the
    `bases` of its lane, which have an axis of lanes in front. `on` says where a flow's latch is on, `(state, layer)`.
    So many states leave at once as memory has plenty of room
    for: in a network of width 10,000 a state takes as much as the whole run of a narrow one.
    """
    reached = np.all([np.isfinite(leaf).all(axis=(-2, -1)) for leaf in jax.tree.leaves(states)], axis=0)
    finite = jax.tree.map(lambda leaf: np.where(reached[:, None, None], leaf, 0.0), states)
    like: Any = jax.eval_shape(coordinates.leave, *jax.tree.map(lambda leaf: leaf[0], (states, bases)))
    size = 3 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))  # with two changes of the same
    count, directions, parts = len(reached), on_host(directions_of(problem)), []
    at_once = min(max(1, AT_ONCE // size), count)
    for begin in range(0, count, at_once):
        chosen = np.minimum(np.arange(begin, begin + at_once), count - 1)  # as many in each part: one program
        here = _chosen(finite, chosen), bases if lanes is None else _chosen(bases, lanes[chosen]), _chosen(on, chosen)
        left, *changes = on_host(_left(coordinates, solved, flow, *here))
        named = DETAILS.values(list(map(SavedLayer, left, *changes, directions)))
        named |= as_problem(problem).details(left)
        parts.append({name: values[: count - begin] for name, values in named.items()})
    named = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for values in named.values():
        values[~reached] = np.nan
    return named


def _chosen(tree: Any, index: np.ndarray) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


@compiled()
def _left(
    coordinates: Coordinates, solved: Problem, flow: Flow, states: Adapters, bases: Any, on: Any
) -> tuple[Adapters, Adapters, Adapters]:
    """The states, their negative gradients and their velocities, out of the coordinates."""
    field = vector_field(solved)

    def one(adapters: Adapters, bases: Any, on: Any) -> tuple[Adapters, Adapters, Adapters]:
        descent = field(adapters)
        left, along = jax.linearize(lambda inside: coordinates.leave(inside, bases), adapters)
        return left, along(descent), along(flow(descent, adapters, *(() if on is None else (on,))))

    with jax.default_matmul_precision("highest"):
        return jax.vmap(one)(states, bases, on)


def modes_of_details(problem: Problem, rank: int) -> dict[str, tuple[int, ...]]:
    """Name -> the axes that each result of `analyse` has for one state: none, or that of the modes."""
    rest: Any = jax.tree.map(lambda leaf: np.asarray(leaf)[None], zero_adapters(problem.layers, rank))
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(DETAILS.meanings(len(problem.layers)), ())
    return shapes | {name: values.shape[1:] for name, values in as_problem(problem).details(rest).items()}


@DETAILS.of_all_layers("gradient_norm", "norm of the gradient of the loss with respect to the adapters")
def gradient_norm(layers: Sequence[SavedLayer]) -> np.ndarray:
    """||dL/d(A_1, B_1, ...)||; along the plain flow dL/dt is minus its square."""
    factors = jax.tree.leaves([layer.descent for layer in layers])
    slopes = [norm_on_host(factor, axis=(-2, -1)) for factor in factors]
    return norm_on_host(np.stack(slopes), axis=0)


@DETAILS.of_each_layer("growth_rate_{i}", "d/dt log ||gamma_{i}^T Z_{i}||^2")
def growth_rate(layer: SavedLayer) -> np.ndarray:
    """d/dt log ||gamma^T Z||^2 along the flow (Claim 3.1 of arXiv 2503.06982)."""
    left, right = map(np.asarray, layer.direction.pairs)
    along, growth = (left @ x.b + np.swapaxes(x.a @ right.T, -1, -2) for x in (layer.adapter, layer.velocity))
    size = norm_on_host(along, axis=(-2, -1))
    unit = np.where(size > 0, size, np.nan)[..., None, None]
    return 2 * np.sum((along / unit) * (growth / unit), axis=(-2, -1))


@DETAILS.of_each_layer("alignment_error", OBSERVABLES.entries["alignment_error"].about)
def alignment_error(layer: SavedLayer) -> np.ndarray:
    """The observable of that name, but from the singular value decomposition of Z itself, without a floor."""
    stacked = np.concatenate([layer.adapter.b, np.swapaxes(layer.adapter.a, -1, -2)], axis=-2)
    if stacked.shape[-1] > stacked.shape[-2]:  # the triangular factor is far smaller, and has the same left vectors
        stacked = np.swapaxes(np.linalg.qr(np.swapaxes(stacked, -1, -2), mode="r"), -1, -2)
    left, sigma, _ = np.linalg.svd(stacked, full_matrices=False)
    pairs = np.concatenate([np.asarray(vectors) for vectors in layer.direction.pairs], axis=1)
    return one_minus_cosine(left, sigma, pairs / np.sqrt(2))

"""Values that the host computes from a batch of lanes, beside the solver's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lora_flow.adapter import Adapters
from lora_flow.coordinates.base import Coordinates
from lora_flow.dynamics.analysis import analyse_states
from lora_flow.dynamics.flows import Flow
from lora_flow.problems.base import Problem, as_problem, on_host
from lora_flow.runtime.compiling import compiled

Values = dict[str, np.ndarray]
DEAD = 1e-7  # of the largest singular value of Z, which has the rounding of single precision where that is in use


def start_values(problems: Sequence[Problem], ranks: Sequence[int], offset: Sequence[bool], start: Adapters) -> Values:
    """The limits that a start sets: directions that never move, and the lowest loss that can be reached.

    **Arguments:** `problems`, `ranks` and `offset` have an entry for each lane; `offset` says whether the lane's start
    is subtracted from the frozen weights. `start` has a leading axis of lanes.

    **Returns:** name -> `(lane,)`:

    - `dead_directions`: the number of the rank's directions that are zero in both factors of a layer, summed over the
      layers. The gradient vanishes along such a direction, which stays zero: the start has a lower rank than asked for.
      (A hidden layer wider than out + in counts as out + in wide.)
    - `loss_floor`: the least loss of any adapters of that rank, NaN where it is not known. An initialisation that
      subtracts `s B_0 A_0` from the frozen weights must learn this matrix too, and the rank may not suffice for both.
    """
    room = np.asarray([[min(rank, sum(shape)) for shape in problems[0].layers] for rank in ranks])
    alive = np.sum([_rank(np.asarray(a), np.asarray(b)) for a, b in start], axis=0)
    floors = [
        _floor(problem, rank, shifted, jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), start))
        for i, (problem, rank, shifted) in enumerate(zip(problems, ranks, offset, strict=True))
    ]
    return {"dead_directions": (room.sum(axis=1) - alive).astype(np.int32), "loss_floor": np.asarray(floors)}


def leave_each(coordinates: Sequence[Coordinates], adapters: Adapters, bases: Any) -> Adapters:
    """The adapters of each lane, `(lane, ...)`, in the coordinates of its problem as it was given."""
    left = [
        on_host(_leave(one, *jax.tree.map(lambda leaf, i=i: leaf[i], (adapters, bases))))
        for i, one in enumerate(coordinates)
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *left)


@compiled()
def _leave(coordinates: Coordinates, adapters: Adapters, bases: Any) -> Adapters:
    with jax.default_matmul_precision("highest"):
        return coordinates.leave(adapters, bases)


def detail_values(
    problems: Sequence[Problem],
    coordinates: Sequence[Coordinates],
    offset: Sequence[bool],
    start: Adapters,
    bases: Any,
    history: Adapters,
    flow: Flow,
    on: np.ndarray | None = None,
) -> Values:
    """The results of `analyse` for adapters over time, `(lane, time, ...)`, all lanes of one problem together.

    `problems`, `coordinates` and `offset` have an entry for each lane. The adapters, in these coordinates, leave them
    by the `bases` first. `on` says where a flow's latch is on, `(lane, time, layer)`.
    """
    groups: dict[Any, list[int]] = {}
    for i, (problem, shifted) in enumerate(zip(problems, offset, strict=True)):
        groups.setdefault((id(problem), i if shifted else None), []).append(i)
    details: Values = {}
    for (_, own), members in groups.items():
        problem, inside = problems[members[0]], coordinates[members[0]]
        solved = inside.problem
        if own is not None:
            begun, basis = jax.tree.map(lambda leaf, i=own: leaf[i], (start, bases))
            problem = as_problem(problem).offset(on_host(_leave(inside, begun, basis)))
            solved = as_problem(solved).offset(begun)
        states = jax.tree.map(lambda leaf, to=members: leaf[to].reshape(-1, *leaf.shape[2:]), history)
        times = history[0].a.shape[1]
        lanes = np.repeat(members, times)
        latch = None if on is None else on[members].reshape(-1, on.shape[-1])
        for name, array in analyse_states(problem, flow, states, inside, solved, bases, lanes, latch).items():
            values = array.reshape(len(members), times, *array.shape[1:])
            details.setdefault(name, np.empty((len(problems), *values.shape[1:])))[members] = values
    return details


def _rank(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The rank of Z = [B; A^T], lane by lane."""
    sigma = np.linalg.svd(np.concatenate([b, np.swapaxes(a, -1, -2)], axis=-2), compute_uv=False)
    return np.sum(sigma > DEAD * sigma[..., :1], axis=-1)


def _floor(problem: Problem, rank: int, shifted: bool, start: Any) -> float:
    if len(start) > 1:
        return np.nan
    ((a, b),), asked = start, as_problem(problem)
    return asked.lowest_loss(rank, np.asarray(asked.scaling) * (b @ a) if shifted else None)

"""A task as plain arrays in the layout of `benchmarks.peers.algebra`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.peers.algebra import Weights

if TYPE_CHECKING:
    from benchmarks.tasks import Task


def weights(task: Task) -> Weights:
    return Weights(*(np.array(getattr(task.problem, name)) for name in Weights._fields))


def start(task: Task) -> tuple[np.ndarray, ...]:
    """A1, B1^T, A2, B2^T, each `(lanes, rank, ...)`."""
    (a1, b1), (a2, b2) = task.starts
    return tuple(map(np.ascontiguousarray, (a1, b1.mT, a2, b2.mT)))

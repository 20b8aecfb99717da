"""The paper's own way, gradient descent, in NumPy; and scipy's integrators on the same NumPy field."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from scipy.integrate import solve_ivp

from benchmarks.peers import arrays
from benchmarks.peers.algebra import Weights, field, loss
from benchmarks.peers.peer import ATOL_SHARE, DECADES, Peer, Run
from benchmarks.peers.processes import SolveLanes, Start, split_lanes

if TYPE_CHECKING:
    from benchmarks.tasks import Task


def descend(weights: Weights, start: Start, times: np.ndarray, step: float) -> np.ndarray:
    """Gradient descent on all lanes at once; the loss at the steps nearest to the save times."""
    state, done, losses = tuple(map(np.copy, start)), 0, []
    for stop in np.rint(times / step).astype(int):
        for _ in range(done, stop):
            for leaf, change in zip(state, field(weights, *state), strict=True):
                leaf += step * change
        done = stop
        losses.append(loss(weights, *state))
    return np.stack(losses, axis=-1)


def integrate(method: str, weights: Weights, start: Start, times: np.ndarray, rtol: float) -> np.ndarray:
    """`solve_ivp`, lane by lane, so that each has its own steps."""
    shapes = [leaf.shape[1:] for leaf in start]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]

    def unflatten(y: np.ndarray) -> list[np.ndarray]:
        return [part.reshape(shape) for part, shape in zip(np.split(y, ends), shapes, strict=True)]

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        return np.concatenate([leaf.ravel() for leaf in field(weights, *unflatten(y))])

    losses = np.full((len(start[0]), len(times)), np.nan)
    for lane, row in enumerate(losses):
        y0 = np.concatenate([leaf[lane].ravel() for leaf in start])
        solution = solve_ivp(slope, (0.0, times[-1]), y0, method, times, rtol=rtol, atol=ATOL_SHARE * rtol)
        row[: len(solution.t)] = [float(loss(weights, *unflatten(y))) for y in solution.y.T]
    return losses


def _prepared(solve: SolveLanes, task: Task) -> Run:
    return functools.partial(split_lanes, solve, arrays.weights(task), arrays.start(task), task.times)


def _scipy(method: str) -> Peer:
    # scipy raises a smaller rtol to 100 eps
    prepare = functools.partial(_prepared, functools.partial(integrate, method))
    return Peer(f"scipy {method}", prepare, DECADES, needs="scipy")


PAPER = Peer("gradient descent, NumPy (the paper's way)", functools.partial(_prepared, descend), (1e-4,), "step")
SCIPY = (_scipy("DOP853"), _scipy("LSODA"))

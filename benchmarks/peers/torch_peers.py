"""torchdiffeq and torchode: all lanes in one state, on one thread or one a core, whichever is faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.peers import arrays
from benchmarks.peers.algebra import Weights, field, loss
from benchmarks.peers.peer import ATOL_SHARE, DECADES, Peer, Run
from benchmarks.peers.processes import cores
from benchmarks.timing import seconds

if TYPE_CHECKING:
    import numpy as np
    import torch

    from benchmarks.tasks import Task

Tensors = tuple["torch.Tensor", ...]


def _tensors(task: Task) -> tuple[Weights, Tensors, torch.Tensor]:
    import torch

    weights = Weights(*map(torch.from_numpy, arrays.weights(task)))
    start = tuple(map(torch.tensor, arrays.start(task)))
    torch.set_num_threads(min((1, cores()), key=lambda threads: _trial(threads, weights, start)))
    return weights, start, torch.tensor(task.times)


def _trial(threads: int, weights: Weights, start: Tensors) -> float:
    """Seconds for some evaluations of the field on so many threads; for small matrices fewer are often faster."""
    import torch

    torch.set_num_threads(threads)
    field(weights, *start)
    return seconds(lambda: [field(weights, *start) for _ in range(50)])


def _torchdiffeq(task: Task) -> Run:
    """One step size for all lanes: the norm of the error is over the whole batch."""
    import torch
    from torchdiffeq import odeint

    weights, start, times = _tensors(task)

    @torch.no_grad()
    def run(rtol: float) -> np.ndarray:
        history = odeint(
            lambda t, y: field(weights, *y), start, times, rtol=rtol, atol=ATOL_SHARE * rtol, method="dopri8"
        )
        return torch.stack([loss(weights, *state) for state in zip(*history, strict=True)], -1).numpy()

    return run


def _torchode(task: Task) -> Run:
    """Each lane has steps of its own."""
    import torch
    import torchode

    weights, start, times = _tensors(task)
    shapes = [leaf.shape for leaf in start]
    sizes = [shape[1:].numel() for shape in shapes]
    y0 = torch.cat([leaf.flatten(1) for leaf in start], 1)

    def unflatten(y: torch.Tensor) -> Tensors:
        return tuple(part.view(shape) for part, shape in zip(y.split(sizes, 1), shapes, strict=True))

    def slope(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([leaf.flatten(1) for leaf in field(weights, *unflatten(y))], 1)

    term = torchode.ODETerm(slope)
    step = torchode.Tsit5(term=term)
    problem = torchode.InitialValueProblem(y0=y0, t_eval=times.expand(len(y0), -1))

    @torch.no_grad()
    def run(rtol: float) -> np.ndarray:
        controller = torchode.IntegralController(atol=ATOL_SHARE * rtol, rtol=rtol, term=term)
        history = torchode.AutoDiffAdjoint(step, controller).solve(problem).ys
        return torch.stack([loss(weights, *unflatten(y)) for y in history.unbind(1)], -1).numpy()

    return run


PEERS = (
    Peer("torchdiffeq dopri8", _torchdiffeq, DECADES, needs="torchdiffeq"),
    Peer("torchode tsit5", _torchode, DECADES, needs="torchode"),
)
"""The faster method of each library: their dopri5 took 1.6 and 1.1 times as long in job a (2026-12-01)."""

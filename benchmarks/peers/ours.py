"""lora_flow, through its public interface only, at its defaults but for rtol."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

import lora_flow
from benchmarks.peers.peer import Peer, Run

if TYPE_CHECKING:
    from benchmarks.tasks import Task

DEFAULT = 5e-4


def _sweep(task: Task) -> Run:
    def run(rtol: float) -> np.ndarray:
        dataset = lora_flow.sweep(
            task.problem,
            side="B",
            alpha=task.alphas,
            rank=task.rank,
            seeds=task.seeds,
            t1=task.t1,
            saves=task.times,
            rtol=rtol,
            progress=False,
        )
        return dataset["loss"].values.reshape(-1, len(task.times))

    return run


def _solve(task: Task) -> Run:
    adapters = jax.tree.map(lambda leaf: leaf[0], task.starts)

    def run(rtol: float) -> np.ndarray:
        trajectory = lora_flow.solve(task.problem, adapters, t1=task.t1, saves=task.times, rtol=rtol)
        return np.asarray(trajectory.observables["loss"])[None]

    return run


SWEEP = Peer("lora_flow.sweep", _sweep, (DEFAULT, 1e-4, 1e-5, 1e-6))
SOLVE = Peer("lora_flow.solve", _solve, (DEFAULT, 1e-4, 1e-5, 1e-6))

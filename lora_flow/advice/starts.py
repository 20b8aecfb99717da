"""Starts of a layer's task by name, and the alphas at which they are looked at."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_flow.adapter import Adapter
from lora_flow.advice.tasks import Task
from lora_flow.algebra.low_rank import LowRank
from lora_flow.bridge.schemes import begin, need_of, offsets
from lora_flow.bridge.sizes import UPDATE, Measured, choose_sizes
from lora_flow.checks import InputError

DRAWN = ("gaussian", "orthogonal", "spectral", "gora")  # which differ from seed to seed


class Drawn(NamedTuple):
    """The starts of one scheme at one rank, one for each seed: for alpha = 1, in the task's coordinates.

    Or none, and the reason why.
    """

    starts: tuple[Adapter, ...]
    refused: str = ""

    def scaled(self, alpha: float) -> list[Adapter]:
        return [Adapter(alpha * one.a, alpha * one.b) for one in self.starts]


def draw(task: Task, init: str, rank: int, seeds: int) -> Drawn:
    """The starts of a task, as `peft init` draws them: by the seed and the layer's name alone."""
    count = seeds if init.partition(":")[0] in DRAWN else 1
    try:
        return Drawn(tuple(task.enter(_draw(task, init, rank, seed)) for seed in range(count)))
    except InputError as error:
        return Drawn((), str(error))


def unit(task: Task, drawn: Drawn) -> float:
    """The alpha at which a start is as large as a balanced solution."""
    return 1.0 / float(np.median([task.size_of(one) for one in drawn.starts]))


def own_alphas(init: str, tasks: Sequence[Task], drawn: Sequence[Drawn]) -> list[float]:
    """The alphas that `peft init` chooses for layers by itself; NaN where that takes weights that are unknown."""
    measured = {}
    for i, (task, begun) in enumerate(zip(tasks, drawn, strict=True)):
        first = begun.starts[0]
        change = 0.0 if offsets(init) else float(np.linalg.norm(first.b @ first.a))
        update = task.scaling * change / task.weight_norm if change > 0 else 0.0
        measured[str(i)] = Measured(update, None, task.shape)
    if np.isnan([one.update for one in measured.values()]).any():
        return [float("nan")] * len(tasks)
    return list(choose_sizes(init, "A", measured, size=None, update=UPDATE, gain=None).values())


def _draw(task: Task, init: str, rank: int, seed: int) -> Adapter:
    need = need_of(init)
    known: dict[str, Any] = {}
    if need is not None and need.what == "gradient":
        known["descent"] = task.descent.triplets if need.times else task.descent.triplets.dense()
    elif need is not None and need.what == "weight":
        known["weight"] = _weight(task, rank, need.times == 0, need.smallest)
    elif need is not None and task.known is not None:
        known["inputs"] = task.known.features
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(task.name.encode()))
    return begin(init, key, task.shape, rank=rank, scaling=task.scaling, **known)


def _weight(task: Task, rank: int, whole: bool, smallest: bool) -> Any:
    """The weight, or those of its triplets that a scheme takes."""
    if whole:
        return None if task.read_weight is None else task.read_weight()
    if not smallest or task.minor is None:
        return None if smallest else task.principal
    last = task.minor
    return LowRank(last.u[:, -rank:], last.s[-rank:], last.vt[-rank:])

"""`advise` and `advise_checkpoint`: which start, which size of it, and which rank."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from lora_flow.advice.ahead import phases_ahead
from lora_flow.advice.choice import EDGE, Cell, admissible, confidence, reason, recommend
from lora_flow.advice.grid import LARGEST, OWN, Asked, curvature_of, floors_of, grid, ranks_of
from lora_flow.advice.practice import Practice, assumptions, init_command, sweep_command, translation
from lora_flow.advice.result import Advice
from lora_flow.advice.starts import draw, own_alphas
from lora_flow.advice.tasks import Task, kept
from lora_flow.bridge.checkpoints import open_checkpoint
from lora_flow.bridge.gradients import Gradients
from lora_flow.bridge.layers import Layer, choose
from lora_flow.bridge.schemes import need_of, offsets
from lora_flow.checks import (
    InputError,
    as_path,
    kind,
    require,
    require_choice,
    require_flag,
    require_integer,
    require_number,
)
from lora_flow.problems.one_layer import AdaptedLayer
from lora_flow.recipes.files import load_problem
from lora_flow.sweeps.grid import axis_of
from lora_flow.theory.scaling import POWER

INITS = ("gaussian", "spectral", "lora-one", "lora-ga", "pissa")
OF_GRADIENTS = ("gaussian", "spectral", "lora-one", "lora-ga")
NOTHING = "No gentle start of these sizes comes to the level: ask for more ranks, a higher level or other sizes."
SIZES = (0.003, 0.03, 0.1, 0.3, 1.0, 3.0)
RANKS = (1, 2, 4, 8, 16)
LEVEL, ROOM = 0.1, 0.5  # the level, where the largest rank leaves less than this share of it; else half-way to there


def advise(
    problem: AdaptedLayer | str | os.PathLike[str],
    *,
    init: str | Sequence[str] = INITS,
    size: float | Sequence[float] = SIZES,
    rank: int | Sequence[int] | None = None,
    level: float | None = None,
    seeds: int = 3,
    lr: float | None = None,
    steps: int | None = None,
    optimizer: str = "gd",
    progress: bool = True,
) -> Advice:
    """Simulates a grid of starts, sizes and ranks of one layer, and says which comes to a level of the loss first.

    The layer's loss is quadratic: 1/2 ||D - s B A||^2 for white inputs, D = -dL/dW, or that of its inputs where they
    are known. A large layer with white inputs is reduced to its leading singular pairs first; what that leaves out is
    told.

    **Arguments:**

    - `problem`: a `SingleLayer` or a linear `Regression`, or the path of a file of one layer, as `load_problem` reads.
    - `init`: names of `INITIALIZATIONS`; those that the layer has not what it takes for are left out of the answer.
    - `size`: how large starts are, ||Z||_2 with Z = [B; A^T] over a balanced solution's. Beside these each start is
      looked at with the size that `peft_init` gives it, and with the largest that `lr` bears.
    - `rank`: the ranks, by default 1, 2, 4, 8 and 16, those that the layer has room for.
    - `level`: the loss to come to, as a share of that at the pretrained weight; by default 0.1, or where the largest
      rank does not come that far, half-way from what it leaves to 1.
    - `seeds`: draws of random starts.
    - `lr`, `steps`, `optimizer` ("gd", "adam", "sign"): how it is going to be trained. They decide which starts are
      stable, what is reached in the end, and the confidence.

    **Returns:** an `Advice`.

    **Raises:** `InputError` for bad arguments, and for a level that no rank reaches, with the share that the largest
    leaves.
    """
    practice = _practice(lr, steps, optimizer)
    _check_level(level)
    require_flag("progress", progress)
    name = "problem" if isinstance(problem, AdaptedLayer) else Path(as_path("problem", problem)).stem
    given = problem if isinstance(problem, AdaptedLayer) else load_problem(os.fspath(problem))
    if not isinstance(given, AdaptedLayer):
        must = "be one layer: a SingleLayer, a linear Regression, or a file with weight and gradient or shift"
        raise InputError(f"problem must {must}, got {kind(given)}")
    asked = _asked(init, size, rank, seeds, min(given.layers[0]), "the layer's smaller dimension")
    task = Task.of(name, given, max(asked.rank))
    whole, _ = given.task_rank()
    source = None if isinstance(problem, AdaptedLayer) else str(problem)
    return _advice([task], asked, level, practice, progress, functools.partial(sweep_command, source, whole))


def advise_checkpoint(
    checkpoint: str | os.PathLike[str],
    gradients: str | os.PathLike[str],
    *,
    targets: str,
    init: str | Sequence[str] = OF_GRADIENTS,
    size: float | Sequence[float] = SIZES,
    rank: int | Sequence[int] | None = None,
    scaling: float = 1.0,
    level: float | None = None,
    loss: float | None = None,
    seeds: int = 1,
    lr: float | None = None,
    steps: int | None = None,
    optimizer: str = "gd",
    progress: bool = True,
) -> Advice:
    """The same for layers of a checkpoint together, each with white inputs and reduced to its leading singular pairs.

    All layers have one clock, one scheme and one alpha. A rank is their mean: those pairs get it that hold most of all
    gradients' squared norm together. `Advice.command` is the `lora-flow peft init` that makes the start.

    **Arguments:** `checkpoint`, `gradients`, `targets` and `scaling` as for `peft_init`; `loss`, the network's at the
    checkpoint, which says how far gradients may be trusted: until `t_fallen`, when it has fallen by a tenth; the others
    as for `advise`. The level is a share of the sum of the layers' quadratic losses.

    **Returns:** an `Advice`, with a layer for each matrix.

    **Raises:** `InputError` with the layer's name.
    """
    practice = _practice(lr, steps, optimizer)
    _check_level(level)
    require_flag("progress", progress)
    require_number("scaling", scaling, "be positive and finite", lambda known: known > 0)
    if loss is not None:
        require_number("loss", loss, "be positive and finite", lambda known: known > 0)
    layers = choose(open_checkpoint(as_path("checkpoint", checkpoint).expanduser()), targets)
    given = Gradients(as_path("gradients", gradients).expanduser())
    smallest = min(layers, key=lambda layer: min(layer.shape))
    what = f"the smaller dimension of {smallest.module}"
    asked = _asked(init, size, rank, seeds, min(smallest.shape), what)
    most = max(asked.rank)
    for one in asked.init:
        need = need_of(one)
        fits = need is None or need.what == "gradient" or (need.what == "weight" and need.times > 0)
        require(fits, "init", "be made of gradients, or of singular pairs of weights, for a checkpoint", one)
    for layer in layers:
        given.check(layer, 2 * most)
    tasks = [_task_of(layer, given, most, float(scaling)) for layer in layers]
    words = ["--checkpoint", str(checkpoint), "--targets", targets, "--gradients", str(gradients)]
    return _advice(
        tasks, asked, level, practice, progress, functools.partial(init_command, words, float(scaling)), loss
    )


def _task_of(layer: Layer, given: Gradients, rank: int, scaling: float) -> Task:
    """One layer of a checkpoint; its weight is read when it is asked for, and not kept."""
    descent = given.leading(layer, kept(layer.shape, rank))
    require(descent.energy > 0, f"the gradient of {layer.module} in {given.path}", "not be zero", "zeros")
    return Task(layer.module, layer.shape, scaling, rank, descent, layer.weight)


def _practice(lr: float | None, steps: int | None, optimizer: str) -> Practice:
    require_choice("optimizer", optimizer, POWER)
    if lr is not None:
        require_number("lr", lr, "be positive and finite", lambda known: known > 0)
    if steps is not None:
        require_integer("steps", steps, "be at least 1", 1)
    return Practice(lr, steps, optimizer)


def _asked(init: Any, size: Any, rank: Any, seeds: int, room: int, what: str) -> Asked:
    """The grid's axes, checked; ranks up to `room`, which is `what`."""
    rank = [one for one in RANKS if one <= room] if rank is None else rank
    names, sizes, ranks = (axis_of(*one) for one in (("init", init), ("size", size), ("rank", rank)))
    for one in names:
        require(isinstance(one, str), "init", "be names of initialisations", kind(one))
        need_of(one)
    for one in sizes:
        require_number("size", one, "be positive and finite", lambda known: known > 0)
    for one in ranks:
        require_integer("rank", one, f"lie between 1 and {room}, {what}", 1, room)
    require_integer("seeds", seeds, "be at least 1", 1)
    return Asked(names, tuple(sorted(map(float, sizes))), tuple(sorted(map(int, ranks))), int(seeds))


def _check_level(level: float | None) -> None:
    if level is not None:
        require_number("level", level, "lie between 0 and 1", lambda known: (known > 0) & (known < 1))


def _advice(
    tasks: list[Task],
    asked: Asked,
    level: float | None,
    practice: Practice,
    progress: bool,
    command: Callable[[xr.Dataset, Cell], str],
    loss: float | None = None,
) -> Advice:
    rate = practice.rate if practice.optimizer == "gd" else None
    first = tasks[int(np.argmax([task.top for task in tasks]))]
    if rate is not None and (largest := np.sqrt(EDGE / (rate * curvature_of(first, 1.0)))) > 1:
        asked = asked._replace(size=tuple(sorted({*asked.size, float(f"{0.99 * min(largest, LARGEST):.3g}")})))
    dataset = grid(tasks, asked, _level(tasks, max(asked.rank), level), progress)
    if practice.end is not None:
        end = min(practice.end, dataset.attrs["horizon"])
        dataset["loss_end"] = dataset["loss"].interp(time=end, assume_sorted=True).drop_vars("time")
    dataset.attrs["inputs_known"] = int(all(task.known is not None for task in tasks))
    dataset["admissible"] = admissible(dataset, rate).astype(np.int8)
    cell = recommend(dataset)
    if cell is not None and all(task.known is None for task in tasks):
        dataset = dataset.assign(_ahead(tasks, dataset, cell, loss))
    rank = max(asked.rank) if cell is None else cell.rank
    return Advice(
        dataset,
        cell,
        NOTHING if cell is None else reason(dataset, cell),
        assumptions(tasks, practice),
        confidence(dataset, cell, rate=practice.rate, optimizer=practice.optimizer),
        tuple(map(tuple, translation(first, rank, practice))),
        "" if cell is None else command(dataset, cell),
    )


def _ahead(tasks: list[Task], dataset: xr.Dataset, cell: Cell, loss: float | None) -> xr.Dataset:
    """The phases of the recommended start in each layer, see `phases_ahead`."""
    ranks = cell.of(dataset)["ranks"].values.tolist()
    drawn = [draw(task, cell.init, rank, 1) for task, rank in zip(tasks, ranks, strict=True)]
    alpha = float(cell.of(dataset)["alpha"])
    alphas = own_alphas(cell.init, tasks, drawn) if cell.size == OWN else [alpha] * len(tasks)
    begun = [one.scaled(alpha)[0] for one, alpha in zip(drawn, alphas, strict=True)]
    return phases_ahead(tasks, begun, offsets(cell.init), dataset["time"].values, loss)


def _level(tasks: list[Task], most: int, level: float | None) -> float:
    """The level that is asked for, or a default; the largest rank must reach it."""
    lowest = floors_of(tasks, ranks_of(tasks, most, most))
    if level is None:
        return LEVEL if lowest < ROOM * LEVEL else round((1 + lowest) / 2, 3)
    where = tasks[0].name if len(tasks) == 1 else f"these {len(tasks)} layers"
    what = f"the share of the loss that rank {most} leaves in {where}"
    require(level > lowest, "level", f"be above {lowest:.3g}, {what}", level)
    return level

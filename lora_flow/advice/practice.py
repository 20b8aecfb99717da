"""What people set (learning rate, steps, lora_alpha, Kaiming's A) in the theory's numbers (t, s, alpha), and back."""

from __future__ import annotations

import math
import shlex
from typing import NamedTuple

import numpy as np
import xarray as xr

from lora_flow.advice.choice import Cell
from lora_flow.advice.grid import OWN
from lora_flow.advice.tasks import Task
from lora_flow.results.report import show
from lora_flow.theory.scaling import effective


class Practice(NamedTuple):
    """How somebody trains: the learning rate and the number of steps, where they are given, and the optimiser."""

    rate: float | None = None
    steps: int | None = None
    optimizer: str = "gd"

    @property
    def end(self) -> float | None:
        """The flow's time after all steps; None where it is not known."""
        known = self.rate is not None and self.steps is not None and self.optimizer == "gd"
        return self.rate * self.steps if known and self.rate and self.steps else None


def kaiming(shape: tuple[int, int]) -> float:
    """The standard deviation of the entries of A in PEFT, uniform in +-1/sqrt(in) (Kaiming's with a = sqrt(5))."""
    return 1 / math.sqrt(3 * shape[1])


def translation(task: Task, rank: int, practice: Practice) -> list[list[str]]:
    """The rows of a table: what is set, what it is in theory, and its value for a layer."""
    s, std = task.scaling, kaiming(task.shape)
    solution = math.sqrt(2 * task.top / s)
    size = std * (math.sqrt(task.shape[1]) + math.sqrt(rank)) / solution
    grown = s * float(task.sigma[0])
    rows = [
        ["lora_alpha and r", "s = lora_alpha / r", f"lora_alpha {show(s * rank)} at r = {rank} is s = {show(s)}"],
        ["Kaiming's A, B = 0", "alpha = 1/sqrt(3 in)", f"alpha = {show(std)}"],
        ["", "size: Z's norm over a solution's, sqrt(2 sigma_1/s)", f"about {show(size)}, of {show(solution)}"],
        ["gradient", "small starts grow at s sigma_1(dL/dW)", f"s sigma_1 = {show(grown)}"],
        ["lora_alpha times c", "size times sqrt(c), time times c", f"size {show(size)} to 1: c = {show(size**-2)}"],
    ]
    if practice.optimizer == "gd":
        stable = 1 / (s * task.top * task.curvature)
        rows.append(["learning rate, SGD", "t = learning rate x steps", f"diverges above {show(stable)}"])
        if practice.end is not None:
            rows.append(["steps", "t", f"{practice.steps} steps end at t = {show(practice.end)}"])
    else:
        rows.append(["learning rate", "a = sqrt(s) std(A), e = sqrt(s) x learning rate", _effective(s, std, practice)])
    return rows


def _effective(scaling: float, std: float, practice: Practice) -> str:
    if practice.rate is None:
        return f"a = {show(math.sqrt(scaling) * std)}"
    a, e = effective(scaling, std, practice.rate, practice.optimizer)
    return f"a = {show(float(np.asarray(a)))}, e = {show(float(np.asarray(e)))}"


def assumptions(tasks: list[Task], practice: Practice) -> tuple[str, ...]:
    """What the numbers rest on, a sentence each."""
    known = all(task.known is not None for task in tasks)
    of = "the layer" if len(tasks) == 1 else "each layer"
    lines = [
        f"The inputs of {of} are those of the file." if known else f"The inputs of {of} are white, of variance 1.",
        f"The task is linearised: the loss is quadratic in {of}'s weight, with the gradient that it has at the start.",
    ]
    if len(tasks) > 1:
        lines.append("Layers do not know of each other: their losses add up, on one clock.")
    reduced = [task for task in tasks if task.is_reduced]
    if reduced:
        pairs = max(len(task.sigma) for task in reduced)
        left = max(task.left / task.loss for task in reduced)
        lines.append(
            f"Simulated with the {pairs} leading singular pairs of the gradient alone: the rest holds up to {left:.1%} "
            "of a layer's loss, and is taken for never learned."
        )
    if practice.optimizer == "gd":
        lines.append("Flow time is the learning rate times the number of steps, of steps that are small.")
    else:
        lines.append(
            f"Times are those of gradient flow, not of {practice.optimizer}, which knows a = sqrt(s) std and "
            "e = sqrt(s) x learning rate alone."
        )
    return tuple(lines)


def sweep_command(path: str | None, whole: int, dataset: xr.Dataset, cell: Cell) -> str:
    """The sweep that solves the cell of a layer's file again, up to twice the time that its slowest draw takes.

    None for a spectral start of less than the gradient's rank, `whole`, which sweeps do not take.
    """
    if path is None or (cell.init == "spectral" and cell.rank < whole):
        return ""
    chosen = cell.of(dataset)
    latest = float(chosen["time_most"])
    t1 = 2 * latest if np.isfinite(latest) else float(dataset.attrs["horizon"])
    words = ["--problem", path, "--init", cell.init, "--alpha", f"{float(chosen['alpha']):.4g}"]
    words += ["--rank", str(cell.rank), "--t1", f"{t1:.3g}", "--out", "runs/layer"]
    return shlex.join(["lora-flow", "sweep", *words])


def init_command(words: list[str], scaling: float, dataset: xr.Dataset, cell: Cell) -> str:
    """The `lora-flow peft init` that makes the cell's starts for all layers."""
    ranks = dict(zip(dataset["layer"].values.tolist(), cell.of(dataset)["ranks"].values.tolist(), strict=True))
    common = max(ranks.values(), key=list(ranks.values()).count)
    pattern = [str(common), *(f"{name}={rank}" for name, rank in ranks.items() if rank != common)]
    size = "auto" if cell.size == OWN else f"{float(cell.of(dataset)['alpha']):.4g}"
    return shlex.join(
        ["lora-flow", "peft", "init", *words, "--init", cell.init, "--rank", *pattern, "--size", size]
        + (["--scaling", f"{scaling:g}"] if scaling != 1 else [])
        + ["--out", "start"]
    )

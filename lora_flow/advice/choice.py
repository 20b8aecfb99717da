"""The recommended cell of a grid, the reason in a sentence, the assumptions, and how far to trust them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from lora_flow.advice.grid import OWN
from lora_flow.results.report import show

JUMP = 0.1  # share of the loss by which a recommended start may change it at once, or a simulation leave it out
EDGE = 1.0  # learning rate times the largest second derivative, half of what gradient descent bears
NEAR = 1.1  # of the least time: the smallest rank within it is taken
SIZE = 1.0  # of the solution's: the largest start, where no learning rate says what is stable


class Cell(NamedTuple):
    """A start, its size and its rank, as labels of the dataset; of several layers the rank is their mean."""

    init: str
    size: str
    rank: int

    def of(self, dataset: xr.Dataset) -> xr.Dataset:
        return dataset.sel(init=self.init, size=self.size, rank=self.rank)


class Confidence(NamedTuple):
    """How far to trust an advice, "high", "middle" or "low", and why."""

    level: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.level}: {'; '.join(self.reasons)}" if self.reasons else self.level


def admissible(dataset: xr.Dataset, rate: float | None) -> xr.DataArray:
    """The cells that may be recommended.

    Their start changes the loss by at most a tenth at once, for such a jump is a step of gradient descent, which needs
    no flow to be judged and is as right as the inputs are white. And the start is not stiffer than a step size bears:
    that which is given, or else one that suits the solution.
    """
    stable = dataset["curvature"] * rate <= EDGE if rate is not None else dataset["relative_size"] <= SIZE * (1 + 1e-6)
    return (dataset["loss_start"] >= 1 - JUMP) & stable & np.isfinite(dataset["time_level"])


def recommend(dataset: xr.Dataset) -> Cell | None:
    """The admissible start and size that come to the level first, at the smallest rank that takes little longer."""
    time = dataset["time_level"].where(dataset["admissible"] == 1, np.inf)
    if not np.isfinite(time).any():
        return None
    near = time <= NEAR * float(time.min())
    rank = int(dataset["rank"].where(near).min())
    best = time.sel(rank=rank)
    where: dict[Any, Any] = best.argmin(...)
    init, size = (str(best[dim].values[int(where[dim])]) for dim in ("init", "size"))
    return Cell(init, size, rank)


def usual(dataset: xr.Dataset, cell: Cell) -> Cell | None:
    """PEFT's default start at the same rank, where it was looked at."""
    return Cell("gaussian", OWN, cell.rank) if "gaussian" in dataset["init"].values else None


def reason(dataset: xr.Dataset, cell: Cell) -> str:
    """Why this cell, in a sentence."""
    chosen, time = cell.of(dataset), float(cell.of(dataset)["time_level"])
    floor, level = float(chosen["loss_floor"]), dataset.attrs["level"]
    text = (
        f"{cell.init} at alpha {show(float(chosen['alpha']))} and rank {cell.rank} comes to {level:g} of the loss at "
        f"t = {show(time)}, first of the gentle starts looked at"
    )
    compared = usual(dataset, cell)
    if compared is not None and compared != cell:
        other = float(compared.of(dataset)["time_level"])
        told = f"needs t = {show(other)}" if np.isfinite(other) else f"is not there by t = {show(_end(dataset))}"
        text += f", where PEFT's own start {told}"
    larger = [rank for rank in dataset["rank"].values.tolist() if rank > cell.rank]
    text += f"; the rank leaves {show(floor)} of the loss"
    return f"{text}, and a larger one gains less than {NEAR - 1:.0%}." if larger else f"{text}."


def confidence(dataset: xr.Dataset, cell: Cell | None, *, rate: float | None, optimizer: str) -> Confidence:
    """Lower with every assumption that is not known to hold, or is known to fail."""
    low, middle = [], []
    if optimizer != "gd":
        low.append(f"{optimizer}'s steps are no flow: learning rate x steps is not its time, (a, e) is what it knows")
    if rate is not None and optimizer == "gd":
        stiff = rate * float((dataset if cell is None else cell.of(dataset))["curvature"].min())
        if stiff > EDGE:
            low.append(
                f"learning rate times largest second derivative is {show(stiff)}: no flow, and above 2 it diverges"
            )
        elif stiff > EDGE / 10:
            middle.append(f"learning rate times largest second derivative is {show(stiff)}: a coarse flow")
    if cell is not None and not _is_told(cell.of(dataset)):
        ends = " to ".join(show(float(cell.of(dataset)[name])) for name in ("time_least", "time_most"))
        middle.append(f"draws of the start take t = {ends} to the level, and the recommendation goes by their median")
    until = float(dataset["t_fallen"]) if "t_fallen" in dataset else np.nan
    if cell is not None and until < float(cell.of(dataset)["time_level"]):
        low.append(f"the network's loss has fallen by a tenth at t = {show(until)}, and later nothing is predicted")
    elif np.isnan(until) and dataset.sizes["layer"] > 1:
        middle.append("the network's loss is not given, so nobody knows how far the linearised task reaches")
    if not dataset.attrs["inputs_known"]:
        middle.append("inputs are taken as white: first growth does not depend on it, where and when it ends does")
    left = float((dataset["left_out"] * dataset["share"]).sum())
    if left > JUMP:
        middle.append(f"{left:.0%} of the loss lies in singular pairs that were left out of the simulation")
    level = "low" if low else "middle" if middle else "high"
    return Confidence(level, (*low, *middle))


def _is_told(chosen: xr.Dataset) -> bool:
    """Whether all draws come to the level within a factor of two."""
    return bool(np.isfinite(chosen["time_most"]) and chosen["time_most"] <= 2 * chosen["time_least"])


def _end(dataset: xr.Dataset) -> float:
    return float(dataset.attrs["horizon"])

"""The answers of a run, cell by cell: when it aligns, where its loss stops, and which start is best."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.levels import AT_ROUNDING, initial_losses
from lora_flow.results.phases import alignment_time, end_of_growth, fall_to, leading, second_leads
from lora_flow.results.report import cells

NEAR = 10**0.1  # the best alignment counts as reached within a tenth of a decade of it
TENTH = 0.1  # the last part of the time, by which a loss is told to fall or not
STILL = 0.01  # decades in that part, below which a loss is level
BEFORE = -np.inf  # a time before the first save: earlier than all that can be told
FAST = (1e-3, 1e-1, 0.5)  # of the loss at the start: the levels by which the fastest is told, the first that is reached
LOWEST, LEVEL, FALLING, RISING = "lowest possible", "level", "still falling", "rising"


@dataclasses.dataclass(frozen=True)
class Cell:
    """The lanes of one initialisation, side, alpha and rank on one problem: arrays over the seeds that finished.

    - `layer`: the one that aligns first, of which the next are; the first where theory does not say.
    - `best`, `best_at`, `error`: the least 1 - cos, when it is first near it, and its value at the last time.
    - `t_align`, `t1`: ends of the first two phases; infinite where one is not reached, NaN where it is not defined.
    - `loss`: at the last time; `rate`: decades by which it falls there per unit of time.
    - `endings`: for each seed one of the words above. `reached`: when the loss came to rounding, infinite where not.

    Times are minus infinity, `BEFORE`, where the first save is later.
    """

    where: Mapping[str, Any]
    seeds: int
    layer: int
    best: np.ndarray
    best_at: np.ndarray
    error: np.ndarray
    t_align: np.ndarray
    t1: np.ndarray
    loss: np.ndarray
    rate: np.ndarray
    endings: Sequence[str]
    reached: np.ndarray

    @property
    def ending(self) -> str:
        """The ending of most seeds; "failed" where none finished."""
        return max(self.endings, key=self.endings.count) if self.endings else "failed"


def answers(dataset: xr.Dataset) -> list[Cell]:
    """The answers of every cell, in the dataset's order."""
    error = leading(dataset, "alignment_error", "alignment_error_2")
    floor = rounding_floors(dataset)
    lowest = dataset.get("loss_floor", xr.full_like(floor, np.nan))
    two_layers = "sigma_w1" in dataset.coords
    spans = xr.Dataset(
        {
            "error": error,
            "t_align": alignment_time(dataset, BEFORE).where(error.notnull().any("time")),
            "t1": end_of_growth(dataset, BEFORE) if two_layers else xr.full_like(floor, np.nan),
            "reached": fall_to(dataset["loss"], floor, BEFORE),
            "second": second_leads(dataset) if two_layers else xr.DataArray(False),
        }
    )
    known = dataset[["loss", "status"]].assign(spans).assign(floor=floor, lowest=lowest)
    return [_cell(where, one) for where, one in cells(known)]


def _cell(where: Mapping[str, Any], one: xr.Dataset) -> Cell:
    one = one.transpose("seed", "time", ...)
    finished = np.flatnonzero(np.isfinite(one["loss"].isel(time=-1).values))
    time = one["time"].values

    def of_seeds(name: str) -> Any:
        return one[name].values[finished]

    loss, error = of_seeds("loss"), of_seeds("error")
    ends = [ending(time, *each) for each in zip(loss, of_seeds("floor"), of_seeds("lowest"), strict=True)]
    best = np.array([np.min(row[np.isfinite(row)], initial=np.inf) for row in error])
    best[np.isinf(best)] = np.nan
    near = np.array([_first(time, row <= NEAR * least) for row, least in zip(error, best, strict=True)])
    return Cell(
        where=where,
        seeds=one.sizes["seed"],
        layer=2 if bool(one["second"]) else 1,
        best=best,
        best_at=near,
        error=error[:, -1],
        t_align=of_seeds("t_align"),
        t1=of_seeds("t1"),
        loss=loss[:, -1],
        rate=np.array([rate for _, rate in ends]),
        endings=[word for word, _ in ends],
        reached=of_seeds("reached"),
    )


def _first(time: np.ndarray, there: np.ndarray) -> float:
    found = np.flatnonzero(there)
    return float(time[found[0]]) if found.size else np.nan


def ending(time: np.ndarray, loss: np.ndarray, floor: float, lowest: float) -> tuple[str, float]:
    """The ending of a loss, and the decades by which it then falls per unit of time.

    A loss is level where it changes by less than a hundredth of a decade in the last tenth of the time. A saddle looks
    the same. Where only one time was saved the rate is NaN, and the loss counts as level.
    """
    if not loss[-1] > floor:
        return AT_ROUNDING, np.nan
    if loss[-1] <= lowest * 1.001:
        return LOWEST, 0.0
    before = np.flatnonzero((time <= (1 - TENTH) * time[-1]) & (loss > 0))
    if not before.size:
        return LEVEL, np.nan
    i = before[-1]
    rate = float(np.log10(loss[i] / loss[-1]) / (time[-1] - time[i]))
    change = rate * TENTH * time[-1]
    return (FALLING if change > STILL else RISING if change < -STILL else LEVEL), rate


@dataclasses.dataclass(frozen=True)
class Best:
    """The best cells on one problem; the level that the fastest is told by is None where no cell reaches one."""

    problem: Mapping[str, Any]
    lowest: Cell
    at_rounding: int
    level: float | None
    share: float
    fastest: Cell | None
    time: float
    aligned: Cell | None


def best(dataset: xr.Dataset, found: Sequence[Cell]) -> list[Best]:
    """For every problem the cell with the lowest last loss, the fastest, and the best aligned; medians over seeds.

    Of several cells whose loss is at rounding, the first to reach rounding has the lowest loss. Problems without a
    finished lane are left out.
    """
    names = [str(dim) for dim in dataset["status"].dims if dim not in ("init", "side", "alpha", "rank", "seed")]
    groups: dict[Any, list[Cell]] = {}
    for cell in found:
        if cell.endings:
            groups.setdefault(tuple(cell.where[name] for name in names), []).append(cell)
    return [_best(dataset, dict(zip(names, key, strict=True)), group) for key, group in groups.items()]


def _best(dataset: xr.Dataset, problem: Mapping[str, Any], group: Sequence[Cell]) -> Best:
    there = [cell for cell in group if cell.ending == AT_ROUNDING]
    lowest = (
        min(there, key=lambda cell: middle(cell.reached)) if there else min(group, key=lambda cell: middle(cell.loss))
    )
    one = dataset.sel(problem)
    start = float(initial_losses(one).median())
    level, share, fastest, time = None, np.nan, None, np.nan
    for tried in FAST:
        times = [
            middle(fall_to(one["loss"].sel(_without(cell.where, problem, one)), tried * start, BEFORE).values)
            for cell in group
        ]
        if np.min(times) < np.inf:
            place = int(np.argmin(times))
            level, share, fastest, time = tried * start, tried, group[place], times[place]
            break
    aligned = [cell for cell in group if np.isfinite(cell.best).any()]
    top = min(aligned, key=lambda cell: middle(cell.best)) if aligned else None
    return Best(problem, lowest, len(there), level, share, fastest, time, top)


def _without(where: Mapping[str, Any], problem: Mapping[str, Any], one: xr.Dataset) -> dict[str, Any]:
    return {name: value for name, value in where.items() if name not in problem and name in one["loss"].dims}


def middle(values: np.ndarray) -> float:
    """The median, in which a time that is not reached, or not defined, counts as late; infinite where there is none."""
    values = np.asarray(values, float)
    return float(np.median(np.where(np.isnan(values), np.inf, values))) if values.size else np.inf

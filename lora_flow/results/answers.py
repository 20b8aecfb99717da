"""The answers of a run, cell by cell: when it aligns, where its loss stops, and which start is best."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.levels import AT_ROUNDING, initial_losses
from lora_flow.results.phases import (
    alignment_time,
    end_of_growth,
    fall_to,
    last_place,
    leading,
    of_alignment_time,
    of_end_of_growth,
    of_lanes,
    of_leading,
    second_leads,
)
from lora_flow.results.report import cells, problem_dims
from lora_flow.results.resolution import hides_less

NEAR = 10**0.1  # the best alignment counts as reached within a tenth of a decade of it
TENTH = 0.1  # the last part of the time, by which a loss is told to fall or not
STILL = 0.01  # decades in that part, below which a loss is level
BEFORE = -np.inf  # a time before the first save: earlier than all that can be told
FAST = (1e-3, 1e-1, 0.5)  # of the loss at the start: the levels by which the fastest is told, the first that is reached
LOWEST, LEVEL, FALLING, RISING = "lowest possible", "level", "still falling", "rising"
ENDINGS = (AT_ROUNDING, LOWEST, LEVEL, FALLING, RISING)


class OverSeeds(NamedTuple):
    """A number over the seeds that finished, as far as it is told.

    - `median`, `low`, `high`: of the finite values; NaN where there are none.
    - `reached`, `when`: of a time, the number of seeds that reach it, and the median of their times.
    - `middle`: the median of all, in which a time that is not reached, or not defined, counts as late; infinite where
      there is none.
    """

    median: float
    low: float
    high: float
    reached: int
    when: float
    middle: float

    @classmethod
    def of(cls, values: np.ndarray) -> OverSeeds:
        finite, reached = values[np.isfinite(values)], values[values < np.inf]
        low, high = (finite.min(), finite.max()) if finite.size else (np.nan, np.nan)
        return cls(_median(finite), float(low), float(high), reached.size, _median(reached), middle(values))


@dataclasses.dataclass(frozen=True)
class Cell:
    """The lanes of one initialisation, side, alpha and rank on one problem, as far as they finished.

    - `layer`: the one that aligns first, of which the next are; the first where theory does not say.
    - `best`, `best_at`, `error`: the least 1 - cos, when it is first near it, and its value at the last time.
    - `hidden`: whether 1 - cos of most seeds may be much less between two saves.
    - `t_align`, `t1`: ends of the first two phases; infinite where one is not reached, NaN where it is not defined.
    - `loss`: at the last time; `rate`: decades by which it falls there per unit of time, of seeds whose loss moves.
    - `endings`: the number of seeds with each of the words above, in the order of the seeds.
    - `reached`: when the loss came to rounding, infinite where not.
    - `start`: the first loss on this problem; `fast`: median times to FAST of it, of all lanes.

    Times are minus infinity, `BEFORE`, where the first save is later.
    """

    where: Mapping[str, Any]
    seeds: int
    layer: int
    best: OverSeeds
    best_at: OverSeeds
    error: OverSeeds
    hidden: bool
    t_align: OverSeeds
    t1: OverSeeds
    loss: OverSeeds
    rate: OverSeeds
    endings: Mapping[str, int]
    reached: OverSeeds
    start: float
    fast: Sequence[float]

    @property
    def ending(self) -> str:
        """The ending of most seeds; "failed" where none finished."""
        return max(self.endings, key=lambda word: self.endings[word]) if self.endings else "failed"


def answers(dataset: xr.Dataset) -> list[Cell]:
    """The answers of every cell, in the dataset's order."""
    start = initial_losses(dataset)
    start = start.median([dim for dim in start.dims if dim not in problem_dims(dataset)])
    known = dataset[needed(dataset)].assign(start=start)
    return [_cell(where, one) for where, one in cells(known, _lanes)]


def needed(dataset: xr.Dataset) -> list[str]:
    """The variables that the answers are read off."""
    names = [name for name in ("initial_loss", "rounding_floor", "loss_floor") if name in dataset]
    names += [*of_leading(dataset, "alignment_error", "alignment_error_2"), *of_alignment_time(dataset)]
    names += of_end_of_growth(dataset) if "sigma_w1" in dataset.coords else []
    return ["status", "loss", *names]


def _lanes(dataset: xr.Dataset) -> xr.Dataset:
    """What is told of each lane."""
    error, loss = leading(dataset, "alignment_error", "alignment_error_2"), dataset["loss"]
    floor, two_layers = rounding_floors(dataset), "sigma_w1" in dataset.coords
    lowest = dataset.get("loss_floor", xr.full_like(floor, np.nan))
    best = error.where(np.isfinite(error)).min("time")
    last = loss.isel(time=-1, drop=True)
    how, rate = endings(loss, floor, lowest)
    levels = {f"fast_{share:g}": fall_to(loss, share * dataset["start"], BEFORE) for share in FAST}
    return xr.Dataset(
        {
            "status": dataset["status"],
            "finished": np.isfinite(last),
            "best": best,
            "best_at": _first_time(error <= NEAR * best),
            "error": error.isel(time=-1, drop=True),
            "hidden": of_lanes(lambda rows: hides_less(rows, error["time"].values, rounding_of_errors(dataset)), error),
            "t_align": alignment_time(dataset, BEFORE).where(error.notnull().any("time")),
            "t1": end_of_growth(dataset, BEFORE) if two_layers else xr.full_like(floor, np.nan),
            "loss": last,
            "ending": how,
            "rate": rate,
            "reached": fall_to(loss, floor, BEFORE),
            "second": second_leads(dataset) if two_layers else xr.DataArray(False),
            "start": dataset["start"],
            **levels,
        }
    )


def _cell(where: Mapping[str, Any], one: xr.Dataset) -> Cell:
    finished = one["finished"].values
    how = one["ending"].values[finished]
    words, first, counts = np.unique(how, return_index=True, return_counts=True)
    moving = np.isin(how, [ENDINGS.index(FALLING), ENDINGS.index(RISING)])
    names = ("best", "best_at", "error", "t_align", "t1", "loss", "reached")
    return Cell(
        where=where,
        seeds=one.sizes["seed"],
        layer=2 if bool(one["second"]) else 1,
        endings={ENDINGS[words[i]]: int(counts[i]) for i in np.argsort(first)},
        rate=OverSeeds.of(one["rate"].values[finished][moving]),
        hidden=bool(np.mean(one["hidden"].values[finished]) >= 0.5) if finished.any() else False,
        start=float(one["start"]),
        fast=[middle(one[f"fast_{share:g}"].values) for share in FAST],
        **{name: OverSeeds.of(one[name].values[finished]) for name in names},
    )


def rounding_of_errors(dataset: xr.Dataset) -> float:
    """The alignment error below which one is only rounding."""
    return float(200 * np.finfo(dataset.attrs.get("dtype", "float64")).eps ** 2)


def _first_time(there: xr.DataArray) -> xr.DataArray:
    """The first time at which something is there; NaN where it never is."""
    time = there["time"].values

    def of_array(rows: np.ndarray) -> np.ndarray:
        return np.where(rows.any(axis=-1), time[rows.argmax(axis=-1)], np.nan)

    return xr.apply_ufunc(of_array, there, input_core_dims=[["time"]])


def endings(loss: xr.DataArray, floor: xr.DataArray, lowest: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """The ending of each loss over `time`, as its place in ENDINGS, and the decades it then falls per unit of time.

    A loss is level where it changes by less than a hundredth of a decade in the last tenth of the time. A saddle looks
    the same. Where only one time was saved the rate is NaN, and the loss counts as level.
    """
    time = loss["time"].values

    def of_arrays(rows: np.ndarray, floor: np.ndarray, lowest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        i = last_place((time <= (1 - TENTH) * time[-1]) & (rows > 0))
        before, last = np.take_along_axis(rows, np.maximum(i, 0)[:, None], axis=1)[:, 0], rows[:, -1]
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(i < 0, np.nan, np.log10(before / last) / (time[-1] - time[i]))
        change = rate * TENTH * time[-1]
        at_rounding, at_lowest = ~(last > floor), last <= lowest * 1.001
        words = (at_rounding, at_lowest, change > STILL, change < -STILL)
        places = [ENDINGS.index(word) for word in (AT_ROUNDING, LOWEST, FALLING, RISING)]
        how = np.select(words, places, ENDINGS.index(LEVEL)).astype(np.int8)
        return how, np.select((at_rounding, at_lowest), (np.nan, 0.0), rate)

    return of_lanes(of_arrays, loss, floor, lowest, results=2)


@dataclasses.dataclass(frozen=True)
class Best:
    """The best cells on one problem; the level that the fastest is told by is None where no cell reaches one.

    `hidden`: whether 1 - cos of any may be much less between two saves, so that another may be aligned best.
    """

    problem: Mapping[str, Any]
    lowest: Cell
    at_rounding: int
    level: float | None
    share: float
    fastest: Cell | None
    time: float
    aligned: Cell | None
    hidden: bool


def best(dataset: xr.Dataset, found: Sequence[Cell]) -> list[Best]:
    """For every problem the cell with the lowest last loss, the fastest, and the best aligned; medians over seeds.

    Of several cells whose loss is at rounding, the first to reach rounding has the lowest loss. Problems without a
    finished lane are left out.
    """
    names = problem_dims(dataset)
    groups: dict[Any, list[Cell]] = {}
    for cell in found:
        if cell.endings:
            groups.setdefault(tuple(cell.where[name] for name in names), []).append(cell)
    return [_best(dict(zip(names, key, strict=True)), group) for key, group in groups.items()]


def _best(problem: Mapping[str, Any], group: Sequence[Cell]) -> Best:
    there = [cell for cell in group if cell.ending == AT_ROUNDING]
    lowest = (
        min(there, key=lambda cell: cell.reached.middle) if there else min(group, key=lambda cell: cell.loss.middle)
    )
    level, share, fastest, time = None, np.nan, None, np.nan
    for tried, times in zip(FAST, zip(*(cell.fast for cell in group), strict=True), strict=True):
        if np.min(times) < np.inf:
            place = int(np.argmin(times))
            level, share, fastest, time = tried * group[place].start, tried, group[place], times[place]
            break
    aligned = [cell for cell in group if np.isfinite(cell.best.median)]
    top = min(aligned, key=lambda cell: cell.best.middle) if aligned else None
    hidden = any(cell.hidden for cell in aligned)
    return Best(problem, lowest, len(there), level, share, fastest, time, top, hidden)


def middle(values: np.ndarray) -> float:
    """The median, in which NaN counts as infinite; infinite where there is none."""
    return float(np.median(np.where(np.isnan(values), np.inf, values))) if values.size else np.inf


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if values.size else np.nan

"""What a page knows of a run: its axes, a row of numbers for every cell, and the quartiles of every curve."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from lora_flow.figures.style import quantiles
from lora_flow.pages.thinned import curves, shown_values
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.answers import Cell
from lora_flow.results.clock import at_the_end, clock
from lora_flow.results.phases import phases
from lora_flow.storage.blocks import blockwise

LEAST = 1e-37  # of a positive number in single precision
SHORT = {
    "alignment_error": "1 - cos, layer 1",
    "alignment_error_2": "1 - cos, layer 2",
    "norm_z1": "‖Z1‖",
    "norm_z2": "‖Z2‖",
}


def of_run(
    dataset: xr.Dataset, found: Sequence[Cell], thinned: Sequence[str] = (), whole: xr.Dataset | None = None
) -> dict[str, Any]:
    """A run over `time`, as a page's program reads it: lists, numbers and text.

    **Arguments:** the `dataset`, of which all curves are taken; the answers of its cells, `found` (of
    `lora_flow.results.answers`), in the order of the dataset; what was left out before, `thinned`; and where something
    was, the `whole` of these cells, with all quantities and saves, from which phases are told.

    The cells are in C order over `axes`. `curves` has for each cell, quantity, quartile (low, median, high) and save a
    number in single precision, as base64. Of a loss that is less than its rounding floor it has the floor.
    """
    names = curves(dataset)
    held = {"thinned": list(thinned), "curves": text_of(of_curves(dataset, names))}
    return outline(dataset, names) | of_cells(dataset, found, whole) | held


def outline(dataset: xr.Dataset, names: Sequence[str]) -> dict[str, Any]:
    """What a page knows of a run before it has seen any lane: axes, times, seeds, and what its quantities mean."""
    return {
        "axes": [
            {"name": dim, "about": dataset[dim].attrs.get("long_name", dim), "values": shown_values(dataset, dim)}
            for dim in axes_of(dataset)
        ],
        "time": [float(f"{time:.6g}") for time in dataset["time"].values],
        "clock": clock(dataset).axis,
        "seeds": dataset.sizes["seed"],
        "quantities": [_quantity(dataset, name) for name in names],
    }


def of_cells(dataset: xr.Dataset, found: Sequence[Cell], whole: xr.Dataset | None = None) -> dict[str, Any]:
    """What is told of every cell of a dataset in memory, given their answers `found`, cell by cell in its order.

    Of a dataset that lacks quantities or saves, `whole` has the same cells with all of them.
    """
    axes = axes_of(dataset)
    floor = rounding_floors(dataset).median("seed").transpose(*axes).values.ravel()
    return {
        "measures": [*_answers(dataset, found, floor), *_phases(dataset if whole is None else whole, axes)],
        "endings": [cell.ending for cell in found],
        "floor": _numbers(floor),
    }


def axes_of(dataset: xr.Dataset) -> list[str]:
    """The dims of the cells."""
    return [str(dim) for dim in dataset["status"].dims if dim != "seed"]


def of_curves(dataset: xr.Dataset, names: Sequence[str]) -> np.ndarray:
    """The quartiles of these variables over the seeds, `(cell, name, 3, time)`, in single precision."""
    found = [_quartiles(dataset, name) for name in names]
    return np.stack(found, axis=1).astype("<f4")


def text_of(values: np.ndarray) -> str:
    """Numbers in single precision, the lowest byte first, as base64."""
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def _quartiles(dataset: xr.Dataset, name: str) -> np.ndarray:
    values, floor = dataset[name].transpose(*axes_of(dataset), "seed", "time"), None
    if name == "loss":
        floor = float(rounding_floors(dataset).median())
        floor = None if math.isnan(floor) else floor
    log = _is_positive(values)
    found = np.moveaxis(quantiles(values, log, floor), 0, -2).reshape(-1, 3, dataset.sizes["time"])
    return np.where(found < LEAST, 0.0, found) if log else found


def _is_positive(values: xr.DataArray) -> bool:
    least = blockwise(lambda one: one.min(("seed", "time")), values.to_dataset(name="_least"), ("seed", "time"))
    return not bool((least["_least"] < 0).any())


def _quantity(dataset: xr.Dataset, name: str) -> dict[str, Any]:
    attrs = dataset[name].attrs
    short, about = str(attrs.get("long_name", name)), str(attrs.get("comment", ""))
    return {"name": name, "label": SHORT.get(name, short), "about": f"{short}: {about}" if about else short}


def _measure(name: str, label: str, values: Sequence[float] | np.ndarray, log: bool = False) -> dict[str, Any]:
    return {"name": name, "label": label, "log": log, "values": _numbers(values)}


def _answers(dataset: xr.Dataset, found: Sequence[Cell], floor: np.ndarray) -> list[dict[str, Any]]:
    """What `report.md` tells of every cell, medians over seeds; a loss at rounding is told as its floor."""
    losses = [cell.loss.median for cell in found]
    end, since = at_the_end(dataset), clock(dataset).at.rstrip(" =")
    timed = "sigma_w1" in dataset.coords
    return [
        _measure("loss", f"loss at {end}", np.fmax(losses, np.where(np.isnan(losses), np.nan, floor)), log=True),
        _measure("best", "least 1 - cos", [cell.best.median for cell in found], log=True),
        _measure("best_at", f"aligned from {since}", [cell.best_at.when for cell in found]),
        _measure("t_align", "t_align", [cell.t_align.when for cell in found]),
        *([_measure("t1", "T1", [cell.t1.when for cell in found])] if timed else []),
        _measure("fast", f"{since} at half the first loss", [cell.fast[-1] for cell in found]),
    ]


def _phases(dataset: xr.Dataset, axes: Sequence[str]) -> list[dict[str, Any]]:
    """The start of the slow tail, and theory's T1 where it predicts one."""
    if "sigma_w1" not in dataset.coords:
        return []
    spans = phases(dataset)
    known = spans["aligned"].astype(bool) & (spans["shift_rank"] == 1)
    told = {
        "t_plateau": ("slow tail from", spans["t_plateau"]),
        "t1_predicted": ("T1 predicted", spans["t1_predicted"].where(known)),
    }
    return [
        _measure(name, label, values.median("seed").transpose(*axes).values.ravel())
        for name, (label, values) in told.items()
    ]


def _numbers(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """Four digits are enough for a page; null is what is not reached, or not known."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]

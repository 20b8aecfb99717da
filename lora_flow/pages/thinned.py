"""Large results on a page of bounded size: fewer quantities, saves and values of the longest axes, and a word on it."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

from lora_flow.results.report import show

MOST = 300_000  # numbers in the curves of a page: 1.6 MB as text
MAIN = ("loss", "distance", "alignment_error", "alignment_error_2", "norm_z1", "norm_z2")
LONG = 101  # saves that a curve keeps, where there are too many numbers


def curves(dataset: xr.Dataset) -> list[str]:
    """The names of the variables that have a curve in every cell, the main ones first."""
    over = {*map(str, dataset["status"].dims), "time"}
    found = [str(name) for name, values in dataset.data_vars.items() if set(map(str, values.dims)) == over]
    return sorted(found, key=lambda name: (MAIN.index(name) if name in MAIN else len(MAIN), name))


def thinned(dataset: xr.Dataset, most: int = MOST) -> tuple[xr.Dataset, list[str]]:
    """The dataset with so few curves that all quartiles over seeds are at most `most` numbers, and what was left out.

    Nothing is left out of a small one. What is left of an axis is spread over it, its first and last value among them.
    """
    names, words = curves(dataset), []
    axes = [str(dim) for dim in dataset["status"].dims if dim != "seed"]

    def size() -> int:
        return 3 * len(names) * dataset.sizes["time"] * math.prod(dataset.sizes[dim] for dim in axes)

    if size() > most and (main := [name for name in names if name in MAIN]) and len(main) < len(names):
        words.append(f"{len(main)} of {len(names)} quantities")
        names = main
    if size() > most and dataset.sizes["time"] > LONG:
        words.append(f"{LONG} of {dataset.sizes['time']} saves")
        dataset = dataset.isel(time=_spread(dataset.sizes["time"], LONG))
    before = dict(dataset.sizes)
    while size() > most and max(dataset.sizes[dim] for dim in axes) > 1:
        longest = max(axes, key=lambda dim: dataset.sizes[dim])
        kept = max(1, dataset.sizes[longest] * 3 // 4)
        dataset = dataset.isel({longest: _spread(dataset.sizes[longest], kept)})
    words += [
        f"{dataset.sizes[dim]} of {before[dim]} values of {dim}" for dim in axes if dataset.sizes[dim] < before[dim]
    ]
    left_out = set(curves(dataset)) - set(names)
    return dataset.drop_vars(left_out), words


def shown_values(dataset: xr.Dataset, axis: str) -> list[str]:
    """The values of an axis as people write them."""
    return [f"{value:g}" if isinstance(value, float) else show(value) for value in dataset[axis].values.tolist()]


def _spread(count: int, kept: int) -> np.ndarray:
    return np.unique(np.round(np.linspace(0, count - 1, kept)).astype(int))

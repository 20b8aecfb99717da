"""What is read off the plane of (sqrt(s) std, sqrt(s) eta): where along a line the loss is least, and how flat it is.

A plane is an array over `size`, `step`, `rank` and `seed`. At a learning rate `lora_alpha` moves along a diagonal, and
at a scaling the learning rate moves up and down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from lora_flow.results.report import log10

SIZE = 64
STD = 1 / np.sqrt(3 * SIZE)  # of PEFT's A, uniform between -1/sqrt(n) and 1/sqrt(n)
GRID = 4  # points a decade, of both axes
BELOW, LEAST_STEP = 2, -4.5  # places of a size below STD, and log10 of the least step
SIZES = STD * 10.0 ** ((np.arange(11) - BELOW) / GRID)
STEP_SIZES = 10.0 ** (LEAST_STEP + np.arange(17) / GRID)
FORGIVEN = 1.1  # losses up to so many times the least one count as the least
HIGHEST = 3.0  # log10 of a loss, where a run diverges


def at_rate(plane: xr.DataArray, rate: float) -> xr.DataArray:
    """The plane along a diagonal, where eta is `rate`, one of the grid's, and `lora_alpha` moves; over `size`."""
    places = np.arange(len(SIZES)) - BELOW + round(GRID * (np.log10(rate) - LEAST_STEP))
    inside = (places >= 0) & (places < len(STEP_SIZES))
    chosen = xr.DataArray(places[inside], dims="size")
    return plane.isel(size=np.flatnonzero(inside), step=chosen).drop_vars("step")


def at_scaling(plane: xr.DataArray, scaling: float) -> xr.DataArray:
    """The logarithm of the plane where s is `scaling` and eta moves, interpolated; over `step`."""
    logs = log10(plane).clip(max=HIGHEST)
    logs = logs.assign_coords(size=np.log10(SIZES))
    return logs.interp(size=np.log10(STD) + np.log10(scaling) / 2)


class Best(NamedTuple):
    """The place of a least value, NaN at the ends, and how far below and above it all values are as good."""

    place: float
    low: float
    high: float


def least(places: np.ndarray, logs: np.ndarray) -> Best:
    """By a parabola through three points; what is at most `FORGIVEN` times the least value is as good."""
    lowest = int(np.argmin(logs))
    fine = np.linspace(places[0], places[-1], 100 * (len(places) - 1) + 1)
    worse = fine[np.interp(fine, places, logs) > logs[lowest] + np.log10(FORGIVEN)]
    low = max(worse[worse < places[lowest]], default=fine[0])
    high = min(worse[worse > places[lowest]], default=fine[-1])
    if not 0 < lowest < len(logs) - 1:
        return Best(np.nan, low, high)
    before, at, after = logs[lowest - 1 : lowest + 2]
    bend, gap = before - 2 * at + after, places[1] - places[0]
    shift = 0.5 * (before - after) / bend if np.isfinite(bend) and bend > 0 else 0.0
    return Best(float(places[lowest] + gap * shift), low, high)


def best_alphas(plane: xr.DataArray, rate: float) -> xr.Dataset:
    """log10 of the best `lora_alpha` at a rate over rank and seed, from where to where it is as good, and p."""
    curves = log10(at_rate(plane, rate)).clip(max=HIGHEST)
    scalings = 2 * np.log10(curves["size"].values / STD)
    found = [
        [least(scalings, curves.sel(rank=rank, seed=seed).values) for seed in curves["seed"]] for rank in curves["rank"]
    ]
    logs = np.log10(curves["rank"].values)
    best = dict(zip(Best._fields, np.moveaxis(np.array(found), -1, 0) + logs[:, None], strict=True))
    each = {name: (("rank", "seed"), values) for name, values in best.items()}
    return xr.Dataset(each | {"p": ("seed", slopes(logs, best["place"]))})


def best_rates(plane: xr.DataArray, scaling_of: Callable[[Any], Any]) -> tuple[np.ndarray, np.ndarray]:
    """log10 of the best eta where s is a function of the rank, `(rank, seed)`, and its exponent of it, `(seed,)`."""
    found, ranks = [], plane["rank"].values
    for rank in ranks:
        scaling = float(scaling_of(rank))
        curves = at_scaling(plane.sel(rank=rank), scaling)
        rates = np.log10(STEP_SIZES) - np.log10(scaling) / 2
        found.append([least(rates, curves.sel(seed=seed).values).place for seed in curves["seed"]])
    return np.array(found), slopes(np.log10(ranks), np.array(found))


def slopes(x: np.ndarray, y: np.ndarray) -> Any:
    """Least squares over the first axis, a number for one of it; NaN where a value is missing."""
    x = x - x.mean()
    return x @ (y - y.mean(axis=0)) / (x @ x)

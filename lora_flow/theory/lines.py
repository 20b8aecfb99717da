"""What a claim is made of: cases with their verdicts, and the estimates behind them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from lora_flow.theory.evidence import DELTA_W, SIDES, Evidence

PAPER = "Xu et al."


@dataclasses.dataclass(frozen=True)
class Case:
    """One number against its prediction; `half_width` of a 95% interval over seeds where there is one."""

    where: str
    predicted: float
    measured: float
    half_width: float | None
    holds: bool | None  # None where the claim does not apply


@dataclasses.dataclass(frozen=True)
class Line:
    """A claim: where it is from, what it says, the cases it was tried on, and the runs behind them.

    `relation` is what the measured number must be to the predicted one: "=", ">=" or "<=".
    """

    source: str
    statement: str
    runs: str
    cases: tuple[Case, ...]
    relation: str = "="

    @property
    def verdict(self) -> str:
        tried = [case.holds for case in self.cases if case.holds is not None]
        if not tried:
            return "not applicable"
        return "holds" if all(tried) else f"fails ({sum(not holds for holds in tried)} of {len(tried)})"


Claim = Callable[[Evidence], Line]
Quantity = Callable[[xr.Dataset], xr.DataArray]
Exponent = Callable[[Any], Any]  # of delta_w

ENTERED: dict[str, Claim] = {}


def claim(function: Claim) -> Claim:
    """Enters a claim: a function of the evidence that returns one line."""
    ENTERED[function.__name__] = function
    return function


def near(where: str, predicted: float, values: Any, within: float) -> Case:
    """The mean over seeds is the prediction, to an absolute tolerance."""
    mean, width = estimate(values)
    return Case(where, float(predicted), mean, width, bool(abs(mean - predicted) <= within))


def at_least(where: str, predicted: float, values: Any) -> Case:
    """The mean over seeds is at least the prediction, its whole interval included."""
    mean, width = estimate(values)
    return Case(where, float(predicted), mean, width, bool(mean - width >= predicted))


def of_all(where: str, predicted: float, measured: float, holds: bool | np.bool_) -> Case:
    """The worst of all runs and times, without an interval; NaN, a run without the quantity, fails."""
    return Case(where, float(predicted), float(measured), None, bool(holds) and not np.isnan(measured))


def estimate(values: Any) -> tuple[float, float]:
    """Mean over seeds, and half the width of its 95% interval (Student's t)."""
    values = np.ravel(np.asarray(values, float))
    width = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(width)


def slope(values: xr.DataArray, over: xr.DataArray) -> xr.DataArray:
    """d log(values) / d log(over) by least squares over alpha, seed by seed; NaN where a value is missing."""
    x, y = log(over), log(values)
    x, y = x - x.mean("alpha", skipna=False), y - y.mean("alpha", skipna=False)
    return (x * y).sum("alpha", skipna=False) / (x**2).sum("alpha", skipna=False)


def log(values: xr.DataArray) -> xr.DataArray:
    return xr.apply_ufunc(np.log, values)


def case_name(delta_w: float, side: str | None = None, alpha: float | None = None) -> str:
    parts = [f"delta_w = {delta_w:.3g}"]
    return ", ".join(parts + ([f"side {side}"] if side else []) + ([f"alpha = {alpha:.3g}"] if alpha else []))


def each_setting(dataset: xr.Dataset) -> Iterator[tuple[float, str, xr.Dataset]]:
    """Every delta_w and side, with its runs."""
    for delta_w in DELTA_W:
        for side in SIDES:
            yield delta_w, side, dataset.sel(delta_w=delta_w, side=side)


def sine2(error: xr.DataArray) -> xr.DataArray:
    """1 - cos^2 from 1 - cos."""
    return error * (2 - error)


def frobenius2(dataset: xr.Dataset, layer: int) -> xr.DataArray:
    """||Z_i||_F^2."""
    return dataset[f"norm_along{layer}"] ** 2 + dataset[f"norm_across{layer}"] ** 2

"""What a claim is made of: cases with their verdicts, and the estimates behind them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from lora_flow.claims.lora_runs import DELTA_W, SIDES, Evidence

PAPER = "Xu et al."


@dataclasses.dataclass(frozen=True)
class Case:
    """One number against its prediction; `half_width` of a 95% interval over seeds where there is one.

    `holds` is None where the claim does not apply. A case is not `decided` where its interval is too wide to tell.
    `counted` says of how many runs the number is, and of how many there are, where not all of them count.
    """

    where: str
    predicted: float
    measured: float
    half_width: float | None
    holds: bool | None
    decided: bool = True
    counted: tuple[int, int] | None = None

    @property
    def verdict(self) -> str:
        if self.holds is None:
            return "not applicable"
        return "undecided" if not self.decided else "yes" if self.holds else "no"


@dataclasses.dataclass(frozen=True)
class Line:
    """A claim: where it is from, what it says, the cases it was tried on, and the runs behind them.

    `relation` is what the measured number must be to the predicted one: "=", ">=" or "<=". An `identity` follows from
    what the code's own definitions are: that it holds tests the code and its rounding, and says nothing of theory.
    """

    source: str
    statement: str
    runs: str
    cases: tuple[Case, ...]
    relation: str = "="
    identity: bool = False

    @property
    def verdict(self) -> str:
        tried = [case.verdict for case in self.cases if case.holds is not None]
        if not tried:
            return "not applicable"
        for verdict, word in (("no", "fails"), ("undecided", "undecided")):
            if verdict in tried:
                return f"{word} ({tried.count(verdict)} of {len(tried)})"
        return "holds (identity)" if self.identity else "holds"

    @property
    def counted(self) -> str:
        """How many of the runs stand behind the line, "" where all do."""
        counts = [case.counted for case in self.cases if case.counted is not None]
        some, all_of_them = (sum(count[i] for count in counts) for i in (0, 1))
        return f"{some} of {all_of_them} runs count" if some < all_of_them else ""


Claim = Callable[[Evidence], Line]
Quantity = Callable[[xr.Dataset], xr.DataArray]
Exponent = Callable[[Any], Any]  # of delta_w

ENTERED: dict[str, Claim] = {}


def claim(function: Claim) -> Claim:
    """Enters a claim: a function of the evidence that returns one line."""
    ENTERED[function.__name__] = function
    return function


def by_construction(function: Claim) -> Claim:
    """Marks a claim that follows from the code's own definitions, see `Line`."""

    @functools.wraps(function)
    def marked(evidence: Evidence) -> Line:
        return dataclasses.replace(function(evidence), identity=True)

    return marked


def near(where: str, predicted: float, values: Any, within: float) -> Case:
    """The mean over seeds is the prediction, to an absolute tolerance."""
    return between(where, predicted, values, predicted - within, predicted + within)


def between(where: str, predicted: float, values: Any, low: float, high: float) -> Case:
    """The mean over seeds lies in a range; undecided where its interval is wider than the range and meets it."""
    mean, width = estimate(values)
    inside, meets = low <= mean <= high, low - width <= mean <= high + width
    decided = not meets or width <= (high - low) / 2
    return Case(where, float(predicted), mean, width, bool(inside), bool(decided))


def at_least(where: str, predicted: float, values: Any) -> Case:
    """The mean over seeds is at least the prediction, with its whole interval; undecided where that is within it."""
    mean, width = estimate(values)
    return Case(where, float(predicted), mean, width, bool(mean - width >= predicted), _apart(mean, width, predicted))


def at_most(where: str, predicted: float, values: Any) -> Case:
    """The same from above."""
    mean, width = estimate(values)
    return Case(where, float(predicted), mean, width, bool(mean + width <= predicted), _apart(mean, width, predicted))


def _apart(mean: float, width: float, bound: float) -> bool:
    return not mean - width < bound < mean + width


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

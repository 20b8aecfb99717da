"""Several draws in one curve: their median, and a band between their quartiles."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import xarray as xr

ZERO = 1e-40  # stands in for an exact zero on a logarithmic axis
QUARTILES = (0.25, 0.5, 0.75)


def quartiles(values: xr.DataArray, log: bool, floor: float | None = None) -> np.ndarray:
    """Lower quartile, median and upper quartile over `seed`, `(3, x)`; lanes that failed are left out.

    Quartiles are values of draws, or lie between two neighbouring ones, so they stay within the quantity's range; a
    mean plus or minus a standard deviation may not. Between two draws they are interpolated in the logarithm for a
    logarithmic axis. A value below `floor` counts as `floor`.
    """
    shown = values.transpose("seed", ...)
    if floor is not None:
        shown = shown.clip(min=floor)
    if log:
        shown = xr.apply_ufunc(np.log10, shown.clip(min=ZERO))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)  # no draw has finished: nothing is drawn
        found = shown.quantile(QUARTILES, "seed", skipna=True).values
    return 10**found if log else found


def band(values: xr.DataArray, ax: Any, floor: float | None = None, **style: Any) -> None:
    """The median over seeds as a line and the quartiles as a band, over the other dimension."""
    (along,) = (dim for dim in values.dims if dim != "seed")
    low, middle, high = quartiles(values, ax.get_yscale() == "log", floor)
    x = values[along].values
    ax.plot(x, middle, **style)
    ax.fill_between(x, low, high, color=style.get("color"), alpha=0.25, linewidth=0)
    end = max(x[-1], ax.get_xlim()[1]) if ax.lines[:-1] else x[-1]
    if end > x[0]:
        ax.set_xlim(x[0], end)


def mark_rounding(ax: Any, floor: float) -> None:
    """A line at the rounding floor where a curve comes down to it; the axes end below it."""
    shown = [np.asarray(line.get_ydata(), float) for line in ax.lines]
    lowest = min((float(np.nanmin(y)) for y in shown if np.isfinite(y).any()), default=np.inf)
    if lowest > 1.01 * floor:
        return
    ax.axhline(floor, color="0.45", linestyle=":", linewidth=0.9, zorder=0.5)
    ax.annotate(
        "rounding", (0.0, floor), xycoords=("axes fraction", "data"), xytext=(3, -2), textcoords="offset points",
        va="top", fontsize="x-small", color="0.35",
    )  # fmt: skip
    ax.set_ylim(bottom=floor / 1e3)

"""The picture of a fit: the curves with the model, what is left between them, and the profile likelihoods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from lora_flow.figures.style import BLUE, ORANGE, letters, panels, shades
from lora_flow.results.given import require_dataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 6  # curves that are drawn


def fit_figure(dataset: xr.Dataset) -> Figure:
    """A fit: the losses and the model, their distance in units of the error, and a profile for each parameter.

    **Returns:** a `matplotlib.figure.Figure`. **Raises:** `InputError` for a dataset that is not `fit`'s.
    """
    require_dataset(dataset, "fit_figure", "loss", "fitted", "used", "profile_value", "profile_deviance")
    names = [str(name) for name in dataset["parameter"].values]
    rows = 1 + -(-len(names) // 2)
    with panels(rows, 2, height=2.1 * rows) as (figure, axes):
        _curves(dataset, axes[0, 0])
        _residuals(dataset, axes[0, 1])
        profiles = axes[1:].ravel()
        for ax, name in zip(profiles, names, strict=False):
            _profile(dataset.sel(parameter=name), ax, name)
        for ax in profiles[len(names) :]:
            ax.set_visible(False)
        letters(axes.ravel()[: 2 + len(names)])
    return figure


def _curves(dataset: xr.Dataset, ax: Axes) -> None:
    times = dataset["time"].values
    for i, colour in enumerate(shades(min(dataset.sizes["curve"], MOST), until=0.7)):
        one = dataset.isel(curve=i)
        used = one["used"].values.astype(bool)
        ax.plot(
            times[used], one["loss"].values[used], ".", color=colour, markersize=3, label="observed" if i == 0 else None
        )
        if not used.all():
            ax.plot(
                times[~used], one["loss"].values[~used], ".", color="0.75", markersize=3,
                label="left out" if i == 0 else None,
            )  # fmt: skip
        fitted = one["fitted"].where(one["used"] == 1).values
        ax.plot(times, fitted, color=ORANGE, linewidth=1.0, label="fitted" if i == 0 else None)
    ax.set(yscale="log", xlabel="time or step", ylabel="loss", title="curve and fit")
    ax.legend()


def _residuals(dataset: xr.Dataset, ax: Axes) -> None:
    with np.errstate(divide="ignore"):  # what is left out may be fitted by 0
        distance = np.log(dataset["loss"].values) - np.log(dataset["fitted"].values)
    off = np.where(dataset["used"].values == 1, 100 * distance, np.nan)
    for i, colour in enumerate(shades(min(dataset.sizes["curve"], MOST), until=0.7)):
        ax.plot(dataset["time"].values, off[i], ".", color=colour, markersize=3)
    taken = 100 * dataset["uncertainty"].isel(curve=0).values
    known = np.isfinite(taken)
    times, taken = dataset["time"].values[known], taken[known]
    ax.fill_between(times, -taken, taken, color=ORANGE, alpha=0.2, linewidth=0)
    ax.axhline(0.0, color="0.25", linewidth=0.6)
    ax.set(xlabel="time or step", ylabel="%", title="observed over fitted, and its uncertainty")


def _profile(one: xr.Dataset, ax: Axes, name: str) -> None:
    from scipy.stats import chi2

    value, deviance = one["profile_value"].values, one["profile_deviance"].values
    known = np.isfinite(value)
    wanted = float(chi2(1).ppf(one.attrs["level"]))
    value, deviance = value[known], deviance[known]
    shown = deviance <= 4 * wanted
    value, deviance = value[shown], deviance[shown]
    signed = np.sqrt(deviance) * np.sign(value - float(one["estimate"]))  # nearly a line, so that few points are enough
    along = np.geomspace(value.min(), value.max(), 200)
    ax.plot(along, np.interp(np.log(along), np.log(value), signed) ** 2, color=BLUE)
    ax.plot(value, deviance, ".", color=BLUE, markersize=4)
    ax.axhline(wanted, color="0.25", linewidth=0.6, linestyle="--")
    low, high = float(one["low"]), float(one["high"])
    ax.axvspan(max(low, value.min()), min(high, value.max()), color=BLUE, alpha=0.12, linewidth=0)
    ax.axvline(float(one["estimate"]), color="0.25", linewidth=0.6)
    if value.max() / value.min() > 4:
        ax.set_xscale("log")
    ax.set(title=name, xlabel=name, ylim=(0, 2 * wanted))
    if ax.get_subplotspec().colspan.start == 0:  # type: ignore[union-attr]
        ax.set_ylabel("deviance")

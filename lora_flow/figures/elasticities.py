"""Pictures of sensitivities: which parameter matters most, and where."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from lora_flow.figures.maps import plot_map
from lora_flow.figures.style import BLUE, GREEN, ORANGE, PURPLE, letters, panels
from lora_flow.results.given import require_dataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
MOST = 12  # panels
TITLES = {"log10 loss": "loss", "log10 alignment_error": r"alignment error $1-\cos$", "t1": r"$T_1$"}


def tornado(dataset: xr.Dataset) -> Figure:
    """Elasticities as bars, the largest on top: medians over lanes, with lines from quartile to quartile.

    A panel for each quantity, a colour for each initialisation.
    """
    require_dataset(dataset, "tornado", "elasticity", "at")
    observables = [str(one) for one in dataset["observable"].values][:MOST]
    rows = math.ceil(len(observables) / 2)
    columns = min(2, len(observables))
    inits, names = dataset["init"].values, dataset["parameter"].values
    height = rows * (0.9 + 0.16 * len(names) * (len(inits) + 0.6))
    with panels(rows, columns, height=height) as (figure, axes):
        for ax, observable in zip(axes.flat, observables, strict=False):
            over = dataset["elasticity"].sel(observable=observable)
            known = over.where(np.isfinite(over))
            order = np.argsort(abs(_quantile(known, 0.5)), kind="stable")
            for i, (init, colour) in enumerate(zip(inits, COLOURS * len(inits), strict=False)):
                place = np.arange(len(names)) + 0.8 * ((len(inits) - 1) / 2 - i) / len(inits)
                low, middle, high = (_quantile(known.sel(init=init), q)[order] for q in (0.25, 0.5, 0.75))
                ax.barh(place, middle, height=0.75 / len(inits), color=colour, label=str(init))
                ax.hlines(place, low, high, color="0.25", linewidth=0.9)
            if not np.isfinite(over).any():
                ax.text(0.5, 0.5, "no lane has it", transform=ax.transAxes, ha="center", va="center", color="0.4")
            ax.axvline(0.0, color="0.25", linewidth=0.6)
            ax.set_yticks(range(len(names)), names[order])
            at = float(dataset["at"].sel(observable=observable).min())
            when = f" at t = {at:.3g}" if observable.startswith("log10") else ""
            ax.set(title=f"{TITLES.get(observable, observable)}{when}", xlabel="% for 1 % of the parameter")
        for ax in axes.flat[len(observables) :]:
            ax.set_visible(False)
        if len(inits) > 1:
            handles, labels = axes.flat[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=4)
        letters(axes)
    return figure


def elasticity_maps(dataset: xr.Dataset) -> Figure | None:
    """The first quantity's elasticities over alpha and rank, a panel for each parameter; None without such a grid."""
    if dataset.sizes["alpha"] < 2 or dataset.sizes["rank"] < 2:
        return None
    first = dataset.isel(observable=0, init=0)
    known = first["elasticity"].where(np.isfinite(first["elasticity"])).mean(["side", "seed"])
    names = dataset["parameter"].values[:3]
    title = TITLES.get(str(first["observable"].item()), str(first["observable"].item()))
    with panels(1, len(names), height=2.5) as (figure, axes):
        for ax, name in zip(axes[0], names, strict=True):
            plot_map(known.sel(parameter=name), ax, f"{title} by {name}")
        letters(axes)
    return figure


def _quantile(values: xr.DataArray, q: float) -> np.ndarray:
    """A quantile over all but the parameters, 0 where no lane has the quantity."""
    rows = values.transpose("parameter", ...).values.reshape(values.sizes["parameter"], -1)
    return np.array([np.quantile(row[np.isfinite(row)], q) if np.isfinite(row).any() else 0.0 for row in rows])

"""Pictures of searches for starts: the objective over the steps, and the angles to the gradient's singular vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from lora_flow.figures.style import BLUE, GREEN, ORANGE, PURPLE, letters, panels
from lora_flow.results.given import require_dataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = (BLUE, ORANGE, GREEN, PURPLE)


def learned_start(dataset: xr.Dataset, others: Mapping[str, float] | None = None) -> Figure:
    """A search: the objective of every restart over the steps, the angles to the spectral span, and the norm's shares.

    Angles are the largest principal ones between a factor's leading singular vectors and those of the gradient; lines
    are medians over restarts, bands go from quartile to quartile. `others` are the objectives of other starts, by name.
    """
    require_dataset(dataset, "learned_start", "objective", "angle", "share")
    steps = dataset["step"].values
    with panels(1, 3, height=2.7) as (figure, axes):
        first, second, third = axes[0]
        for i, restart in enumerate(dataset["restart"].values):
            each = {"color": "0.6", "linewidth": 0.7, "label": "each search" if i == 0 else None}
            first.plot(steps, dataset["objective"].sel(restart=restart), **each)
        first.plot(steps, dataset["objective"].median("restart"), color="0.1", label="learned, median")
        for (name, value), colour in zip((others or {}).items(), COLOURS * len(others or {}), strict=False):
            first.axhline(value, color=colour, linestyle="--", label=name)
        first.set(title=str(dataset.attrs["objective"]), xlabel="step")
        handles, names = first.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names))
        factors = [(layer, factor) for layer in dataset["layer"].values for factor in dataset["factor"].values]
        for (layer, factor), colour in zip(factors, COLOURS * len(factors), strict=False):
            one = dataset.sel(layer=layer, factor=factor)
            label = f"${factor}_{layer}$"
            _quartiles(steps, one["angle"].max("pair").values, second, colour, label)
            _quartiles(steps, one["share"].values, third, colour, label)
        second.set(title="angle to the spectral span", xlabel="step", ylabel="degrees", ylim=(0, 90))
        third.set(title="share of the squared norm", xlabel="step", ylim=(0, 1))
        third.legend(ncols=2, fontsize="x-small")
        letters(axes)
    return figure


def _quartiles(steps: np.ndarray, values: np.ndarray, ax: object, colour: str, label: str) -> None:
    """Of values `(restart, step)` the median and quartiles over restarts."""
    known = values[:, np.isfinite(values).all(axis=0)]
    if known.shape[1]:
        low, middle, high = np.quantile(known, (0.25, 0.5, 0.75), axis=0)
        at = steps[np.isfinite(values).all(axis=0)]
        ax.plot(at, middle, color=colour, label=label)  # type: ignore[attr-defined]
        ax.fill_between(at, low, high, color=colour, alpha=0.25, linewidth=0)  # type: ignore[attr-defined]

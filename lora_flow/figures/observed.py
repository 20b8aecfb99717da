"""The picture of a PEFT run: alignment, norms, spectrum, drift, and predicted beside measured steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from lora_flow.bridge.forecast import ALIGNED
from lora_flow.figures.style import BLUE, ORANGE, Mark, keys, letters, panels, shades
from lora_flow.results.given import require_dataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 8  # layers that a legend names


def observed_figure(dataset: xr.Dataset) -> Figure:
    """A PEFT run over its steps, a line a layer; predictions are dashed.

    **Returns:** a `matplotlib.figure.Figure`. **Raises:** `InputError` for a dataset that is not `peft_observe`'s.
    """
    require_dataset(dataset, "observed_figure", "update_error", "norm_b", "singular_value", "drift", "effective_rank")
    with panels(2, 3, height=4.8) as (figure, axes):
        _over_steps(dataset, axes[0, 0], "update_error", "1 - cos of the update's top pair", log=True)
        axes[0, 0].axhline(ALIGNED, color="0.25", linewidth=0.6, linestyle=":")
        _over_steps(dataset, axes[0, 1], "norm_b", "norm of B", log=True)
        _spectrum(dataset, axes[0, 2])
        _over_steps(dataset, axes[1, 0], "effective_rank", "effective rank of the update")
        _over_steps(dataset, axes[1, 1], "drift", "drift of A A$^T$ - B$^T$B over ||Z||$^2$", log=True)
        axes[1, 1].axhline(dataset.attrs["drift_limit"], color=ORANGE, linewidth=0.8, linestyle="--")
        if "t_update_predicted" in dataset:
            _steps(dataset, axes[1, 2])
        else:
            _over_steps(dataset, axes[1, 2], "imbalance", "||A A$^T$ - B$^T$B||", log=True)
        letters(axes)
        figure.legend(handles=keys(_marks(dataset)), loc="outside lower center", ncols=3)
    return figure


def _marks(dataset: xr.Dataset) -> list[Mark]:
    """The colour of each layer, or of the first and the last, and what is dashed."""
    names = dataset["layer"].values[np.argsort(dataset["sigma"].values)]
    colours: Any = shades(len(names))
    marks = [Mark(str(name), {"color": colour}) for name, colour in zip(names, colours, strict=True)]
    if len(marks) > NAMED:
        ends = (("smallest", colours[0]), ("largest", colours[-1]))
        marks = [Mark(f"{what} singular value of the direction", {"color": colour}) for what, colour in ends]
    return [*marks, Mark("predicted", {"color": "0.3", "linestyle": "--"})] if "told_until" in dataset else marks


def _over_steps(dataset: xr.Dataset, ax: Axes, name: str, title: str, log: bool = False) -> None:
    """A line for each layer, the darker the smaller its singular value of the direction."""
    steps, order = dataset["step"].values, np.argsort(np.argsort(dataset["sigma"].values))
    colours: Any = shades(len(order))
    for i, place in enumerate(order):
        look = {"color": colours[place], "linewidth": 1.0, "marker": "." if len(steps) == 1 else None}
        for shown, dashes in ((name, "-"), (f"{name}_predicted", "--")):
            if shown in dataset:
                values = dataset[shown].values[i]
                ax.plot(steps, np.where(values > 0, values, np.nan) if log else values, linestyle=dashes, **look)
    ax.set(xlabel="step", title=title, yscale="log" if log else "linear")


def _spectrum(dataset: xr.Dataset, ax: Axes) -> None:
    """The singular values of the update that is largest at the end."""
    last = dataset["update_norm"].isel(step=-1).fillna(0.0)
    layer = int(np.argmax(last.values))
    spectrum = dataset["singular_value"].isel(layer=layer).values
    count = spectrum.shape[1]
    for i, colour in enumerate(shades(count)):
        values = np.where(spectrum[:, i] > 0, spectrum[:, i], np.nan)
        label = f"{i + 1}" if count <= NAMED or i in (0, count - 1) else None
        ax.plot(dataset["step"].values, values, color=colour, linewidth=1.0, label=label)
    ax.set(xlabel="step", yscale="log", title="singular values, largest update")
    ax.legend(ncols=2)


def _steps(dataset: xr.Dataset, ax: Axes) -> None:
    phases = (("t_align", BLUE, "Z aligns"), ("t_update", ORANGE, "update aligns"), ("t1", "0.3", "T1"))
    for name, colour, label in phases:
        ax.plot(dataset[f"{name}_predicted"].values, dataset[name].values, ".", color=colour, label=label)
    drawn = np.concatenate([line.get_data() for line in ax.lines], axis=1)
    end = 1.1 * np.max(drawn[:, np.isfinite(drawn).all(axis=0)], initial=1.0)
    ax.plot([0, end], [0, end], color="0.25", linewidth=0.6)
    ax.set(xlabel="predicted step", ylabel="measured step", title="phases", xlim=(0, end), ylim=(0, end))
    ax.legend()

"""The picture of an advice: the loss from each start, the time to the level over the size and over the rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from lora_flow.figures.style import BLUE, GREEN, ORANGE, PURPLE, letters, panels
from lora_flow.results.given import require_dataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lora_flow.advice.choice import Cell

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "0.35")  # in the order of `init`
OWN = "own"


def advice_figure(dataset: xr.Dataset, cell: Cell | None) -> Figure:
    """An advice's dataset, with the recommended cell, if there is one.

    **Returns:** a `matplotlib.figure.Figure`. **Raises:** `InputError` for a dataset that is not an `Advice`'s.
    """
    require_dataset(dataset, "advice_figure", "time_level", "loss_floor", "admissible", "held", "relative_size")
    rank = int(dataset["rank"].values[-1]) if cell is None else cell.rank
    colours = dict(zip(dataset["init"].values.tolist(), COLOURS * 3, strict=False))
    with panels(1, 3, height=2.7) as (figure, axes):
        _losses(dataset, axes[0, 0], rank, colours)
        _sizes(dataset, axes[0, 1], rank, colours, cell)
        _ranks(dataset, axes[0, 2], colours, cell)
        letters(axes)
        figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=len(colours))
    return figure


def _losses(dataset: xr.Dataset, ax: Axes, rank: int, colours: dict[str, str]) -> None:
    time = dataset["time"].values[1:]
    for init, colour in colours.items():
        here = dataset.sel(init=init, rank=rank)
        reached = here["time_level"].where(here["admissible"] == 1, np.inf).values
        if np.isfinite(reached).any():
            ax.plot(time, here["loss"].isel(size=int(np.argmin(reached))).values[1:], color=colour)
        own = here["loss"].sel(size=OWN).values[1:]
        if init == "gaussian" and np.isfinite(own).all():
            ax.plot(time, own, color=colour, linestyle=":", linewidth=1.0)
    ax.axhline(dataset.attrs["level"], color="0.25", linewidth=0.6, linestyle="--")
    ax.set(xscale="log", yscale="log", xlabel="gradient-flow time t", ylabel="share of the loss")
    ax.set_title(f"rank {rank}; dotted: PEFT's own start")


def _sizes(dataset: xr.Dataset, ax: Axes, rank: int, colours: dict[str, str], cell: Cell | None) -> None:
    for init, colour in colours.items():
        here = dataset.sel(init=init, rank=rank)
        finite = np.isfinite(here["time_level"].values) & (here["time_level"].values > 0)
        asked = finite & (here["size"].values != OWN)
        x, y = here["relative_size"].values, here["time_level"].values
        ax.plot(x[asked], y[asked], ".-", color=colour, markersize=4, label=init)
        own = finite & (here["size"].values == OWN)
        ax.plot(x[own], y[own], "D", color=colour, markersize=4, markerfacecolor="none")
    if cell is not None:
        _mark(ax, float(cell.of(dataset)["relative_size"]), float(cell.of(dataset)["time_level"]))
    ax.set(xscale="log", yscale="log", xlabel="size of the start, over a solution's", ylabel="time to the level")
    ax.set_title(f"rank {rank}; diamonds: own size")


def _ranks(dataset: xr.Dataset, ax: Axes, colours: dict[str, str], cell: Cell | None) -> None:
    ranks = dataset["rank"].values
    time = dataset["time_level"].where(dataset["admissible"] == 1)
    for init, colour in colours.items():
        ax.plot(ranks, time.sel(init=init).min("size").values, ".-", color=colour, markersize=4)
    if cell is not None:
        _mark(ax, float(cell.rank), float(cell.of(dataset)["time_level"]))
    floors: Any = 100 * (dataset["floor"] * dataset["share"]).sum("layer")
    ax.set(xscale="log", yscale="log", xlabel="rank", ylabel="time to the level")
    ax.set_xticks(ranks, [f"{rank}\n{floor:.2g}" for rank, floor in zip(ranks, floors.values, strict=True)])
    ax.minorticks_off()
    ax.set_title("best sizes; below: loss left, %")


def _mark(ax: Axes, x: float, y: float) -> None:
    ax.plot([x], [y], "o", color="0.1", markersize=9, markerfacecolor="none")

"""Pictures of an image check, in the layout of Figures 5, 6 and 7 of arXiv 2503.06982, and of the starts.

Lines are medians over seeds, and bands and bars reach from quartile to quartile; the paper has means and deviations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_flow.figures.style import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    Mark,
    axes_or_new,
    band,
    keys,
    panels,
    quantiles,
    shades,
)
from lora_flow.figures.ticks import label_ticks
from lora_flow_vision.claims import LABELS, STARTS, report_steps

COLOURS = {"gaussian-A": BLUE, "gaussian-B": ORANGE, "spectral": GREEN, "lora-one": PURPLE}
NAMES = {
    "train_loss": "train loss",
    "test_loss": "test loss",
    "train_accuracy": "train accuracy",
    "test_accuracy": "test accuracy",
    "alignment": "alignment, eq. (215)",
    "norm_z": r"$\|[B; A^\top]\|_F$",
}
SHOWN_ALPHA = 0.1  # the standard deviation at which starts are shown beside each other


def draw(dataset: xr.Dataset) -> dict[str, Figure]:
    """All the pictures that a check's results allow, by name; several ranks give several of Figures 6 and 7."""
    pictures = {"figure5": early(dataset)} if "gaussian-A" in dataset["init"] else {}
    if {"gaussian-A", "gaussian-B"} & set(dataset["init"].values):
        for rank in dataset["rank"].values:
            suffix = f"-r{rank}" if dataset.sizes["rank"] > 1 else ""
            pictures[f"figure6{suffix}"] = over_stds(dataset.sel(rank=rank), ("train_accuracy", "test_accuracy"))
            pictures[f"figure7{suffix}"] = over_stds(dataset.sel(rank=rank), ("train_loss", "test_loss"))
    return pictures | {"starts": starts(dataset)}


def early(dataset: xr.Dataset) -> Figure:
    """Alignment and norm over the first 300 steps at the smallest standard deviation, A random (Figure 5)."""
    small = dataset.sel(init="gaussian-A", alpha=dataset.attrs["aligned_at"])
    small = small.where(small["step"] <= 300, drop=True)
    return _grid(dataset, ("alignment", "norm_z"), lambda name, optimizer, ax: plot_early(small, name, optimizer, ax))


def over_stds(dataset: xr.Dataset, names: tuple[str, str]) -> Figure:
    """A quantity on the training and on the test images over the standard deviation (Figures 6 and 7)."""
    figure = _grid(dataset, names, lambda name, optimizer, ax: plot_over_stds(dataset, name, optimizer, ax))
    title = f"{dataset.attrs['data']}, LoRA on {dataset.attrs['layers']}, rank {int(dataset['rank'])}"
    figure.suptitle(title, x=0.02, ha="left", fontsize=9)
    rate = dataset.attrs["sgd_rate"]
    marks = [
        Mark(f"{step} steps, flow T = {rate * step:g}", {"color": colour}) for step, colour in _step_colours(dataset)
    ]
    marks += [Mark(STARTS.get(init, init), {"color": "0.3", "linestyle": style}) for init, style in _styles(dataset)]
    side_by_side = min(len(marks), max(1, 5 * dataset.sizes["optimizer"] // 3))  # what so many panels are wide
    figure.legend(handles=keys(marks), loc="outside lower center", ncols=side_by_side, fontsize=7, frameon=False)
    return figure


def starts(dataset: xr.Dataset) -> Figure:
    """Train loss over the steps for every start, at one standard deviation; a row for each rank."""
    alphas = dataset["alpha"].values
    alpha = alphas[np.argmin(np.abs(np.log(alphas / SHOWN_ALPHA)))]
    one = dataset["train_loss"].sel(alpha=alpha)
    figure = _grid(
        dataset,
        tuple(dataset["rank"].values),
        lambda rank, optimizer, ax: plot_starts(one.sel(rank=rank), optimizer, ax),
    )
    figure.suptitle(
        f"Four starts: A and B random with std {alpha:g}, the others at A's norm", x=0.02, ha="left", fontsize=9
    )
    return figure


def plot_early(dataset: xr.Dataset, name: str, optimizer: str, ax: Axes | None = None) -> Axes:
    """A line for each rank, with its band."""
    ax = axes_or_new(ax)
    if name != "alignment":
        ax.set_yscale("log")
    ranks = dataset["rank"].values
    for rank, colour in zip(ranks, shades(len(ranks), until=0.75), strict=True):
        band(dataset[name].sel(optimizer=optimizer, rank=rank), ax, color=colour, label=f"rank {rank}")
    if name == "alignment":
        ax.set_ylim(0, 1.05)
    ax.set(xlabel=_horizon(optimizer), ylabel=NAMES[name], title=LABELS[optimizer])
    ax.legend()
    return label_ticks(ax)


def plot_over_stds(dataset: xr.Dataset, name: str, optimizer: str, ax: Axes | None = None) -> Axes:
    """A line for each time, solid for A random and dashed for B random; bars between the quartiles."""
    ax, log = axes_or_new(ax), name.endswith("loss")
    values = dataset[name].sel(optimizer=optimizer, alpha=dataset["alpha"] > dataset.attrs["aligned_at"])
    how: dict[str, Any] = {"marker": ".", "capsize": 2, "elinewidth": 0.8}
    for step, colour in _step_colours(dataset):
        for init, style in _styles(dataset):
            one = values.sel(init=init, step=step)
            low, middle, high = quantiles(one, log)
            ax.errorbar(one["alpha"], middle, (middle - low, high - middle), color=colour, linestyle=style, **how)
    ax.set(xscale="log", yscale="log" if log else "linear")
    ax.set_xticks(ticks := [0.025, 0.1, 0.4, 1.0], [f"{tick:g}" for tick in ticks])
    ax.tick_params(axis="x", which="minor", bottom=False)
    ax.set(xlabel="std of the random factor", ylabel=NAMES[name], title=LABELS[optimizer])
    return label_ticks(ax)


def plot_starts(values: xr.DataArray, optimizer: str, ax: Axes | None = None) -> Axes:
    ax = axes_or_new(ax)
    ax.set(xscale="log", yscale="log")
    for init in values["init"].values:
        one = values.sel(init=init, optimizer=optimizer).where(values["step"] > 0, drop=True)
        band(
            one,
            ax,
            color=COLOURS.get(init, "0.3"),
            label=STARTS.get(init, init),
            linestyle="--" if init == "gaussian-B" else "-",
        )
    ax.set(xlabel=_horizon(optimizer), ylabel="train loss")
    ax.set_title(f"{LABELS[optimizer]}, rank {int(values['rank'])}")
    ax.legend()
    return label_ticks(ax)


def _step_colours(dataset: xr.Dataset) -> list[tuple[int, Any]]:
    steps = report_steps(dataset)
    return list(zip(steps, shades(len(steps), until=0.75), strict=True))


def _styles(dataset: xr.Dataset) -> list[tuple[str, Any]]:
    return [(init, style) for init, style in (("gaussian-A", "-"), ("gaussian-B", "--")) if init in dataset["init"]]


def _grid(dataset: xr.Dataset, rows: tuple[Any, ...], plot: Any) -> Figure:
    optimizers = dataset["optimizer"].values
    width, height = 2.5 * len(optimizers), 2.2 * len(rows) + 0.3
    with panels(len(rows), len(optimizers), height, width) as (figure, axes):
        for row, line in zip(rows, axes, strict=True):
            for optimizer, ax in zip(optimizers, line, strict=True):
                plot(row, str(optimizer), ax)
    return figure


def _horizon(optimizer: str) -> str:
    return "time / sgd rate" if optimizer == "flow" else "steps"

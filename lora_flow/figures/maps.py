"""Pictures over parameters rather than time: heat maps over two axes of a sweep, and curves over one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_flow.checks import kind, require, require_instance, require_number
from lora_flow.figures.style import axes_or_new, band, letters, line_styles, mark_rounding, panels, shades
from lora_flow.figures.ticks import label_ticks
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.clock import over_time
from lora_flow.results.given import require_dataset
from lora_flow.results.levels import clipped
from lora_flow.results.phases import leading, phases
from lora_flow.results.report import log10, show

QUANTITIES = {"loss": r"$\log_{10}$ final loss", "alignment_error": r"$\log_{10}$ final $1-\cos$", "t1": r"$T_1$"}
NAMES = {"alpha": r"$\alpha$", "rank": "rank r", "delta_w": r"$\delta_w$", "angle": "angle", "noise": "noise"}


def phase_values(dataset: xr.Dataset) -> xr.Dataset:
    """log10 of the final loss and alignment error, and T1: means over seeds, for every cell of a sweep.

    The alignment error and T1 are those of the layer that aligns first, see `lora_flow.phases`.
    A loss below its rounding floor counts as the floor. T1 is infinite in a cell where a run does not reach T1.
    """
    dataset = over_time(dataset)
    last = dataset.isel(time=-1)
    ended = {"loss": clipped(last["loss"], rounding_floors(dataset))}
    ended["alignment_error"] = leading(last, "alignment_error", "alignment_error_2")
    logs = xr.Dataset({name: log10(values) for name, values in ended.items()})
    return logs.mean("seed").assign(t1=phases(dataset)["t1"].mean("seed", skipna=False))


def plot_map(values: xr.DataArray, ax: Axes | None = None, title: str = "") -> Axes:
    """A heat map of values over alpha (across) and one more dimension (up), a cell each; grey where not finite."""
    require_instance("values", values, xr.DataArray, "be an xarray.DataArray, as phases(dataset)['t1'].mean('seed')")
    dims = [str(dim) for dim in values.dims]
    require(len(dims) == 2 and "alpha" in dims, "values", "have the dim alpha and one more", ", ".join(dims) or "none")
    ax = axes_or_new(ax)
    (other,) = (dim for dim in dims if dim != "alpha")
    values = values.sortby([other, "alpha"]).transpose(other, "alpha")
    colours = mpl.colormaps["viridis"].with_extremes(bad="0.85")
    image = ax.imshow(
        values.where(np.isfinite(values)), origin="lower", aspect="auto", cmap=colours, interpolation="nearest"
    )
    ax.figure.colorbar(image, ax=ax)
    exponents = np.log10(values["alpha"].values)
    whole = [i for i, exponent in enumerate(exponents) if abs(exponent - round(exponent)) < 1e-3]
    ax.set_xticks(whole, [f"$10^{{{round(exponents[i])}}}$" for i in whole])
    ax.set_yticks(range(values.sizes[other]), [show(value.item()) for value in values[other].values])
    ax.set(xlabel=r"$\alpha$ (log scale)", ylabel=NAMES.get(str(other), str(other)), title=title)
    ax.spines[["top", "right"]].set_visible(True)
    return ax


def phase_diagram(dataset: xr.Dataset, rank: int, delta_w: float) -> Figure:
    """Final loss, final alignment error and T1 over alpha x rank (above) and alpha x delta_w (below)."""
    require_dataset(dataset, "phase_diagram", "loss", "alignment_error")
    dims, asked = set(map(str, dataset["loss"].dims)), {"init", "alpha", "rank", "delta_w", "seed", "time"}
    require(dims == asked, "dataset", f"have the dims {', '.join(sorted(asked))}", ", ".join(sorted(dims)))
    require(
        dataset.sizes["init"] == 1, "dataset", "have one init, such as dataset.isel(init=[0])", dataset.sizes["init"]
    )
    require(rank in dataset["rank"].values, "rank", f"be one of {dataset['rank'].values.tolist()}", kind(rank))
    require_number("delta_w", delta_w, "be a number, the nearest of the dataset's is taken")
    values = phase_values(dataset).squeeze("init")
    rows = (values.sel(delta_w=delta_w, method="nearest"), values.sel(rank=rank))
    with panels(2, 3, height=4.6) as (figure, axes):
        for row, part, fixed in zip(axes, rows, (rf"$\delta_w$ = {delta_w:.3g}", f"r = {rank}"), strict=True):
            for ax, (name, title) in zip(row, QUANTITIES.items(), strict=True):
                plot_map(part[name], ax, f"{title}, {fixed}")
        letters(axes)
    return figure


def plot_family(members: Sequence[xr.Dataset], variable: str, ax: Axes) -> Axes:
    """One variable over time, a colour for each dataset, a line style for each initialisation.

    The alignment error is that of the layer that aligns first.
    """
    floor = max(float(rounding_floors(one).max()) for one in members) if variable == "loss" else None
    ax.set_yscale("log")
    for one, colour in zip(members, shades(len(members)), strict=True):
        curves = leading(one, variable, "alignment_error_2") if variable == "alignment_error" else one[variable]
        for init, style in line_styles(one).items():
            band(curves.sel(init=init), ax, floor, color=colour, linestyle=style)
    if floor is not None:
        mark_rounding(ax, floor)
    ax.set(xlabel="gradient-flow time t (log scale)", xscale="log")
    times = members[0]["time"].values
    ax.set_xlim(max(1e-3 * times[-1], times[1]), times[-1])
    return label_ticks(ax)


def families(rows: Sequence[tuple[str, str, Mapping[Any, xr.Dataset]]]) -> Figure:
    """Loss and alignment error over time for several families of problems.

    A row for each `(title, name, members)`: the members are datasets by the values of what `name` says.
    """
    with panels(len(rows), 2, height=2.5 * len(rows)) as (figure, axes):
        for row, (title, over, members) in zip(axes, rows, strict=True):
            for ax, name, label in zip(
                row, ("loss", "alignment_error"), ("loss L (log scale)", r"$1 - \cos$ (log scale)"), strict=True
            ):
                plot_family(list(members.values()), name, ax)
                ax.set(ylabel=label, title=title)
            handles: list[Any] = [
                Line2D([], [], color=colour, label=show(value))
                for value, colour in zip(members, shades(len(members)), strict=True)
            ]
            styles = line_styles(next(iter(members.values())))
            if len(styles) > 1:
                handles += [Line2D([], [], color="0.3", linestyle=style, label=init) for init, style in styles.items()]
            row[1].legend(handles=handles, title=over, loc="center left", bbox_to_anchor=(1.0, 0.5))
        letters(axes)
    return figure

"""Pictures of a run. Every function takes `ax=None`, draws on it, and returns the axes it drew on."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_flow.checks import kind, require, require_instance, require_number
from lora_flow.figures import style as look
from lora_flow.figures.shown import save_numbers
from lora_flow.figures.style import (
    BLUE,
    GREEN,
    ORANGE,
    axes_or_new,
    band,
    letters,
    line_styles,
    mark_rounding,
    quantiles,
    shades,
)
from lora_flow.figures.ticks import label_ticks
from lora_flow.figures.written import write
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.clock import clock, over_time
from lora_flow.results.given import require_dataset
from lora_flow.results.levels import initial_losses
from lora_flow.results.phases import leading, phases, saddles, second_leads
from lora_flow.results.report import problem_dims, show
from lora_flow.storage.remote import Place
from lora_flow.sweeps.schema import OPTIONAL_DIMS

PHASES = {"align": "#e3e3e3", "grow": "#f4f4f4", "converge": "#dce9f5", "slow tail": "#fff2cc"}


def plot_loss(dataset: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Loss over time for every initialisation (line style) and alpha (colour); one side and one rank.

    Medians over seeds, with bands between the quartiles, down to the rounding floor.
    """
    dataset = _checked(dataset, "plot_loss")
    ax, floor = axes_or_new(ax), _floor(dataset)
    ax.set_yscale("log")
    for init, style in line_styles(dataset).items():
        for alpha, colour in _colours(dataset, init):
            band(dataset["loss"].sel(init=init, alpha=alpha), ax, floor, color=colour, linestyle=style)
    mark_rounding(ax, floor)
    ax.set(xlabel=clock(dataset).axis, ylabel="loss L (log scale)", title="Loss")
    _legend(ax, _alpha_handles(dataset) + _init_handles(dataset))
    return label_ticks(ax)


def plot_distance(dataset: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Distance of a network's product from the solution of least norm over time, drawn as the loss in `plot_loss`."""
    dataset = _checked(dataset, "plot_distance", "distance")
    ax = axes_or_new(ax)
    ax.set_yscale("log")
    for init, style in line_styles(dataset).items():
        for alpha, colour in _colours(dataset, init):
            band(dataset["distance"].sel(init=init, alpha=alpha), ax, color=colour, linestyle=style)
    ax.set(xlabel=clock(dataset).axis, ylabel=r"$\|W_1 W_2 - X^+ Y\|_F$ (log scale)")
    ax.set_title("Distance from least norm")
    return label_ticks(ax)


def plot_alignment(dataset: xr.Dataset, ax: Axes | None = None, until: float | None = None) -> Axes:
    """Alignment error over time of the layer that aligns first, random initialisations only where there are any.

    That is layer 1, and layer 2 where delta_w > 1; the labels say which.
    """
    dataset = _checked(dataset, "plot_alignment", "alignment_error")
    _check_leading(dataset, "plot_alignment", second=("alignment_error_2",))
    ax = axes_or_new(ax)
    ax.set_yscale("log")
    inits = _random_inits(dataset)
    layer, errors = _aligning(dataset), leading(dataset, "alignment_error", "alignment_error_2")
    for init in inits:
        for alpha, colour in _colours(dataset, init):
            one = _until(errors.sel(init=init, alpha=alpha), until)
            band(one, ax, color=colour, linestyle=line_styles(dataset)[init])
    title = f"Alignment of {layer.of}" if layer.of else "Alignment error"
    title += f", {inits[0]}" if len(inits) == 1 else ""
    ax.set(xlabel=clock(dataset).axis, ylabel=f"{layer.error} (log scale)", title=title)
    _legend(ax, _alpha_handles(dataset))
    return label_ticks(ax)


def plot_phases(dataset: xr.Dataset, ax: Axes | None = None, until: float | None = None) -> Axes:
    """Alignment error, spectral norm of Z and loss together, at the smallest alpha, in the order of events.

    Z is that of the layer that aligns first: of layer 1, and of layer 2 where delta_w > 1; the labels say which. For a
    network, which has no alignment error, the first curve is the distance from the solution of least norm. The phases
    of `lora_flow.phases`, medians over seeds, are shaded, and the saddles of the median loss hatched. The dotted line
    is the talk's prediction of t1.
    """
    dataset = _checked(dataset, "plot_phases", "norm_z1")
    if "distance" not in dataset:
        require_dataset(dataset, "plot_phases", "alignment_error")
    _check_leading(dataset, "plot_phases", "aligned", "shift_rank", second=("norm_z2", "alignment_error_2"))
    ax = axes_or_new(ax)
    one = _latest(dataset)
    init, alpha = str(one["init"].item()), float(one["alpha"].item())
    floor = _floor(one)
    spans = phases(one).median("seed").squeeze() if "sigma_w1" in dataset.coords else None
    if until is None and spans is not None:
        until = _phases_end(spans, float(dataset["time"][-1]))
    layer = _aligning(dataset)
    if "distance" in one:
        first, name = one["distance"], "distance"
    else:
        first, name = leading(one, "alignment_error", "alignment_error_2"), layer.error
    curves = [(first, name, BLUE, "-"), (leading(one, "norm_z1", "norm_z2"), layer.norm, ORANGE, "-.")]
    ax.set_yscale("log")
    for values, label, colour, style in [*curves, (one["loss"], "loss L", GREEN, "--")]:
        shown, least = _until(values.squeeze(["init", "alpha"]), until), floor if values.name == "loss" else None
        band(shown, ax, least, color=colour, linestyle=style, label=label)
    mark_rounding(ax, floor, ax.lines[-1:])
    if spans is not None:
        shade_phases(spans, ax)
    median = quantiles(one["loss"].squeeze(["init", "alpha"]), log=True, floor=floor)[1]
    hatch_saddles(saddles(median, one["time"].values, float(initial_losses(one).median()), floor), ax)
    where = rf", $\alpha$ = {_power(alpha)}" if len(init) <= len("gaussian") else ""
    what = f"{layer.of}, and loss L" if layer.of else "value"
    ax.set(xlabel=clock(dataset).axis, ylabel=f"{what} (log scale)", title=f"Phases, {init}{where}")
    _legend(ax, ax.get_legend_handles_labels()[0])
    return label_ticks(ax)


def shade_phases(spans: xr.Dataset, ax: Axes) -> Axes:
    """The phases of one run, as from `lora_flow.phases`, shaded up to the right end of the axes.

    A phase without a known end is left out, and so are all phases after the last known end.
    """
    left, right = ax.get_xlim()
    ends = [float(spans[name]) for name in ("t_align", "t1", "t_plateau")]
    ends.append(ends[-1] + right)  # unknown where the last is
    for (name, shade), end in zip(PHASES.items(), ends, strict=True):
        end = min(end, right)  # NaN stays NaN, and is not above
        if end > left:
            ax.axvspan(left, end, color=shade, linewidth=0, zorder=0, label=name)
        left = left if np.isnan(end) else max(left, end)
    predicted = float(spans["t1_predicted"])
    if predicted < right and bool(spans["aligned"]) and int(spans["shift_rank"]) == 1:
        ax.axvline(predicted, color="0.2", linestyle=":", linewidth=1, label=r"$T_1$ predicted")
    return ax


def hatch_saddles(spans: Sequence[tuple[float, float]], ax: Axes) -> Axes:
    """The intervals in which the loss is on a saddle, hatched."""
    for i, (begin, end) in enumerate(spans):
        label = "saddle" if i == 0 else None
        ax.axvspan(begin, end, facecolor="none", edgecolor="0.7", hatch="///", linewidth=0, zorder=0.2, label=label)
    return ax


def _latest(dataset: xr.Dataset) -> xr.Dataset:
    """The part that `plot_phases` shows: of the smallest alpha, whose phases end last."""
    return dataset.sel(init=_random_inits(dataset)[:1], alpha=[float(dataset["alpha"].min())])


def _phases_end(spans: xr.Dataset, t1: float) -> float:
    """A time by which all the phases can be seen."""
    ends = 1.4 * float(spans["t_plateau"]), 4 * float(spans["t1"])
    return min(t1, max((end for end in ends if 0 < end < np.inf), default=t1))


class _Layer(NamedTuple):
    """How a panel calls a layer, "" where there is only one, and its alignment error and norm."""

    of: str
    error: str
    norm: str


def _aligning(dataset: xr.Dataset) -> _Layer:
    """The layer that aligns first, which the panels show; the first where theory does not say which does."""
    if "norm_z2" not in dataset:
        return _Layer("", r"$1 - \cos(\gamma, Z)$", r"$\|Z\|$")
    i = 2 if "sigma_w1" in dataset.coords and bool(second_leads(dataset)) else 1
    return _Layer(f"layer {i}", rf"$1 - \cos(\gamma_{i}, Z_{i})$", rf"$\|Z_{i}\|$")


def _floor(dataset: xr.Dataset) -> float:
    """The largest rounding floor of what one panel shows."""
    return float(rounding_floors(dataset).max())


def three_panels(dataset: xr.Dataset, alignment_until: float | None = None) -> Figure:
    """The paper's three panels for one problem, side and rank: loss, alignment, phases.

    Alignment is shown until `alignment_until`; by default as long as the phases are.
    """
    return panels([dataset], [alignment_until])


def panels(datasets: Sequence[xr.Dataset], alignment_until: Sequence[float | None]) -> Figure:
    """The three panels of several datasets, a row for each."""
    listed = isinstance(datasets, Sequence) and len(datasets) > 0
    require(listed, "datasets", "be a list of datasets, such as [dataset.isel(rank=0)]", kind(datasets))
    require_instance("alignment_until", alignment_until, Sequence, "be a list, with a time or None for each dataset")
    require(
        len(alignment_until) == len(datasets), "alignment_until", f"have {len(datasets)} items", kind(alignment_until)
    )
    with look.panels(len(datasets), 3, height=2.9 * len(datasets)) as (figure, axes):
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
        for given, until, row in zip(datasets, alignment_until, axes, strict=True):
            plot_loss(given, row[0])
            dataset = over_time(given)
            if "distance" in dataset:
                plot_distance(dataset, row[1])
            else:
                if until is None and "sigma_w1" in dataset.coords:
                    ends = phases(_latest(dataset)).median("seed").squeeze()
                    until = _phases_end(ends, float(dataset["time"][-1]))
                plot_alignment(dataset, row[1], until=until)
            plot_phases(dataset, row[2])
            if len(datasets) > 1:
                ratio = float(dataset["sigma_w1"] / dataset["sigma_w2"])
                row[0].set_title(rf"{row[0].get_title()}, $\delta_w$ = {ratio:.3g}")
        letters(axes)
    return figure


def save_figures(dataset: xr.Dataset, folder: Place, name: str, title: str = "") -> list[Place]:
    """One picture for each of `single_cases`: `<name>.png`, or `<name>-B-r4.png` where there are several."""
    paths = []
    for suffix, one in single_cases(dataset):
        paths += save({f"{name}{suffix}": three_panels(one)}, folder, title)
    return paths


def save(pictures: Mapping[str, Figure], folder: Place, title: str = "") -> list[Place]:
    """Writes pictures under their names, under a title of their own if one is given; returns the PNGs' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in pictures.items():
        if title:
            figure.suptitle(title)
        paths.append(write(figure, folder, name))
        plt.close(figure)
    return paths


def save_with_numbers(pictures: Mapping[str, Figure], folder: Place, title: str = "") -> list[Place]:
    """Writes pictures, and beside each as JSON the numbers that it shows (`lora_flow.figures.shown`)."""
    save_numbers(pictures, folder)
    return save(pictures, folder, title)


def single_cases(dataset: xr.Dataset) -> Iterator[tuple[str, xr.Dataset]]:
    """The parts of a dataset with one problem, side, optimiser, step size and rank each, and suffixes for their names.

    A label may hold what no file name can, which becomes "-". Where two suffixes are then the same, in whatever case,
    a number goes behind the later one.
    """
    taken: set[str] = set()
    dims = [*problem_dims(dataset), *(dim for dim in OPTIONAL_DIMS if dim in dataset.dims), "rank"]
    for index in np.ndindex(*(dataset.sizes[dim] for dim in dims)):
        where = dict(zip(dims, index, strict=True))
        values = {dim: show(dataset[dim].values[i].item()) for dim, i in where.items() if dataset.sizes[dim] > 1}
        short = {"side": "-", "rank": "-r"}
        suffix = "".join(f"{short.get(dim, f'-{dim}-')}{value}" for dim, value in values.items())
        clean = re.sub(r"[^\w.+-]+", "-", suffix)
        names = (clean if number == 1 else f"{clean}-{number}" for number in itertools.count(1))
        name = next(name for name in names if name.casefold() not in taken)
        taken.add(name.casefold())
        yield name, dataset.isel(where)


def _checked(dataset: Any, what: str, *names: str) -> xr.Dataset:
    """The dataset over `time`; raises unless it holds what one panel shows, its loss and these variables."""
    require_dataset(dataset, what, "loss", *names)
    dataset = over_time(dataset)
    dims, asked = set(map(str, dataset["loss"].dims)), ("init", "alpha", "seed", "time")
    must = f"have the dims {', '.join(asked)}, such as dataset.isel(rank=0) or dataset.sel(alpha=[1e-3])"
    require(dims == set(asked), "dataset", must, ", ".join(sorted(dims)))
    return dataset


def _check_leading(dataset: xr.Dataset, what: str, *names: str, second: Sequence[str]) -> None:
    """Raises unless a factorisation's dataset holds these variables, and the second layer's where that one is shown."""
    if "sigma_w1" in dataset.coords:
        require_dataset(dataset, what, "sigma_w2", *names)
        require_dataset(dataset, what, *(second if bool(second_leads(dataset).any()) else ()))


def _legend(ax: Axes, handles: Sequence[Any]) -> None:
    """Below the axes, where it hides no curve."""
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=3 if max(len(handle.get_label()) for handle in handles) < 20 else 2,
        handlelength=2.6,
        handletextpad=0.4,
        columnspacing=0.8,
    )


def _until(values: xr.DataArray, until: float | None) -> xr.DataArray:
    if until is not None:
        require_number("until", until, "be a time, or None", lambda known: known > 0)
    return values if until is None else values.sel(time=slice(None, until * (1 + 1e-9)))


def _random_inits(dataset: xr.Dataset) -> Sequence[str]:
    inits = [str(name) for name in dataset["init"].values]
    return [name for name in inits if name == "gaussian"] or inits


def _alpha_colours(dataset: xr.Dataset) -> list[tuple[float, Any]]:
    alphas = np.sort(dataset["alpha"].values)[::-1]
    return list(zip(alphas, shades(len(alphas), until=0.75), strict=True))


def _alpha_handles(dataset: xr.Dataset) -> list[Line2D]:
    colours = _alpha_colours(dataset)
    if len(colours) == 1 and dataset.sizes["init"] > 1:
        return [Line2D([], [], color="none", label=rf"$\alpha$ = {_power(colours[0][0])}")]
    shown = colours if len(colours) <= 6 else [colours[0], colours[len(colours) // 2], colours[-1]]
    return [Line2D([], [], color=colour, label=rf"$\alpha$ = {_power(alpha)}") for alpha, colour in shown]


def _colours(dataset: xr.Dataset, init: str) -> list[tuple[float, Any]]:
    """A colour for every alpha; for every initialisation where there is only one alpha."""
    if dataset.sizes["alpha"] > 1 or dataset.sizes["init"] == 1:
        return _alpha_colours(dataset)
    colours = shades(dataset.sizes["init"], until=0.9)
    return [(float(dataset["alpha"][0]), colours[list(dataset["init"].values).index(init)])]


def _init_handles(dataset: xr.Dataset) -> list[Line2D]:
    styles = line_styles(dataset)
    one_alpha = dataset.sizes["alpha"] == 1
    return [
        Line2D([], [], color=_colours(dataset, init)[0][1] if one_alpha else "0.3", linestyle=style, label=init)
        for init, style in (styles.items() if len(styles) > 1 else ())
    ]


def _power(value: float) -> str:
    exponent = int(np.floor(np.log10(value)))
    factor = value / 10**exponent
    return f"$10^{{{exponent}}}$" if abs(factor - 1) < 1e-9 else rf"${factor:.3g} \times 10^{{{exponent}}}$"

"""All the initialisations side by side, on one adapted layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from lora_flow.experiments.base import Experiment
from lora_flow.figures.style import band, panels
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.levels import AT_ROUNDING
from lora_flow.results.phases import time_to
from lora_flow.results.report import table
from lora_flow.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lora_flow.initialization import Init

FAMILIES = {  # where a start comes from, and its colours
    "Greys": ("gaussian", "orthogonal"),
    "Blues": ("spectral", "lora-one", "lora-one-theory", "lora-ga", "lora-ga-peft", "gora"),
    "Oranges": ("pissa", "milora", "olora", "loram"),
    "Greens": ("eva",),
}
INITS = Settings(
    problem="regression",
    m=30,
    n=40,
    kappa=(2.0,),
    input_kappa=10.0,
    angle=(0.0, 90.0),
    init=tuple(name for names in FAMILIES.values() for name in names),
    alpha=(1.0, 0.1),
    rank=(4,),
    seeds=5,
    t1=300.0,
    saves=241,
    spacing="log",
)
LEVELS = (1e-1, 1e-4, 1e-8)  # of the loss at zero adapters
TITLES = {0.0: "Task along the weight's top pairs", 90.0: "Task across them"}


def times_to(dataset: xr.Dataset) -> xr.Dataset:
    """The first times at which the loss is below the levels, relative to that of the pretrained weight."""
    start = dataset["loss"].sel(init="gaussian").isel(time=0, drop=True)
    return xr.Dataset({f"{level:g}": time_to(dataset["loss"], level * start) for level in LEVELS})


def draw(dataset: xr.Dataset) -> Figure:
    dataset = dataset.squeeze("rank")
    floor = float(rounding_floors(dataset).max())
    with panels(2, 2, height=5.4, sharex=True, sharey=True) as (figure, axes):
        for row, alpha in zip(axes, dataset["alpha"].values, strict=True):
            for ax, angle in zip(row, dataset["angle"].values, strict=True):
                ax.set_yscale("log")
                for init, colour, style in _styles(dataset["init"].values.tolist()):
                    one = dataset["loss"].sel(init=init, alpha=alpha, angle=angle)
                    band(one.isel(time=slice(1, None)), ax, floor, color=colour, linestyle=style, label=init)
                ax.set(xscale="log", ylim=(1e-12, 30))
                ax.set_title(rf"{TITLES[angle]}, $\alpha$ = {alpha:g}", loc="left")
        for ax in axes[-1]:
            ax.set_xlabel("gradient-flow time t (log scale)")
        for ax in axes[:, 0]:
            ax.set_ylabel("loss L (log scale)")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", handlelength=2.4)
    return figure


def inits_dataset(*own: Init, settings: Settings = INITS, progress: bool = True) -> xr.Dataset:
    """The dataset of `figure inits` with own initialisations besides, for `draw` and `notes`."""
    from lora_flow.recipes.kinds import draw_all
    from lora_flow.settings import sweep_arguments
    from lora_flow.sweeps.sweep import sweep

    told = sweep_arguments(settings) | {"init": (*settings.init, *own)}
    return sweep(draw_all(settings), **told, progress=progress)


def _styles(labels: Sequence[str]) -> list[tuple[str, Any, Any]]:
    import matplotlib as mpl

    own = tuple(label for label in map(str, labels) if label not in INITS.init)

    styles: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
    return [
        (name, mpl.colormaps[family](shade), style)
        for family, names in ({**FAMILIES, "Purples": own}).items()
        for name, shade, style in zip(names, np.linspace(0.95, 0.5, len(names)), itertools.cycle(styles), strict=False)
        if name in labels
    ]


def notes(dataset: xr.Dataset) -> str:
    dataset = dataset.squeeze("rank")
    spans, last = times_to(dataset), dataset[["loss", "loss_floor", "dead_directions"]].isel(time=-1)
    last = last.assign(rounding_floor=rounding_floors(dataset)).compute()
    rows = []
    for angle in dataset["angle"].values:
        for alpha in dataset["alpha"].values:
            for init in dataset["init"].values:
                where = {"angle": angle, "alpha": alpha, "init": init}
                found = [_median(spans[f"{level:g}"].sel(where)) for level in LEVELS]
                loss, floor = last["loss"].sel(where), last["loss_floor"].sel(where)
                resolved = loss.median() >= last["rounding_floor"].sel(where).median()
                dead = int(last["dead_directions"].sel(where).max())
                shown = _power(float(loss.median())) if resolved else AT_ROUNDING
                values = [shown, _power(float(floor.median())), dead or ""]
                rows.append([f"{angle:g}", f"{alpha:g}", init, *found, *values])
    header = ["angle", "alpha", "init", *(f"t to {level:g}" for level in LEVELS)]
    header += [f"loss at t = {dataset.attrs['t1']:g}", "lowest possible", "dead directions"]
    return (
        "Times at which the loss is first below a level, relative to the loss of the pretrained weight; medians over "
        "seeds, with - for a level that half of the seeds do not reach. The shift has singular values 1 and 1/2 along "
        "the weight's top singular pairs (angle 0) or across them (angle 90), and the rank is 4. At angle 0 milora "
        "starts on a saddle, which it leaves only by rounding.\n\n" + table(header, rows)
    )


def _median(times: xr.DataArray) -> str:
    value = float(times.median())
    return "-" if np.isinf(value) else f"{value:.3g}"


def _power(value: float) -> str:
    return "" if np.isnan(value) else "0" if value == 0 else f"{value:.1e}"


EXPERIMENT = Experiment.of_one(
    "all the initialisations on one layer, with a task along the weight's top singular pairs and one across them",
    INITS,
    draw,
    notes,
)

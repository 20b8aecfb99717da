"""Sweeps over one adapted layer: all the initialisations side by side, and rates against the condition number."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from lora_flow.figures.style import BLUE, ORANGE, band, letters, panels, shades
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.levels import AT_ROUNDING
from lora_flow.results.phases import time_to
from lora_flow.results.report import show, table
from lora_flow.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lora_flow.initialization import Init

Datasets = Mapping[str, xr.Dataset]

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

KAPPAS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
KAPPA = Settings(
    problem="regression",
    m=20,
    n=20,
    target_rank=4,
    kappa=KAPPAS,
    init=("lora-one-theory", "gora"),
    alpha=(0.5,),
    rank=(4,),
    t1=10_000.0,
    saves=401,
    spacing="log",
)
KAPPA_RUNS = {"plain": KAPPA, "scaled": dataclasses.replace(KAPPA, flow="scaled", t1=20.0, spacing="linear")}
WINDOW = (1e-8, 1e-10)  # of the loss at the start, between which the rate is taken


def times_to(dataset: xr.Dataset) -> xr.Dataset:
    """The first times at which the loss is below the levels, relative to that of the pretrained weight."""
    start = dataset["loss"].sel(init="gaussian").isel(time=0, drop=True)
    return xr.Dataset({f"{level:g}": time_to(dataset["loss"], level * start) for level in LEVELS})


def draw_inits(datasets: Datasets) -> dict[str, Figure]:
    dataset = datasets[""].squeeze("rank")
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
    return {"": figure}


def inits_dataset(*own: Init, settings: Settings = INITS, progress: bool = True) -> xr.Dataset:
    """The dataset of `figure inits` with own initialisations besides, for `draw_inits({"": dataset})` and its notes."""
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


def inits_notes(datasets: Datasets) -> str:
    dataset = datasets[""].squeeze("rank")
    spans, last = times_to(dataset), dataset.isel(time=-1).assign(rounding_floor=rounding_floors(dataset))
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


def rates(dataset: xr.Dataset) -> xr.DataArray:
    """-d log ||E|| / dt while the loss passes the window; NaN where it does not."""
    start = dataset["loss"].isel(time=0, drop=True)
    first, last = (time_to(dataset["loss"], level * start) for level in WINDOW)
    return 0.5 * np.log(WINDOW[0] / WINDOW[1]) / (last - first).where(np.isfinite(last))


def draw_kappa(datasets: Datasets) -> dict[str, Figure]:
    with panels(1, 2, height=2.8) as (figure, axes):
        left, right = axes[0]
        for name, style in (("plain", "--"), ("scaled", "-")):
            one = datasets[name]["loss"].sel(init="lora-one-theory").squeeze()
            for kappa, colour in zip(KAPPAS, shades(len(KAPPAS)), strict=True):
                curve = one.sel(kappa=kappa)
                label = f"{kappa:g}" if style == "-" else None
                left.plot(curve["time"], curve, color=colour, linestyle=style, label=label)
        left.set(xscale="log", yscale="log", xlim=(1, KAPPA.t1), ylim=(1e-12, 1))
        left.set(xlabel="time t (log scale)", ylabel="loss L (log scale)")
        left.set_title("lora-one-theory: plain (dashed), scaled")
        left.legend(title=r"$\kappa$", loc="upper right", ncols=2, columnspacing=1.0)
        for name, style in (("plain", "--"), ("scaled", "-")):
            found = rates(datasets[name]).squeeze()
            for init, colour in (("lora-one-theory", BLUE), ("gora", ORANGE)):
                label = f"{init}, {name}"
                right.plot(KAPPAS, found.sel(init=init), color=colour, linestyle=style, marker="o", ms=3, label=label)
        guide = 2 / np.array(KAPPAS)
        right.plot(KAPPAS, guide, color="0.5", linestyle=":", label=r"$2/\kappa$")
        right.set(xscale="log", yscale="log", xlabel=r"condition number $\kappa$ of the shift")
        right.set_ylabel(r"rate $-\,d\,\log\|E\|/dt$")
        right.set_title("final rate")
        right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        letters(axes)
    return {"": figure}


def kappa_notes(datasets: Datasets) -> str:
    rows = []
    for name in KAPPA_RUNS:
        for init in KAPPA.init:
            found = rates(datasets[name]).squeeze().sel(init=init).values
            spread = f"{100 * (found.max() - found.min()) / found.mean():.2g} %"
            shown = ["-" if np.isnan(value) else f"{value:.4g}" for value in found]
            rows.append([init, name, *shown, "-" if np.isnan(found).any() else spread])
    header = ["init", "flow", *(f"kappa = {show(kappa)}" for kappa in KAPPAS), "largest less smallest, of the mean"]
    return (
        f"The rate at which ||E|| falls while the loss goes from {WINDOW[0]:g} to {WINDOW[1]:g} of its start. "
        "The preconditioned rate is 2 if the adapters' subspaces are the task's from the start (lora-one-theory) and "
        "1 where only one side's is (gora). The plain flow's rate goes like 2/kappa from lora-one-theory, and is lower "
        f"from gora; - where the loss does not fall so far by t = {KAPPA.t1:g}.\n\n" + table(header, rows)
    )


def _median(times: xr.DataArray) -> str:
    value = float(times.median())
    return "-" if np.isinf(value) else f"{value:.3g}"


def _power(value: float) -> str:
    return "" if np.isnan(value) else "0" if value == 0 else f"{value:.1e}"

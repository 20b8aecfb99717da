"""What Stable-LoRA's shrinking of A buys: the loss over time from four sizes of A(0), at several rates."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from lora_flow.experiments.base import Datasets, Experiment
from lora_flow.figures.style import band, letters, mark_rounding, panels, quantiles, shades
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.levels import told
from lora_flow.results.report import table
from lora_flow.settings import Settings
from lora_flow.theory import stable_lora as theory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE, RATES = 60, (0.0, 1.0, 5.0, 20.0)
USUAL = round(SIZE**-0.5, 3)  # the standard deviation that the source draws A with
GRADIENT_FLOW = Settings(
    problem="regression",
    m=SIZE,
    n=SIZE,
    target_rank=4,
    kappa=(2.5,),
    alpha=(0.01, USUAL, 0.5, 1.0),
    rank=(8,),
    seeds=5,
    t1=40.0,
    saves=161,
)
PARTS = {
    f"rate-{rate:g}": dataclasses.replace(GRADIENT_FLOW, flow=f"stable-lora:{rate:g}" if rate else "plain")
    for rate in RATES
}
TOLD = (5.0, 10.0, 20.0, 40.0)


def _of(dataset: xr.Dataset, alpha: float) -> xr.Dataset:
    """The runs of one size, over seed and time."""
    one = dataset.sel(alpha=alpha)
    return one.squeeze([dim for dim in one.sizes if dim not in ("seed", "time")])


def draw(datasets: Datasets) -> dict[str, Figure]:
    floor = max(float(rounding_floors(one).max()) for one in datasets.values())
    with panels(2, 2, height=4.8, sharex=True, sharey=True) as (figure, axes):
        for ax, alpha in zip(axes.flat, GRADIENT_FLOW.alpha, strict=True):
            usual = r" = $n^{-1/2}$" if alpha == USUAL else ""
            ax.set(yscale="log", title=f"std of A(0) = {alpha:g}{usual}")
            for name, rate, colour in zip(PARTS, RATES, shades(len(RATES)), strict=True):
                one = _of(datasets[name], alpha)
                band(one["loss"], ax, floor, color=colour, label=f"k = {rate:g}" if rate else "k = 0: gradient flow")
                if rate:
                    until = float(one["shrunk_until1"].isel(time=-1).median("seed"))
                    middle = np.log(quantiles(one["loss"], log=True)[1])
                    ax.plot(until, np.exp(np.interp(until, one["time"], middle)), "o", color=colour, markersize=4)
            mark_rounding(ax, floor)
        for ax in axes[-1]:
            ax.set(xlabel="time t")
        for ax in axes[:, 0]:
            ax.set(ylabel="loss L (log scale)")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(RATES))
        letters(axes)
    return {"": figure}


def notes(datasets: Datasets) -> str:
    task = np.diag(np.geomspace(1.0, 1 / GRADIENT_FLOW.kappa[0], GRADIENT_FLOW.target_rank))
    task = np.pad(task, (0, SIZE - len(task)))
    rows = []
    for alpha in GRADIENT_FLOW.alpha:
        for name, rate in zip(PARTS, RATES, strict=True):
            one = _of(datasets[name], alpha)
            stops = ["-", "-"]
            if rate:
                until = float(one["shrunk_until1"].isel(time=-1).median("seed"))
                stops = [f"{until:.3f}", f"{theory.switch_off_time_of_gaussian(task, rate):.3f}"]
            floors = rounding_floors(one)
            losses = [told(one["loss"].sel(time=time), floors) for time in TOLD]
            rows.append([f"{alpha:g}", f"{rate:g}", *stops, *losses])
    header = ["std of A(0)", "k", "shrunk until", "predicted", *(f"log10 loss at t = {time:g}" for time in TOLD)]
    return (
        "Shrinking A at the rate k until ||A||/n < ||B||/m. From a large A(0) it takes away the imbalance that slows "
        "gradient flow down; from a small one it only costs time. Predicted is log(1 + k m/(sqrt(n) ||Y||))/k. Times "
        "are medians over seeds, losses means with standard deviations.\n\n" + table(header, rows)
    )


EXPERIMENT = Experiment(
    "the loss over time with Stable-LoRA's shrinking of A, from four sizes of A(0)",
    PARTS,
    draw,
    notes,
)

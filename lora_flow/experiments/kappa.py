"""Rates against the condition number of the task: the plain and the preconditioned flow on one adapted layer."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from lora_flow.experiments.base import Datasets, Experiment
from lora_flow.figures.style import BLUE, ORANGE, letters, panels, shades
from lora_flow.results.phases import time_to
from lora_flow.results.report import show, table
from lora_flow.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def rates(dataset: xr.Dataset) -> xr.DataArray:
    """-d log ||E|| / dt while the loss passes the window; NaN where it does not."""
    start = dataset["loss"].isel(time=0, drop=True)
    first, last = (time_to(dataset["loss"], level * start) for level in WINDOW)
    return 0.5 * np.log(WINDOW[0] / WINDOW[1]) / (last - first).where(np.isfinite(last))


def draw(datasets: Datasets) -> dict[str, Figure]:
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


def notes(datasets: Datasets) -> str:
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


EXPERIMENT = Experiment(
    "the rate of the plain and of the preconditioned flow against the condition number of the task",
    KAPPA_RUNS,
    draw,
    notes,
)

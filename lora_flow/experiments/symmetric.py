"""One factor of a symmetric matrix with fewer, as many and more columns than it needs: the loss, and the noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from lora_flow.experiments.base import Experiment
from lora_flow.figures.style import band, letters, mark_rounding, panels, shades
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.report import table
from lora_flow.settings import Settings
from lora_flow.theory import symmetric as theory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SYMMETRIC = Settings(
    problem="symmetric",
    m=6,
    eigenvalues=(2.0, 1.0),
    init=("tied",),
    alpha=(0.3,),
    rank=(1, 2, 3, 4, 6),
    seeds=10,
    t1=1000.0,
    saves=161,
    spacing="log",
)
VALUES = np.array([*SYMMETRIC.eigenvalues, *[0.0] * (SYMMETRIC.m - len(SYMMETRIC.eigenvalues))])
ENOUGH = theory.positive_count(VALUES)
KINDS = {-1: "under", 0: "exact", 1: "over"}


def draw(dataset: xr.Dataset) -> Figure:
    dataset, floor = dataset.squeeze(("alpha", "init")), float(rounding_floors(dataset).max())
    times = dataset["time"].values[1:]
    with panels(1, 2, height=3.0) as (figure, axes):
        left, right = axes[0]
        for ax in (left, right):
            ax.set(xscale="log", yscale="log", xlabel="time t (log scale)")
        for rank, colour in zip(SYMMETRIC.rank, shades(len(SYMMETRIC.rank)), strict=True):
            one = dataset.sel(rank=rank).isel(time=slice(1, None))
            label = f"r = {rank}, {KINDS[int(np.sign(rank - ENOUGH))]}"
            band(one["loss"], left, floor, color=colour, label=label)
            tail, rate = theory.tail(VALUES, rank), theory.final_rate(VALUES, rank)
            if tail > 0:
                band(one["noise"], right, color=colour, label=label)
                left.plot(times, np.where(times > 3, tail / times**2, np.nan), "--", color="0.2", linewidth=0.8)
            elif rank == ENOUGH:
                met = int(np.searchsorted(times, 8.0))
                anchor = float(one["loss"].isel(time=met).median("seed"))
                guide = anchor * np.exp(-rate * (times - times[met]))
                left.plot(
                    times, np.where((times > 4) & (guide > floor), guide, np.nan), "--", color="0.2", linewidth=0.8
                )
            else:
                least = theory.least_loss(VALUES, range(rank))
                left.axhline(least, linestyle="--", color="0.2", linewidth=0.8)
        right.plot(times, np.where(times > 1, theory.noise_limit() / times, np.nan), "--", color="0.2", label="1/(2 t)")
        mark_rounding(left, floor)
        left.set(ylabel="loss f (log scale)", title="theory dashed")
        right.set(ylabel=r"$\|S\|_2$ (log scale)", title="noise, over-parametrised")
        left.legend(loc="center left")
        right.legend(loc="lower left")
        letters(axes)
    return figure


def notes(dataset: xr.Dataset) -> str:
    last, rows = dataset.isel(time=-1).squeeze(("alpha", "init")), []
    end = float(last["time"])
    for rank in SYMMETRIC.rank:
        one, tail = last.sel(rank=rank), theory.tail(VALUES, rank)
        excess = one["loss"] - one["loss_floor"]
        noise = f"{end * float(one['noise'].median('seed')):.4f}" if tail > 0 else "-"
        measured = f"{end**2 * float(excess.median('seed')):.5f}" if tail > 0 else "-"
        predicted = f"{tail:.5f}" if tail > 0 else "-"
        kind = KINDS[int(np.sign(rank - ENOUGH))]
        rows.append(
            [rank, kind, f"{theory.least_loss(VALUES, range(min(rank, ENOUGH))):g}", noise, measured, predicted]
        )
    header = ["rank", "parametrised", "f*", f"t norm(S) at {end:g}", "t^2 (f - f*)", "predicted"]
    return (
        f"M has eigenvalues {', '.join(f'{value:g}' for value in VALUES)}; tied starts with alpha = "
        f"{SYMMETRIC.alpha[0]:g}, medians over seeds. With r = r+ the loss falls at the rate 2 lambda_r = "
        f"{theory.final_rate(VALUES, ENOUGH):g}; t ||S|| tends to 1/2 with more columns.\n\n" + table(header, rows)
    )


EXPERIMENT = Experiment.of_one(
    "one factor of a symmetric matrix: its loss and noise with fewer, as many and more columns than it needs",
    SYMMETRIC,
    draw,
    notes,
)

"""Phase diagrams: the final loss, the alignment and T1 over alpha x rank and over alpha x delta_w."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from lora_flow.experiments.base import Experiment
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.levels import told
from lora_flow.results.report import table
from lora_flow.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPERS = 1 / 1.05**2  # the delta_w of Figure 1
ALPHAS = tuple(float(f"{alpha:.3g}") for alpha in np.geomspace(1e-6, 1e-2, 9))
PHASE = Settings(
    side=("B",),
    alpha=ALPHAS,
    rank=(1, 2, 4, 6, 8, 10),
    delta_w=(0.01, 0.03, 0.1, 0.25, 0.5, 0.75, PAPERS),
    seeds=3,
    t1=5.0,
    saves=101,
    spacing="log",
)


def draw(dataset: xr.Dataset) -> Figure:
    from lora_flow.figures.maps import phase_diagram

    return phase_diagram(dataset, rank=4, delta_w=PAPERS)


def notes(dataset: xr.Dataset) -> str:
    from lora_flow.figures.maps import phase_values

    values = phase_values(dataset).squeeze("init")
    last = dataset[["loss"]].isel(time=-1).assign(rounding_floor=rounding_floors(dataset)).squeeze("init").compute()
    rows = []
    for delta_w, rank in [(PAPERS, 1), (PAPERS, 4), (PAPERS, 10), (0.25, 4), (0.01, 4)]:
        for alpha in (1e-6, 1e-4, 1e-2):
            cell = values.sel(delta_w=delta_w, alpha=alpha, method="nearest").sel(rank=rank)
            here = last.sel(delta_w=delta_w, alpha=alpha, method="nearest").sel(rank=rank)
            found = [told(here["loss"], here["rounding_floor"]), f"{float(cell['alignment_error']):.2f}"]
            t1 = f"{float(cell['t1']):.3g}" if np.isfinite(cell["t1"]) else "not reached"
            rows.append([f"{delta_w:.3g}", rank, f"{alpha:g}", *found, t1])
    header = ["delta_w", "rank", "alpha", "log10 loss at t = 5", "log10 (1 - cos)", "T1"]
    return "Some cells of the maps, side B, means over seeds:\n\n" + table(header, rows)


EXPERIMENT = Experiment.of_one(
    "final loss, alignment and T1 over alpha x rank and over alpha x delta_w", PHASE, draw, notes
)

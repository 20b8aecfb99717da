"""Beyond the paper: shifts turned away from the pretrained weights or of higher rank, and noise in the weights."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from lora_flow.experiments.base import Datasets, Experiment
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.levels import told
from lora_flow.results.phases import leading, phases
from lora_flow.results.report import log10, show, table
from lora_flow.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEYOND = Settings(
    init=("gaussian", "spectral"), side=("B",), alpha=(1e-3, 1e-5), seeds=10, t1=20.0, saves=121, spacing="log"
)
SHIFT_RANKS = {
    k: dataclasses.replace(BEYOND, component=tuple(map(str, range(k))), shift_scale=(5.0, 4.0, 3.0, 2.0)[:k])
    for k in (1, 2, 4)
}
BEYOND_RUNS = {
    "angle": dataclasses.replace(BEYOND, angle=(0.0, 5.0, 15.0, 45.0, 90.0)),
    "noise": dataclasses.replace(BEYOND, init=("gaussian",), noise=(0.0, 1e-4, 1e-3, 1e-2, 1e-1)),
} | {f"shift-rank-{k}": settings for k, settings in SHIFT_RANKS.items()}


def _families(datasets: Datasets) -> list[tuple[str, str, xr.Dataset]]:
    ranks = xr.concat(
        [datasets[f"shift-rank-{k}"].drop_attrs() for k in SHIFT_RANKS],
        xr.Variable("shift rank", list(SHIFT_RANKS)),
        coords="minimal",
        compat="override",
    )
    return [
        ("Shift turned by an angle (degrees)", "angle", datasets["angle"]),
        ("Shift of higher rank", "shift rank", ranks),
        ("Noise in the pretrained weights", "noise", datasets["noise"]),
    ]


def draw(datasets: Datasets) -> dict[str, Figure]:
    from lora_flow.figures.maps import families

    return {"": families([(title, dim, one.isel(alpha=-1, rank=0)) for title, dim, one in _families(datasets)])}


def notes(datasets: Datasets) -> str:
    rows = []
    for _, dim, dataset in _families(datasets):
        spans = phases(dataset)
        last = dataset.isel(time=-1).assign(rounding_floor=rounding_floors(dataset))
        error = leading(last, "alignment_error", "alignment_error_2")
        for value in dataset[dim].values:
            for init in dataset["init"].values:
                for alpha in dataset["alpha"].values:
                    where = {dim: value, "init": init, "alpha": alpha}
                    ratio = (spans["t1"] / spans["t1_predicted"]).sel(where)
                    rows.append(
                        [
                            f"{dim} {show(value.item())}",
                            init,
                            f"{alpha:g}",
                            told(last["loss"].sel(where), last["rounding_floor"].sel(where)),
                            f"{float(log10(error.sel(where)).mean()):.2f}",
                            f"{float(ratio.mean()):.2f}" if np.isfinite(ratio).all() else "not reached",
                        ]
                    )
    header = ["problem", "init", "alpha", "log10 loss at t = 20", "log10 (1 - cos)", "T1 measured / predicted"]
    return "Side B, r = 4, means over seeds; cos is with the linearised task's top direction:\n\n" + table(header, rows)


EXPERIMENT = Experiment(
    "shifts turned away from the pretrained weights or of higher rank, and noise in the weights",
    BEYOND_RUNS,
    draw,
    notes,
)

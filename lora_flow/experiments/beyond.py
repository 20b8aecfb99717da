"""Beyond the paper: shifts turned away from the pretrained weights or of higher rank, and noise in the weights."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

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


def _families(datasets: Datasets) -> list[tuple[str, str, dict[Any, xr.Dataset]]]:
    def over(dim: str) -> dict[Any, xr.Dataset]:
        return {value: datasets[dim].sel({dim: value}) for value in datasets[dim][dim].values.tolist()}

    return [
        ("Shift turned by an angle (degrees)", "angle", over("angle")),
        ("Shift of higher rank", "shift rank", {k: datasets[f"shift-rank-{k}"] for k in SHIFT_RANKS}),
        ("Noise in the pretrained weights", "noise", over("noise")),
    ]


def draw(datasets: Datasets) -> dict[str, Figure]:
    from lora_flow.figures.maps import families

    last = {"alpha": -1, "rank": 0}
    rows = [(title, dim, {k: one.isel(last) for k, one in ones.items()}) for title, dim, ones in _families(datasets)]
    return {"": families(rows)}


def notes(datasets: Datasets) -> str:
    rows = []
    for _, dim, members in _families(datasets):
        for value, dataset in members.items():
            spans, floors, last = phases(dataset), rounding_floors(dataset), dataset.isel(time=-1)
            error, ratios = leading(last, "alignment_error", "alignment_error_2"), spans["t1"] / spans["t1_predicted"]
            for init in dataset["init"].values:
                for alpha in dataset["alpha"].values:
                    where = {"init": init, "alpha": alpha}
                    ratio = ratios.sel(where)
                    rows.append(
                        [
                            f"{dim} {show(value)}",
                            init,
                            f"{alpha:g}",
                            told(last["loss"].sel(where), floors.sel(where)),
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

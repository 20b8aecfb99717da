"""What theory says of any run: a table for its report."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from lora_flow.labels import layers_of
from lora_flow.report import cells, log10, problem_dims, show, table
from lora_flow.theory import gradient_flow as theory
from lora_flow.timeline import phases

T1_RANGE = (0.6, 1.1)  # measured over predicted
FLOOR_WITHIN = 0.1  # decades
SMALL = ("gaussian", "spectral")
CONVERGED = 1e-6  # of the loss at the start: the alignment error has then come to its floor


def predictions(dataset: xr.Dataset) -> str:
    """A Markdown table of predicted and measured T1 and alignment floors, for every cell of a dataset.

    Theory is for the plain flow of factorisations with aligned shifts of rank one, from starts that alpha makes small;
    empty where a run has none of these. "n/a" before T1, and for the floor (side "B") before the loss has fallen by six
    decades.
    """
    if "sigma_w1" not in dataset.coords or dataset.attrs.get("flow", "plain") != "plain":
        return ""
    told = [str(init) for init in dataset["init"].values if init in SMALL]
    if not told or not bool(((dataset["aligned"] == 1) & (dataset["shift_rank"] == 1)).any()):
        return ""
    dataset = dataset.sel(init=told)
    measured = dataset.merge(phases(dataset)[["t1", "t1_predicted"]])
    varied = problem_dims(dataset)
    header = [*varied, "init", "side", "alpha", "rank", "T1 predicted", "T1 measured", "T1", "log10 floor predicted"]
    header += ["log10 (1 - cos) measured", "floor"]
    rows = []
    for where, cell in cells(measured):
        side = where.get("side", dataset.attrs.get("side"))
        start: list[Any] = [*(show(where[dim]) for dim in varied), where["init"], side, f"{where['alpha']:g}"]
        applies = bool(cell["aligned"]) and int(cell["shift_rank"]) == 1
        rows.append([*start, where["rank"], *_t1(cell, applies), *_floor(cell, dataset, applies and side == "B")])
    about = (
        "What theory predicts of aligned shifts of rank one: T1, which holds within 0.6 to 1.1 of the prediction, and "
        'with side "B" the floor of 1 - cos, within 0.1 decade:'
    )
    return f"{about}\n\n{table(header, rows)}"


def _t1(cell: xr.Dataset, applies: bool) -> list[str]:
    predicted, measured = float(cell["t1_predicted"].mean()), float(cell["t1"].mean(skipna=False))
    if not applies or np.isnan(measured) or np.isnan(predicted):
        return ["n/a", "n/a" if np.isnan(measured) else f"{measured:.3g}", "not applicable"]
    low, high = T1_RANGE
    return [f"{predicted:.3g}", f"{measured:.3g}", "holds" if low <= measured / predicted <= high else "fails"]


def _floor(cell: xr.Dataset, dataset: xr.Dataset, applies: bool) -> list[str]:
    last = cell.isel(time=-1)
    first_layer = float(cell["sigma_w1"]) < float(cell["sigma_w2"])
    (h, _), (m, _) = layers_of(dataset)
    converged = bool((last["loss"] < CONVERGED * cell["loss"].isel(time=0)).all())
    measured = float(log10(last["alignment_error"]).mean())
    if not (applies and first_layer and converged and str(cell["init"].values) == "gaussian" and h > m):
        return ["n/a", f"{measured:.2f}", "not applicable"]
    floor = theory.alignment_floor(cell["alpha"], h, m, last["norm_z1"])
    predicted = float(log10(floor).mean())
    return [f"{predicted:.2f}", f"{measured:.2f}", "holds" if abs(predicted - measured) <= FLOOR_WITHIN else "fails"]

"""Theory's predictions for any run: a table for its report, or the reason why theory predicts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from lora_flow.results.clock import is_descent, over_time
from lora_flow.results.levels import initial_losses
from lora_flow.results.phases import NEAR, end_of_growth, of_end_of_growth, predicted_end_of_growth
from lora_flow.results.report import Table, cells, kind_of, log10, problem_dims, show, side_of
from lora_flow.results.resolution import bound
from lora_flow.sweeps.schema import layers_of
from lora_flow.theory import gradient_flow as theory

T1_RANGE = (0.6, 1.1)  # measured over predicted
FLOOR_WITHIN = 0.1  # decades
SMALL = ("gaussian", "spectral")
CONVERGED = 1e-6  # of the loss at the start: the alignment error has then come to its floor
HEADING = "What theory predicts"
AT_THE_END = ["status", "loss", "alignment_error", "norm_z1"]


def predictions(dataset: xr.Dataset) -> str | Table:
    """Predicted and measured T1 and alignment floors of every cell that theory is about, or a sentence on why not.

    Theory is for the plain flow of factorisations with aligned shifts of rank one, from starts that alpha makes small.
    The floor is for side "B" where W1 has the smaller gain, once the loss has fallen by six decades.
    """
    dataset = over_time(dataset)
    if reason := _not_about(dataset):
        return f"## {HEADING}\n\nTheory predicts neither T1 nor the alignment floor for this run: {reason}."
    names = [*AT_THE_END, *of_end_of_growth(dataset), *(["initial_loss"] if "initial_loss" in dataset else [])]
    varied, rows, left_out = problem_dims(dataset), [], dict.fromkeys([""])
    for where, cell in cells(dataset[names], _measured):
        if why := _cell_not_about(cell, where):
            left_out[why] = None
            continue
        side = side_of(where, dataset)
        start: list[Any] = [*(show(where[dim]) for dim in varied), where["init"], side, f"{where['alpha']:g}"]
        floor, why = _floor(cell, dataset, side)
        left_out[why] = None
        rows.append([*start, where["rank"], *_t1(cell, dataset["time"].values), *floor])
    header = [*varied, "init", "side", "alpha", "rank", "T1 predicted", "T1 measured", "T1"]
    header += ["log10 (1 - cos) floor predicted", "at the end", "floor"]
    if not any(row[-1] for row in rows):
        header, rows = header[:-3], [row[:-3] for row in rows]
    about = (
        "Theory predicts T1 for aligned shifts of rank one, and with side B the floor of 1 - cos. T1 holds where "
        f"measured, a median over seeds, over predicted lies between {T1_RANGE[0]:g} and {T1_RANGE[1]:g}; the floor, a "
        f"mean over seeds, holds within {FLOOR_WITHIN:g} decade."
    )
    return Table("theory", HEADING, " ".join([about, *(f"Left out: {why}." for why in left_out if why)]), header, rows)


def _measured(dataset: xr.Dataset) -> xr.Dataset:
    """What is compared of each lane."""
    last, initial = dataset[AT_THE_END].isel(time=-1, drop=True), initial_losses(dataset)
    return last.assign(t1=end_of_growth(dataset), t1_predicted=predicted_end_of_growth(dataset), initial_loss=initial)


def _not_about(dataset: xr.Dataset) -> str:
    """The reason why theory predicts nothing for any cell; "" where it predicts something."""
    if "sigma_w1" not in dataset.coords:
        return f"the predictions are for a factorisation of two layers with a shift, and this is {kind_of(dataset)}"
    if is_descent(dataset):
        return "the predictions are for the plain gradient flow, and this is gradient descent"
    if (flow := dataset.attrs.get("flow", "plain")) != "plain":
        return f"the predictions are for the plain gradient flow, and this is {flow}"
    why = [_cell_not_about(cell, where) for where, cell in cells(dataset[["status"]])]
    return "" if "" in why else "; ".join(dict.fromkeys(why))


def _cell_not_about(cell: xr.Dataset, where: Mapping[str, Any]) -> str:
    if where["init"] not in SMALL:
        return f"the predictions are for starts that alpha makes small, {' and '.join(SMALL)}, not for {where['init']}"
    if int(cell["shift_rank"]) != 1:
        return f"the predictions are for shifts of rank one, not for rank {int(cell['shift_rank'])}"
    return "" if bool(cell["aligned"]) else "the predictions are for shifts that are aligned with the weights"


def _t1(cell: xr.Dataset, time: np.ndarray) -> list[str]:
    predicted, t1 = float(cell["t1_predicted"]), cell["t1"].values
    reached = t1[np.isfinite(t1)]
    finished = int(cell["loss"].notnull().sum())
    measured = float(np.median(reached)) if reached.size else np.nan
    limit = bound(measured, time)
    told = f"< {limit:.3g}" if np.isfinite(limit) else f"{measured:.3g}"
    if np.isnan(predicted):
        return ["-", told if reached.size else "-", "not predicted"]
    if not finished or reached.size < finished:
        return [f"{predicted:.3g}", f"reached by {reached.size} of {cell.sizes['seed']} seeds", "not yet"]
    low, high = T1_RANGE
    verdict = "holds" if low <= measured / predicted <= high else "fails"
    return [f"{predicted:.3g}", told, "too few saves" if np.isfinite(limit) else verdict]


def _floor(cell: xr.Dataset, dataset: xr.Dataset, side: str) -> tuple[list[str], str]:
    """Predicted and measured floors and the verdict, or blanks and the reason."""
    (h, _), (m, _) = layers_of(dataset)
    finished = cell["loss"].notnull()
    measured = float(log10(cell["alignment_error"]).mean())
    blank = ["", "", ""]
    if side != "B" or str(cell["init"].values) != "gaussian":
        return blank, 'the floor of spectral starts and of side "A"'
    if h <= m:
        return blank, "the floor, which needs a hidden layer wider than the output"
    if float(cell["sigma_w1"]) >= (1 - NEAR) * float(cell["sigma_w2"]):
        return blank, "the floor of layer 1, where W1's gain along the shift is not the smaller"
    fallen = cell["loss"] < CONVERGED * cell["initial_loss"]
    if not (finished.any() and bool(fallen.where(finished, True).all())):
        return blank, "the floor, where the loss has not fallen by six decades yet"
    predicted = float(log10(theory.alignment_floor(cell["alpha"], h, m, cell["norm_z1"])).mean())
    verdict = "holds" if abs(predicted - measured) <= FLOOR_WITHIN else "fails"
    return [f"{predicted:.2f}", f"{measured:.2f}", verdict], ""

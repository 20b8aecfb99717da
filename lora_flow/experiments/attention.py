"""LoRA on a pre-trained attention head: learning curves, reused sequences, and the flow over time, beside theory."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from lora_flow.experiments.base import Datasets, Experiment
from lora_flow.figures.style import BLUE, GREEN, ORANGE, band, letters, panels
from lora_flow.results.report import table
from lora_flow.settings import Settings
from lora_flow.theory import attention as theory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = Settings(
    problem="attention",
    m=100,
    sample_ratio=(1.0, 1.5, 2.0, 3.0, 5.0),
    problem_seed=(0, 1, 2, 3),
    init=("tied",),
    alpha=(0.3,),
    rank=(1,),
    t1=10.0,
    saves=2,
)
REUSED = dataclasses.replace(
    CURVES,
    m=60,
    tokens=(2,),
    sample_ratio=(3.0,),
    pretraining_ratio=(0.2,),
    pretraining_ridge=(0.01, 0.03, 0.1, 0.2, 0.4),
    teacher_width=0.5,
    pretrained_by="descent",
    reused=True,
)
FLOW = dataclasses.replace(
    CURVES, m=150, sample_ratio=(3.0,), alpha=(0.01,), t1=3.0, saves=121, problem_seed=(0, 1, 2, 3, 4)
)
PARTS = {"curves": CURVES, "reused": REUSED, "new": dataclasses.replace(REUSED, reused=False), "flow": FLOW}
KINDS = {"reused": ORANGE, "new": BLUE}
NAMES = {"overlap": "overlap of w and w*", "test_error": "test error"}


@functools.cache
def predicted(ratio: float, ridge: float, tokens: int, kappa0: float, alpha: float, reused: bool) -> dict[str, float]:
    """Theory's overlap and test error, at the lambda' and Delta of all parts."""
    (delta,), (weight,) = CURVES.label_noise, CURVES.ridge
    law = theory.pretrain(alpha, ridge, tokens=tokens, noise=delta, kappa0=kappa0)
    noise = law.reused_noise() if reused else law.effective_noise()
    tuned = theory.fine_tune(noise, ratio, weight, tokens=tokens)
    error = theory.generalisation_error(law.effective_noise(), tuned, tokens)
    return {"overlap": tuned.overlap, "test_error": error}


def over_ratio(ratio: float) -> dict[str, float]:
    return predicted(
        ratio,
        CURVES.pretraining_ridge[0],
        CURVES.tokens[0],
        CURVES.teacher_width,
        CURVES.pretraining_ratio[0],
        False,
    )


def over_ridge(ridge: float, reused: bool) -> dict[str, float]:
    ratio, tokens, alpha = REUSED.sample_ratio[0], REUSED.tokens[0], REUSED.pretraining_ratio[0]
    return predicted(ratio, ridge, tokens, REUSED.teacher_width, alpha, reused)


def of_draws(dataset: xr.Dataset) -> xr.Dataset:
    """Over problem_seed and one axis, means over starts where there are several."""
    return dataset.squeeze(("init", "alpha", "rank"), drop=True).mean("seed")


def ends(dataset: xr.Dataset) -> xr.Dataset:
    """The same of the last state."""
    return of_draws(dataset.isel(time=-1))


def draw(datasets: Datasets) -> dict[str, Figure]:
    with panels(2, 3, height=4.4) as (figure, axes):
        for name, left, middle in zip(NAMES, axes[:, 0], axes[:, 1], strict=True):
            ratios = np.geomspace(min(CURVES.sample_ratio), max(CURVES.sample_ratio), 8)
            left.plot(ratios, [over_ratio(ratio)[name] for ratio in ratios], color="0.3", label="theory")
            _points(ends(datasets["curves"])[name], left, BLUE, f"runs, D = {CURVES.m}")
            left.set(xlabel=r"sequences over D, $\alpha'$", ylabel=NAMES[name])
            ridges = np.geomspace(min(REUSED.pretraining_ridge), max(REUSED.pretraining_ridge), 8)
            for kind, colour in KINDS.items():
                values = [over_ridge(ridge, kind == "reused")[name] for ridge in ridges]
                middle.plot(ridges, values, color=colour, label=f"{kind} sequences")
                _points(ends(datasets[kind])[name], middle, colour, "")
            middle.set(xscale="log", xlabel=r"ridge of pre-training, $\lambda$", ylabel=NAMES[name])
        axes[0, 0].legend()
        axes[1, 1].legend()
        flow = of_draws(datasets["flow"]).rename(problem_seed="seed")
        band(flow["overlap"], axes[0, 2], color=GREEN)
        band(flow["loss"] / flow["loss"].isel(time=0), axes[1, 2], color=GREEN)
        axes[0, 2].set(xlabel="time t", ylabel=NAMES["overlap"])
        axes[1, 2].set(xlabel="time t", ylabel="loss over the first loss")
        letters(axes)
    return {"": figure}


def notes(datasets: Datasets) -> str:
    rows = []
    curves = ends(datasets["curves"])
    for ratio in CURVES.sample_ratio:
        rows.append([f"alpha' = {ratio:g}", *_cells(over_ratio(ratio), curves.sel(sample_ratio=ratio))])
    for kind in KINDS:
        found = ends(datasets[kind])
        for ridge in REUSED.pretraining_ridge:
            cells = _cells(over_ridge(ridge, kind == "reused"), found.sel(pretraining_ridge=ridge))
            rows.append([f"{kind} sequences, lambda = {ridge:g}", *cells])
    header = ["", "overlap", "predicted", "test error", "predicted"]
    flow = of_draws(datasets["flow"])
    at = (flow["overlap"] > 0.6).argmax("time")  # all draws come there, or their loss has not fallen
    gone = float((1 - flow["loss"].isel(time=at) / flow["loss"].isel(time=0)).mean())
    return (
        f"Means over {len(CURVES.problem_seed)} draws, D = {CURVES.m}, and {REUSED.m} where lambda varies; theory is "
        f"for large D. From a start of size {FLOW.alpha[0]:g} at D = {FLOW.m} the overlap comes to .6 while the loss "
        f"has fallen by {100 * gone:.2g} %.\n\n" + table(header, rows)
    )


def _points(values: xr.DataArray, ax: Axes, colour: str, label: str) -> None:
    """Means over draws, with their standard deviations."""
    (along,) = (dim for dim in values.dims if dim != "problem_seed")
    mean, spread = values.mean("problem_seed"), values.std("problem_seed", ddof=1)
    ax.errorbar(values[along], mean, spread, fmt="o", ms=3, lw=0.8, color=colour, label=label or None)


def _cells(theirs: dict[str, float], ours: xr.Dataset) -> list[str]:
    cells = []
    for name, value in theirs.items():
        cells += [f"{float(ours[name].mean()):.4f}", f"{value:.4f}"]
    return cells


EXPERIMENT = Experiment(
    "LoRA on a pre-trained attention head: overlap and test error beside theory, and the flow over time",
    PARTS,
    draw,
    notes,
)

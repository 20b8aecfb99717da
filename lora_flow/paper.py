"""The experiments of arXiv 2503.06982 as settings, and the values read off its published figures."""

from __future__ import annotations

import dataclasses
from typing import Any

import xarray as xr

from lora_flow.report import log10, mean_and_std, table
from lora_flow.settings import Settings


@dataclasses.dataclass(frozen=True)
class PaperFigure:
    """One figure: what to run, up to when its alignment panel goes, and what was published (digitised, +-0.05)."""

    settings: Settings
    alignment_until: float
    published_alignment: dict[float, float]  # alpha -> mean log10(1 - cos) at the end of the alignment panel
    published_loss: dict[float, float]  # alpha -> mean log10 loss at the end of the loss panel, random initialisation


FIGURES = {
    1: PaperFigure(
        settings=Settings(
            init=("gaussian", "spectral"),
            side=("B",),  # with side "A", as the paper's text has it, its figures are not reproduced
            alpha=(1e-3, 1e-4, 1e-5),
            rank=(4,),
            seeds=30,
            t1=5.0,
            saves=201,
        ),
        alignment_until=1.1,
        published_alignment={1e-3: -4.75, 1e-4: -6.75, 1e-5: -8.74},
        published_loss={1e-3: -12.56, 1e-4: -16.39, 1e-5: -20.23},
    ),
}


def comparison(figure: PaperFigure, dataset: xr.Dataset) -> str:
    """A Markdown table of the published end values beside those of this run."""
    random = dataset.sel(init="gaussian").isel(rank=0)
    header = ["alpha", "quantity", "published", "here"]
    rows: list[list[Any]] = []
    for quantity, variable, published, time in (
        ("log10(1 - cos)", "alignment_error", figure.published_alignment, figure.alignment_until),
        ("log10 loss", "loss", figure.published_loss, figure.settings.t1),
    ):
        for alpha, value in published.items():
            mean, std = mean_and_std(log10(random[variable].sel(time=time, alpha=alpha, method="nearest")))
            at = f"{quantity} at t = {time:g}, gaussian"
            rows.append([f"{alpha:g}", at, f"{value:.2f}", f"{float(mean):.2f} ± {float(std):.2f}"])
    return "Beside the paper (its pretrained matrix is unknown but for the range of its spectrum):\n\n" + table(
        header, rows
    )

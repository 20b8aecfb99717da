"""Which setting decides how long each phase of a run lasts: alpha, the rank, the initialisation or the scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np
import xarray as xr

from lora_flow.experiments.base import Experiment, Progress
from lora_flow.figures.style import BLUE, GREEN, ORANGE, panels
from lora_flow.recipes.aligned import aligned_problem
from lora_flow.results.report import table
from lora_flow.sensitivities.sensitivity import sensitivity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALPHA, RANKS, LEVEL, T1 = 1e-3, (4, 8), 1e-12, 4.0
ENDS = {"alignment": "t_align", "growth": "t1", "convergence": f"time to {LEVEL:g}"}
SETTINGS = ("alpha", "scaling", "rank", "init")


def run(seeds: int, progress: Progress) -> xr.Dataset:
    """For each phase and seed its length, and its elasticities by every setting."""
    found = xr.concat(
        [
            sensitivity(
                aligned_problem(jax.random.key(0)),
                with_respect_to="alpha",
                observable=list(ENDS.values()),
                init=init,
                side="B",
                alpha=ALPHA,
                rank=RANKS,
                seeds=seeds,
                t1=T1,
                solver="Tsit5",
                progress=False,
            )
            for init in progress(["gaussian", "spectral"])
        ],
        "init",
    ).squeeze(["side", "alpha", "parameter"], drop=True)
    ends, by_alpha = (
        found[name].transpose("observable", "init", "rank", "seed").values for name in ("value", "derivative")
    )
    lengths, changes = np.diff(ends, axis=0, prepend=0.0), np.diff(by_alpha, axis=0, prepend=0.0)
    one = lengths[:, 0, 0]  # of Gaussian starts at the first rank
    of_alpha = ALPHA * changes[:, 0, 0] / one
    of_rank = np.log(lengths[:, 0, 1] / one) / np.log(RANKS[1] / RANKS[0])
    of_init = np.log(np.where(lengths[:, 1, 0] > 0, lengths[:, 1, 0], np.nan) / one)
    elasticity = np.stack([of_alpha, of_alpha / 2 - 1, of_rank, of_init])
    return xr.Dataset(
        {"length": (("phase", "seed"), one), "elasticity": (("setting", "phase", "seed"), elasticity)},
        coords={"phase": list(ENDS), "setting": list(SETTINGS), "seed": range(seeds)},
    )


def draw(dataset: xr.Dataset) -> Figure:
    with panels(1, 1, height=2.8, width=5.0) as (figure, axes):
        ax, middle = axes[0, 0], dataset["elasticity"].median("seed")
        for i, (phase, colour) in enumerate(zip(ENDS, (BLUE, ORANGE, GREEN), strict=True)):
            place = np.arange(len(SETTINGS)) + 0.25 * (i - 1)
            ax.bar(place, middle.sel(phase=phase), width=0.22, color=colour, label=phase)
            low, high = (dataset["elasticity"].sel(phase=phase).quantile(q, "seed") for q in (0.25, 0.75))
            ax.vlines(place, low, high, color="0.25", linewidth=0.9)
        ax.axhline(0.0, color="0.25", linewidth=0.6)
        ax.set_xticks(range(len(SETTINGS)), ["alpha", "scaling s", "rank", "spectral for\ngaussian"])
        ax.set(ylabel="elasticity of the phase's length")
        figure.legend(loc="outside upper center", ncols=len(ENDS))
    return figure


def notes(dataset: xr.Dataset) -> str:
    rows, most = [], []
    for phase in ENDS:
        middle = dataset["elasticity"].sel(phase=phase).median("seed")
        length = float(dataset["length"].sel(phase=phase).median("seed"))
        rows.append([phase, f"{length:.3f}", *(f"{float(one):.3f}" for one in middle.values)])
        most.append(f"{phase} {SETTINGS[int(np.nanargmax(abs(middle.values)))]}")
    header = ["phase", "length", *SETTINGS]
    return (
        f"Figure 1's problem, Gaussian B, alpha = {ALPHA:g}, rank {RANKS[0]}, medians over seeds. Alignment ends at "
        f"t_align, growth at T1, convergence at a loss of {LEVEL:g}. By alpha, and by the scaling s (s B A from alpha "
        "is B A from sqrt(s) alpha in s times the time), the per cent of the phase's length for one per cent; by the "
        f"rank, the same from {RANKS[0]} to {RANKS[1]}; by the initialisation, the logarithm of what a spectral start "
        f"makes of the length. The largest: {', '.join(most)}.\n\n" + table(header, rows)
    )


EXPERIMENT = Experiment.of_one(
    "which of alpha, scaling, rank and initialisation decides how long each phase lasts",
    run,
    draw,
    notes,
    seeds=5,
    meanings={
        "length": "length of the phase: gradient-flow time",
        "elasticity": "elasticity of the phase's length by the setting",
        "phase": "phase of the run",
        "setting": "what is changed",
        "seed": "seed of the draw",
    },
)

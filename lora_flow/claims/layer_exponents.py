"""How the best `lora_alpha` grows with the rank under Adam: the exponent in two regimes, by the noise and the step."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import xarray as xr

from lora_flow.claims.frame import DERIVED, Cases, claim
from lora_flow.claims.layer_runs import spaces
from lora_flow.experiments.scaling_plane import HIGHEST, STD, least, slopes
from lora_flow.problems.one_layer import SingleLayer
from lora_flow.results.report import log10
from lora_flow.sweeps.sweep import sweep

SIZE, STEPS, DRAWS = 64, 300, 2
RANKS = (1, 4, 16)
SCALINGS = 10.0 ** np.arange(-1.0, 3.1, 0.5)
RUNS = (
    f"one layer, {SIZE} x {SIZE}, singular values 1/i, std of A n^(-1/2)/sqrt(3), {STEPS} steps of Adam, r = 1, 4, 16, "
    f"s half a decade apart, mean of log10 L of {DRAWS} draws"
)


@functools.cache
def last_losses() -> xr.DataArray:
    """log10 of the last loss over scaling, noise, step and rank."""
    left, right = spaces(np.random.default_rng(0), SIZE, SIZE, SIZE)
    shift = left / np.arange(1, SIZE + 1) @ right.T
    problems = {float(s): SingleLayer(shift, s) for s in SCALINGS}
    how: Any = {"descend": ("adam:1e-4", "adam:1e-3"), "gradient_noise": (0.0, 0.5), "steps": STEPS, "saves": 2}
    swept = sweep(problems, alpha=STD, rank=RANKS, seeds=DRAWS, progress=False, **how)
    logs = log10(swept["loss"].isel(iteration=-1)).fillna(HIGHEST).clip(max=HIGHEST)
    return logs.squeeze(["init", "alpha"]).mean("seed")


def exponent(noise: float, step: float) -> float:
    """p of best `lora_alpha` ~ r^p, which is s r; NaN where the best s is at an end."""
    logs = last_losses().sel(gradient_noise=noise, step=step)
    ranks, places = np.log10(RANKS), np.log10(SCALINGS)
    return float(slopes(ranks, ranks + [least(places, logs.sel(rank=rank).values).place for rank in RANKS]))


@claim(DERIVED, RUNS, within=0.1)
def exponent_where_a_is_frozen(seeds: int) -> Cases:
    """with noise and so small a step that A hardly moves, the best lora_alpha grows like the rank: p is .8 to 1"""
    yield "noise .5, eta = 1e-4", 0.9, exponent(0.5, 1e-4)


@claim(DERIVED, RUNS, within=0.25)
def exponent_where_a_is_free(seeds: int) -> Cases:
    """where A moves freely, at a constant step, it does not know the rank: p of the last loss is -.25 to .25"""
    for noise in (0.0, 0.5):
        yield f"noise {noise:g}, eta = 1e-3", 0.0, exponent(noise, 1e-3)

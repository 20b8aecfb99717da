"""Theory drawn over the runs that it is tested against."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_flow.claims import lora_runs as runs
from lora_flow.claims.lora_runs import ALPHAS, DELTA_W
from lora_flow.claims.lora_spectral import modes
from lora_flow.figures.style import BLUE, GREEN, ORANGE, band, letters, mark_rounding, panels
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.phases import at_times
from lora_flow.results.report import log10
from lora_flow.theory import gradient_flow as theory

COLOURS = dict(zip(DELTA_W, (BLUE, ORANGE, GREEN), strict=True))
TAU = r"time $\tau = \sigma\,\sigma_{W_2} t$"


def draw(seeds: int) -> Figure:
    """Six panels: bounds, closed forms and predicted levels (dashed) over measured trajectories and values."""
    with panels(2, 3, height=5.4) as (figure, axes):
        for ax, panel in zip(axes.flat, (_loss, _closed_form, _growth, _t1, _floor, _imbalance), strict=True):
            ax.set_title(panel(seeds, ax))
        letters(axes)
        handles: list[Any] = [
            Line2D([], [], color=colour, label=rf"$\delta_w$ = {d:.3g}") for d, colour in COLOURS.items()
        ]
        handles += [
            Line2D([], [], color="0.2", label="measured"),
            Line2D([], [], color="0.2", linestyle="--", label="theory"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


def _loss(seeds: int, ax: Axes) -> str:
    """Side B at alpha = 1e-4: the loss after T1 under the first bound of Theorem 3.2, without its floor."""
    floor = float(rounding_floors(runs.gaussian(seeds)).max())
    ax.set_yscale("log")
    for delta_w, colour in COLOURS.items():
        run = runs.gaussian(seeds).sel(delta_w=delta_w, side="B").sel(alpha=1e-4, method="nearest")
        band(run["loss"], ax, floor, color=colour)
        c = runs.gains(delta_w)
        t1 = runs.t1(seeds).sel(delta_w=delta_w, side="B").sel(alpha=1e-4, method="nearest")
        ratio = at_times(run["norm_z2"], t1) / run["norm_z1"].isel(time=-1)
        elapsed = (run["time"] - t1).clip(min=0) / c.rate
        bound = theory.local_loss_bound(c, at_times(run["loss"], t1), elapsed, ratio, 0.0)
        ax.plot(run["time"], 10 ** log10(bound.where(run["time"] >= t1)).mean("seed"), "--", color=colour)
        ax.axvline(float(t1.median()), color=colour, linewidth=0.6)
    mark_rounding(ax, floor)
    ax.set(xlabel=TAU, ylabel="loss L (log scale)")
    return r"Loss, $T_1$, and Theorem 3.2"


def _closed_form(seeds: int, ax: Axes) -> str:
    """Side B at the smallest alpha of the main runs: the part of Z_1 that grows, and the part that stays."""
    ax.set_yscale("log")
    for delta_w, colour in COLOURS.items():
        run = runs.gaussian(seeds).sel(delta_w=delta_w, side="B").isel(alpha=-1).sel(time=slice(0, 22))
        band(run["norm_along1"], ax, color=colour)
        band(run["norm_across1"], ax, color=colour, linewidth=0.7)
        start = 10 ** float(log10(run["norm_along1"].isel(time=0)).mean())
        ax.plot(run["time"], start * np.exp(run["time"]), "--", color=colour)
    ax.set(xlabel=TAU, ylabel=r"$\|\gamma_1^\top Z_1\|$ and rest (log scale)", ylim=(1e-7, 10))
    return r"Claim 3.1, $\alpha = 10^{-6}$"


def _growth(seeds: int, ax: Axes) -> str:
    for delta_w, run in modes(seeds).items():
        c, colour = runs.gains(delta_w), COLOURS[delta_w]
        ax.plot(run.tau, run.growth(1).mean(axis=0), color=colour)
        ax.axhline(theory.mode_growth_rate(c) / c.rate, linestyle="--", color=colour, linewidth=1)
    ax.set(xlabel=TAU, ylabel=r"$\frac{d}{d\tau} \log z_1$", xlim=(0, 15), ylim=(0, 2.2))
    return "Theorem 4.1, spectral"


def _t1(seeds: int, ax: Axes) -> str:
    for delta_w, colour in COLOURS.items():
        c = runs.gains(delta_w)
        for side, marker, size, face in (("A", "o", 7, "none"), ("B", "s", 3, colour)):
            mean = runs.t1(seeds).sel(delta_w=delta_w, side=side).mean("seed") / c.rate
            ax.plot(ALPHAS, mean, marker, color=colour, markersize=size, markerfacecolor=face)
        ax.plot(ALPHAS, theory.t1_slides(c, np.array(ALPHAS)), "--", color=colour, linewidth=1)
    ax.set(xlabel=r"$\alpha$ (log scale)", ylabel=r"$T_1$ (log scale)", xscale="log", yscale="log")
    return r"$T_1$, side A (open), B (full)"


def _floor(seeds: int, ax: Axes) -> str:
    last = runs.gaussian(seeds).sel(side="B").isel(time=-1)
    for delta_w, colour in COLOURS.items():
        problem, run = runs.problem(delta_w), last.sel(delta_w=delta_w)
        ax.plot(ALPHAS, 10 ** log10(run["alignment_error"]).mean("seed"), "s", color=colour, markersize=3)
        floors = theory.alignment_floor(run["alpha"], problem.w1.shape[0], problem.w2.shape[0], run["norm_z1"])
        ax.plot(ALPHAS, floors.mean("seed"), "--", color=colour, linewidth=1)
    ax.set(xlabel=r"$\alpha$ (log scale)", ylabel=r"final $1 - \cos$ (log scale)", xscale="log", yscale="log")
    return "Alignment floor, side B"


def _imbalance(seeds: int, ax: Axes) -> str:
    alphas = np.array(ALPHAS)
    for delta_w, colour in COLOURS.items():
        part = runs.gaussian(seeds).sel(delta_w=delta_w, side="B")
        ratio = at_times((part["norm_b1a1"] / part["norm_b2a2"]) ** 2, runs.t1(seeds).sel(delta_w=delta_w, side="B"))
        mean = 10 ** log10(ratio).mean("seed")
        ax.plot(alphas, mean, "s", color=colour, markersize=3)
        least = (alphas / alphas[0]) ** -theory.imbalance_exponent_claim(runs.gains(delta_w).d)
        ax.plot(alphas, float(mean[0]) * least, "--", color=colour, linewidth=1)
    ax.set(xlabel=r"$\alpha$ (log scale)", ylabel=r"$\|B_1A_1\|^2/\|B_2A_2\|^2$ (log scale)")
    ax.set(xscale="log", yscale="log")
    return r"Adapter selection at $T_1$"

"""Singular values of B A over time under gradient flow, Muon, LoRA-Muon and BaLoRA, from small and from large A."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import xarray as xr

from lora_flow.adapter import Adapter, Adapters
from lora_flow.dynamics.lanes import finished, solve_lanes, stack
from lora_flow.experiments.base import Experiment, Progress
from lora_flow.figures.style import band, letters, panels, shades
from lora_flow.problems.one_layer import SingleLayer
from lora_flow.results.phases import time_to
from lora_flow.results.report import table
from lora_flow.theory import spectral_flows as theory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

M, N, RANK, SAVES = 40, 30, 4, 201
SIGMA = np.array([1.0, 0.6, 0.4, 0.2])
B_SIZE = 1e-4
STARTS = {"small A": 0.01, "large A": 1.0}  # standard deviations of A's entries
ENDS = {
    "plain": (60.0, 300.0),
    "balora": (60.0, 60.0),
    "muon": (1.2, 8.0),
    "lora-muon": (1.2, 1.2),
}
TITLES = {"plain": "gradient flow", "balora": "BaLoRA", "muon": "Muon", "lora-muon": "LoRA-Muon"}
LEVEL = 0.95


def run(seeds: int, progress: Progress) -> xr.Dataset:
    """The singular values and the loss over (flow, start, seed, save), each flow and start over times of its own."""
    shape = (len(ENDS), len(STARTS), seeds, SAVES)
    values, loss, times = np.empty((*shape, RANK)), np.empty(shape), np.empty((*shape[:2], SAVES))
    for i, flow in enumerate(progress(list(ENDS))):
        for j, (size, end) in enumerate(zip(STARTS.values(), ENDS[flow], strict=True)):
            times[i, j] = np.linspace(0.0, end, SAVES)
            drawn = [_draw(seed, size) for seed in range(seeds)]
            problems, starts = zip(*drawn, strict=True)
            how: Any = {"flow": flow, "each": True, "keep": ("loss",), "save_adapters": True}
            solved = finished(solve_lanes(stack(problems), stack(starts), np.tile(times[i, j], (seeds, 1)), **how))
            history: Any = solved.history
            product = np.asarray(history[0].b) @ np.asarray(history[0].a)
            values[i, j] = np.linalg.svd(product, compute_uv=False)[..., :RANK]
            loss[i, j] = solved.observables["loss"]
    dims = ("flow", "start", "seed", "save")
    return xr.Dataset(
        {"singular_value": ((*dims, "mode"), values), "loss": (dims, loss), "time": (("flow", "start", "save"), times)},
        coords={
            "flow": list(ENDS),
            "start": list(STARTS),
            "seed": range(seeds),
            "mode": range(1, RANK + 1),
            "sigma": ("mode", SIGMA),
        },
    )


def _draw(seed: int, size: float) -> tuple[SingleLayer, Adapters]:
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(rows, RANK)))[0] for rows in (M, N))
    a, b = size * rng.normal(size=(RANK, N)), B_SIZE * rng.normal(size=(M, RANK))
    return SingleLayer((left * SIGMA) @ right.T), (Adapter(jnp.asarray(a), jnp.asarray(b)),)


def draw(dataset: xr.Dataset) -> Figure:
    with panels(len(STARTS), len(ENDS), height=4.4, sharey=True) as (figure, axes):
        for start, row in zip(STARTS, axes, strict=True):
            for flow, ax in zip(ENDS, row, strict=True):
                one = dataset.sel(flow=flow, start=start)
                for mode, colour in zip(range(1, RANK + 1), shades(RANK), strict=True):
                    curve = one["singular_value"].sel(mode=mode).assign_coords(time=("save", one["time"].values))
                    label = rf"$\sigma = {SIGMA[mode - 1]:g}$"
                    band(curve.swap_dims(save="time"), ax, color=colour, label=label)
                _guide(ax, flow, start, one["time"].values)
                ax.set(title=f"{TITLES[flow]}, {start}", xlabel="time t")
            row[0].set_ylabel("singular values of B A")
        axes[0, -1].legend(loc="lower right")
        letters(axes)
    return figure


def _guide(ax: Any, flow: str, start: str, times: np.ndarray) -> None:
    """What theory has, dashed: t^2 from small adapters, and t."""
    style: Any = {"color": "0.2", "linestyle": "--", "linewidth": 0.8, "zorder": 3}
    if flow == "lora-muon":
        ax.plot(times, theory.lora_muon_values(SIGMA[0], times), **style)
    elif flow == "muon" and start == "small A":
        ax.plot(times, theory.muon_values(SIGMA[0], times), **style)


def notes(dataset: xr.Dataset) -> str:
    rows = []
    for flow in ENDS:
        for start in STARTS:
            one = dataset.sel(flow=flow, start=start)
            timed = one.assign_coords(time=("save", one["time"].values)).swap_dims(save="time")
            shares = timed["singular_value"] / timed["sigma"]
            done = [time_to((1 - shares.sel(mode=mode)).clip(1e-4), 1 - LEVEL) for mode in dataset["mode"].values]
            fallen = time_to(timed["loss"], 0.01 * timed["loss"].isel(time=0, drop=True))
            rows.append([TITLES[flow], start, *(_told(each) for each in (*done, fallen))])
    sizes = " and ".join(f"{size:g}" for size in STARTS.values())
    header = ["flow", "start", *(f"sigma = {sigma:g}" for sigma in SIGMA), "L = L(0)/100"]
    return (
        f"One layer, {M} x {N}, rank {RANK}. A has entries N(0, a^2) with a = {sizes}, and B N(0, {B_SIZE:g}^2). The "
        f"times at which the singular values of B A come to {100 * LEVEL:g} % of those of the task, and the loss to a "
        "hundredth; medians over seeds. Gradient flow and BaLoRA learn the largest first. LoRA-Muon finishes the "
        "smallest first, and so does Muon from a small A.\n\n" + table(header, rows)
    )


def _told(times: xr.DataArray) -> str:
    middle = float(times.median("seed"))
    return f"{middle:.3g}" if np.isfinite(middle) else "-"


EXPERIMENT = Experiment.of_one(
    "singular values of B A over time under gradient flow, BaLoRA, Muon and LoRA-Muon",
    run,
    draw,
    notes,
    seeds=5,
    meanings={
        "flow": "flow that drives the adapters",
        "start": "size of A at first",
        "seed": "seed of the draw",
        "mode": "place of a singular value, the largest first",
        "sigma": "singular value of the task",
        "singular_value": "singular value of B A",
        "loss": "loss L",
        "time": "gradient-flow time",
    },
)

"""How LoRA's output multiplier should grow with the rank: gradient descent and Adam on one layer (arXiv 2606.12883).

The adapters start as PEFT's do, A random with a fixed size and B = 0, and the layer computes `W + (lora_alpha/r) B A`.
The best `lora_alpha` has the lowest loss on average over a fixed number of steps: the last loss alone would measure how
a step of constant size rattles at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters, pad
from lora_flow.dynamics.descend import descend
from lora_flow.experiments.base import Experiment, Progress
from lora_flow.figures.style import band, letters, panels, shades
from lora_flow.problems.one_layer import SingleLayer
from lora_flow.results.levels import spread
from lora_flow.results.report import log10, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE, STEPS, SAVES = 32, 300, 61
RANKS = (1, 2, 4, 8, 16)
SPACING = 0.25  # octaves
LORA_ALPHAS = 2.0 ** np.arange(-2.0, 12.01, SPACING)
RATES = {"GD": (3e-3, 1e-2, 3e-2, 1e-1), "Adam": (3e-4, 1e-3, 3e-3, 1e-2)}


def run(seeds: int, progress: Progress) -> xr.Dataset:
    """The mean loss over optimiser, step size, rank, lora_alpha and seed; infinite where a run diverges."""
    rates = len(next(iter(RATES.values())))
    loss = np.empty((len(RATES), rates, seeds, len(RANKS), len(LORA_ALPHAS)))
    cases = [(i, j, name, rate) for i, (name, each) in enumerate(RATES.items()) for j, rate in enumerate(each)]
    for i, j, name, rate in progress(cases):
        loss[i, j] = _losses(seeds, optax.adam(rate) if name == "Adam" else rate)
    return xr.Dataset(
        {"loss": (("optimizer", "rate_index", "seed", "rank", "lora_alpha"), loss)},
        coords={
            "optimizer": list(RATES),
            "rate": (("optimizer", "rate_index"), np.array(list(RATES.values()))),
            "seed": range(seeds),
            "rank": list(RANKS),
            "lora_alpha": LORA_ALPHAS,
        },
    )


def best(dataset: xr.Dataset) -> xr.Dataset:
    """The best lora_alpha for every optimiser, step size, rank and seed, and the exponent p of `best ~ rank^p`, by
    least squares over ranks. NaN where the best is at an end of the range."""
    logs = log10(dataset["loss"])
    place = logs.argmin("lora_alpha")
    inside = (place > 0) & (place < len(LORA_ALPHAS) - 1)
    near = [logs.isel(lora_alpha=(place + k).clip(0, len(LORA_ALPHAS) - 1)).drop_vars("lora_alpha") for k in (-1, 0, 1)]
    bend = near[0] - 2 * near[1] + near[2]
    shift = xr.where(np.isfinite(bend) & (bend > 0), 0.5 * (near[0] - near[2]) / bend, 0.0)  # of the parabola's lowest
    found = np.log2(LORA_ALPHAS[0]) + SPACING * (place + shift.clip(-0.5, 0.5))
    x = log10(dataset["rank"]) / np.log10(2)
    found, x = found.where(inside), x.where(inside)
    dx = x - x.mean("rank")
    slope = (dx * (found - found.mean("rank"))).sum("rank") / (dx**2).sum("rank")
    exponent = slope.where(inside.sum("rank") >= 3)
    return xr.Dataset({"lora_alpha": 2**found, "exponent": exponent})


def draw(dataset: xr.Dataset) -> Figure:
    found = best(dataset)
    with panels(2, 2, height=5.2) as (figure, axes):
        for row, name in zip(axes, RATES, strict=True):
            one, values = found.sel(optimizer=name), 10 ** log10(dataset["loss"]).mean("seed").sel(optimizer=name)
            middle = len(RATES[name]) // 2
            for rank, colour in zip(RANKS, shades(len(RANKS)), strict=True):
                curve = values.isel(rate_index=middle).sel(rank=rank)
                row[0].plot(LORA_ALPHAS, curve.where(np.isfinite(curve)), color=colour, label=f"r = {rank}")
            row[0].set(xscale="log", yscale="log", xlabel="lora_alpha", ylabel=f"mean loss over {STEPS} steps")
            row[0].set_title(f"{name}, step size {RATES[name][middle]:g}")
            colours = shades(len(RATES[name]), until=0.8, of="plasma")
            for j, (rate, colour) in enumerate(zip(RATES[name], colours, strict=True)):
                best_at = one["lora_alpha"].isel(rate_index=j)
                band(best_at, row[1], spread="range", marker="o", ms=3, color=colour, label=f"{rate:g}")
            guide = float(one["lora_alpha"].median()) * np.sqrt(np.array(RANKS) / np.sqrt(RANKS[0] * RANKS[-1]))
            row[1].plot(RANKS, guide, color="0.5", linestyle=":", label=r"$\sqrt{r}$")
            row[1].set(xscale="log", yscale="log", xlabel="rank r", ylabel="best lora_alpha", title=f"{name}, best")
            row[1].set_xticks(RANKS, [str(rank) for rank in RANKS], minor=False)
            row[1].minorticks_off()
            row[1].autoscale(axis="x")  # with room for the markers
            row[0].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
            row[1].legend(title="step size", loc="center left", bbox_to_anchor=(1.0, 0.5))
        letters(axes)
    return figure


def notes(dataset: xr.Dataset) -> str:
    found, rows = best(dataset), []
    for name, rates in RATES.items():
        for j, rate in enumerate(rates):
            one = found.sel(optimizer=name).isel(rate_index=j)
            medians = one["lora_alpha"].median("seed").values
            values = ["-" if np.isnan(value) else f"{value:.3g}" for value in medians]
            rows.append([name, f"{rate:g}", *values, spread(one["exponent"])])
    header = ["optimiser", "step size", *(f"best at r = {rank}" for rank in RANKS), "exponent"]
    return (
        f"The lora_alpha with the lowest mean loss over {STEPS} steps, median of {dataset.sizes['seed']} draws; the "
        "layer computes W + (lora_alpha/r) B A. The exponent p is that of best ~ r^p, mean and standard deviation over "
        "draws; the source's abstract has about 1/2.\n\n" + table(header, rows)
    )


def _losses(seeds: int, step: Any) -> np.ndarray:
    """The mean losses over seed, rank and lora_alpha in one program: padding of smaller ranks changes nothing."""
    scalings = jnp.asarray(LORA_ALPHAS)[None] / jnp.asarray(RANKS, float)[:, None]

    def mean_loss(shift: Array, start: Adapters, scaling: Array) -> Array:
        run = descend(SingleLayer(shift, scaling), start, steps=STEPS, step=step, saves=SAVES)
        return jnp.mean(run.observables["loss"])

    over_alpha = jax.vmap(mean_loss, (None, None, 0))
    over_rank = jax.vmap(over_alpha, (None, 0, 0))
    compiled = jax.jit(jax.vmap(over_rank, (0, 0, None)))  # as a whole, so that observables not asked for cost nothing
    drawn = [_draw(seed) for seed in range(seeds)]
    losses = compiled(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn), scalings)
    return np.nan_to_num(np.asarray(losses), nan=np.inf, posinf=np.inf)


def _draw(seed: int) -> tuple[Array, Adapters]:
    """A shift whose singular values fall like 1/i, and starts of all the ranks, the first rows of one draw."""
    keys = jax.random.split(jax.random.key(seed), 3)
    left, right = (np.linalg.qr(np.asarray(jax.random.normal(key, (SIZE, SIZE))))[0] for key in keys[:2])
    shift = jnp.asarray(left * (1.0 / np.arange(1, SIZE + 1)) @ right.T)
    bound = 1 / np.sqrt(SIZE)
    drawn = jax.random.uniform(keys[2], (RANKS[-1], SIZE), minval=-bound, maxval=bound)
    starts = [pad((Adapter(drawn[:rank], jnp.zeros((SIZE, rank))),), RANKS[-1]) for rank in RANKS]
    return shift, jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)


MEANINGS = {
    "loss": "mean loss over the saved iterations: infinite where a run diverges",
    "optimizer": "optimiser",
    "rate": "step size: of Adam its learning rate",
    "seed": "seed of the draw",
    "rank": "LoRA rank",
    "lora_alpha": "lora_alpha: the layer computes W + (lora_alpha/r) B A",
}

EXPERIMENT = Experiment.of_one(
    "the best lora_alpha against the rank, gradient descent and Adam",
    run,
    draw,
    notes,
    seeds=5,
    meanings=MEANINGS,
)

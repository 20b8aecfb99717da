"""From pretraining to fine-tuning: the imbalance that a network is trained from decides which adapter wins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from lora_flow.adapter import Adapter, Adapters
from lora_flow.coordinates.shared import coordinates_of
from lora_flow.dynamics.lanes import solve_lanes
from lora_flow.dynamics.solve import Trajectory, save_times
from lora_flow.experiments.base import Experiment, Progress
from lora_flow.figures.style import BLUE, ORANGE, band, letters, mark_rounding, panels, shades
from lora_flow.initialization import gaussian_both_init
from lora_flow.problems.base import on_host
from lora_flow.problems.factorization import Factorization
from lora_flow.problems.network import LinearNetwork
from lora_flow.problems.rounding import rounding_floors
from lora_flow.recipes.aligned import aligned_problem
from lora_flow.results.report import table
from lora_flow.sweeps.sweep import sweep
from lora_flow.theory.linear_flow import trained_gains

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE, WIDTH, START, SHIFT = 10, 100, 0.1, 5.0
RATIOS = (0.04, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0, 25.0)
SHOWN = (0.1, 1.0, 10.0)
PRETRAINING_END, FINE_TUNING_END = 20.0, 2.0
ALPHAS, RANK = (1e-1, 1e-2, 1e-4), 4
COMPARED = tuple(np.geomspace(0.2, 5.0, 21))  # values of delta_w of drawn problems, to compare with


class Pretrained(NamedTuple):
    """A network during pretraining, and its trained weights; arrays over (ratio, seed)."""

    trajectory: Trajectory
    gains: np.ndarray  # (ratio, seed, time, layer)
    predicted: np.ndarray
    problems: dict[str, Factorization]


def run(seeds: int, progress: Progress) -> xr.Dataset:
    """Pretraining by gradient flow from nine ratios of the weights' sizes, then LoRA on the pretrained weights."""
    aligned = aligned_problem(jax.random.key(0), m=SIZE, n=SIZE, h=WIDTH, shift_scale=SHIFT)
    stages = iter(progress(["pretraining", "fine-tuning", "drawn problems"]))
    next(stages)
    trained = _pretrain(aligned, seeds)
    next(stages)
    tuned = _fine_tune(trained.problems, 1).isel(seed=0)
    next(stages)
    drawn = {
        d: aligned_problem(jax.random.key(0), m=SIZE, n=SIZE, h=WIDTH, shift_scale=SHIFT, delta_w=d) for d in COMPARED
    }
    compared = _share(_fine_tune(drawn, seeds)).median("seed")
    list(stages)
    shape = len(RATIOS), seeds
    norms = xr.concat([tuned["norm_b1a1"], tuned["norm_b2a2"]], "layer").transpose("problem", "alpha", "layer", "time")
    own = ("ratio", "seed")
    return xr.Dataset(
        {
            "loss": ((*own, "pretraining_time"), np.asarray(trained.trajectory.observables["loss"])),
            "drift": ((*own, "pretraining_time"), np.asarray(trained.trajectory.observables["drift"])),
            "delta_w": ((*own, "pretraining_time"), trained.gains[..., 0] / trained.gains[..., 1]),
            "predicted": (own, trained.predicted),
            "norms": ((*own, "alpha", "layer", "time"), norms.values.reshape(*shape, *norms.shape[1:])),
            "share": ((*own, "alpha"), _share(tuned).values.reshape(*shape, len(ALPHAS))),
            "drawn_share": (("drawn_delta_w", "alpha"), compared.values),
        },
        coords={
            "ratio": list(RATIOS),
            "seed": range(seeds),
            "pretraining_time": np.asarray(trained.trajectory.times[0, 0]),
            "time": tuned["time"].values,
            "alpha": list(ALPHAS),
            "layer": [1, 2],
            "drawn_delta_w": list(COMPARED),
        },
    )


def _pretrain(aligned: Factorization, seeds: int) -> Pretrained:
    goal = np.asarray(aligned.w2 @ aligned.w1)
    network = LinearNetwork(goal.T)
    u, sigma, vt = np.linalg.svd(goal)
    shape = len(RATIOS), seeds

    def draw_one(ratio: Any, seed: Any) -> Adapters:
        return gaussian_both_init(jax.random.key(seed), network, rank=WIDTH, alpha=START, ratio=ratio)

    drawn = jax.vmap(jax.vmap(draw_one, (None, 0)), (0, None))(jnp.asarray(RATIOS), jnp.arange(seeds))
    (coordinates,) = coordinates_of([network], rank=WIDTH)
    starts, bases = jax.vmap(jax.vmap(coordinates.enter))(drawn)
    times = save_times(PRETRAINING_END, 81, "log")
    how: dict[str, Any] = {"rtol": 1e-6, "save_adapters": True, "keep": ("loss", "drift")}
    trajectory = solve_lanes(coordinates.problem, starts, times, throw=True, **how)
    history: Any = trajectory.history
    ((a, b),) = jax.tree.map(np.asarray, history)
    along = np.linalg.norm(a @ vt[0], axis=-1), np.linalg.norm(np.swapaxes(b, -1, -2) @ u[:, 0], axis=-1)
    predict = jax.vmap(jax.vmap(lambda a, b: trained_gains(sigma[0], a, b).ratio))
    predicted = predict(drawn[0].a @ vt[0], drawn[0].b.mT @ u[:, 0])
    ((w1, w2),) = on_host(jax.vmap(jax.vmap(coordinates.leave))(trajectory.adapters, bases))
    problems = {
        f"{RATIOS[i]:g}, {seed}": network.for_lora((Adapter(w1[i, seed], w2[i, seed]),), shift=aligned.shift)
        for i, seed in np.ndindex(*shape)
    }
    return Pretrained(trajectory, np.stack(along, axis=-1), np.asarray(predicted), problems)


def _fine_tune(problems: dict[Any, Factorization], seeds: int) -> xr.Dataset:
    """LoRA on each of the problems, over (problem, alpha, seed, time)."""
    tuned = sweep(problems, alpha=ALPHAS, rank=RANK, seeds=seeds, t1=FINE_TUNING_END, saves=81, progress=False)
    return tuned.isel(init=0, rank=0)


def _share(tuned: xr.Dataset) -> xr.DataArray:
    """The share of ||B1 A1|| in ||B1 A1|| + ||B2 A2|| at the end."""
    first, second = (tuned[f"norm_b{i}a{i}"].isel(time=-1) for i in (1, 2))
    return first / (first + second)


def draw(dataset: xr.Dataset) -> Figure:
    with panels(2, 2, height=5.4) as (figure, axes):
        colours = dict(zip(SHOWN, shades(len(SHOWN)), strict=True))
        _draw_pretraining(dataset, axes[0], colours)
        _draw_fine_tuning(dataset, axes[1, 0], colours)
        _draw_shares(dataset, axes[1, 1], (BLUE, ORANGE, "0.4"))
        letters(axes)
    return figure


def _draw_pretraining(dataset: xr.Dataset, axes: Any, colours: dict[float, Any]) -> None:
    times = dataset["pretraining_time"].values[1:]
    floor = float(rounding_floors(dataset[["loss"]].rename(pretraining_time="time")).max())
    for ax in axes:
        ax.set(xscale="log", yscale="log", xlabel="pretraining time", xlim=(times[0], times[-1]))
    for ratio, colour in colours.items():
        one = dataset.sel(ratio=ratio).isel(pretraining_time=slice(1, None))
        band(one["loss"], axes[0], floor, color=colour, label=f"{ratio:g}")
        band(one["delta_w"], axes[1], spread="range", color=colour)
        axes[1].axhline(float(one["predicted"].median()), color=colour, linestyle=":", linewidth=1)
    mark_rounding(axes[0], floor)
    axes[0].set(ylabel="pretraining loss", title="Pretraining")
    axes[0].legend(title="ratio of the starts\nof W1 and W2", loc="lower left", bbox_to_anchor=(0.0, 0.12))
    axes[1].set(ylabel=r"$\|W_1 v\| / \|W_2^T u\|$", title=r"Its imbalance becomes $\delta_w$")
    note = "dotted: from the start's imbalance"
    axes[1].annotate(note, (0.98, 0.9), xycoords="axes fraction", ha="right", fontsize=7)


def _draw_fine_tuning(dataset: xr.Dataset, ax: Any, colours: dict[float, Any]) -> None:
    for ratio, colour in colours.items():
        for layer, style in ((1, "-"), (2, "--")):
            norms = dataset["norms"].sel(ratio=ratio, layer=layer, alpha=ALPHAS[-1]).isel(time=slice(1, None))
            label = rf"$\|B_{layer} A_{layer}\|$" if ratio == SHOWN[0] else None
            ax.plot(norms["time"], norms.median("seed"), color=colour, linestyle=style, label=label)
    ax.set(yscale="log", xlabel="fine-tuning time", ylabel="norm of the adapter's product", ylim=(1e-9, 10))
    ax.set_title(rf"Fine-tuning, $\alpha = 10^{{{round(np.log10(ALPHAS[-1]))}}}$")
    ax.set_xlim(0, FINE_TUNING_END)
    ax.legend(loc="lower right", labelcolor="0.2")


def _draw_shares(dataset: xr.Dataset, ax: Any, colours: tuple[Any, ...]) -> None:
    ends = dataset["delta_w"].isel(pretraining_time=-1)
    for alpha, colour in zip(ALPHAS, colours, strict=True):
        ax.plot(dataset["drawn_delta_w"], dataset["drawn_share"].sel(alpha=alpha), color=colour, linewidth=1)
        share = dataset["share"].sel(alpha=alpha)
        ax.plot(
            ends.values.ravel(),
            share.values.ravel(),
            "o",
            ms=2.5,
            color=colour,
            label=rf"$10^{{{round(np.log10(alpha))}}}$",
        )
    ax.axvline(1.0, color="0.6", linestyle=":", linewidth=1)
    ax.set(xscale="log", xlabel=r"$\delta_w$ after pretraining", ylabel=r"$\|B_1A_1\| / (\|B_1A_1\| + \|B_2A_2\|)$")
    ax.set_xticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    ax.minorticks_off()
    ax.annotate(
        "lines: problems drawn\nwith that $\\delta_w$", (0.98, 0.9), xycoords="axes fraction", ha="right", fontsize=7
    )
    ax.set_title("Which adapter wins")
    ax.legend(title=r"$\alpha$", loc="lower left")


def notes(dataset: xr.Dataset) -> str:
    rows = []
    ends = dataset["delta_w"].isel(pretraining_time=-1)
    for ratio in RATIOS:
        one, share = ends.sel(ratio=ratio), dataset["share"].sel(ratio=ratio)
        off = float(abs(dataset["predicted"].sel(ratio=ratio) / one - 1).max())
        shares = [f"{float(share.sel(alpha=alpha).median()):.3f}" for alpha in ALPHAS]
        rows.append([f"{ratio:g}", f"{float(one.median()):.3f}", f"{100 * off:.2g} %", *shares])
    header = ["ratio of the starts", "delta_w after pretraining", "prediction off by at most"]
    header += [f"share of B1 A1, alpha = {alpha:g}" for alpha in ALPHAS]
    return (
        f"A {SIZE} x {WIDTH} x {SIZE} network, pretrained by gradient flow from Gaussian weights whose sizes have the "
        f"given ratio and the geometric mean {START:g}; then LoRA of rank {RANK} learns a shift along its top singular "
        f"pair. Medians of {dataset.sizes['seed']} draws. The prediction of delta_w is from the start alone. Largest "
        f"drift of the imbalance in pretraining: {float(dataset['drift'].max()):.1g}.\n\n" + table(header, rows)
    )


MEANINGS = {
    "loss": "pretraining loss",
    "drift": "drift of what the pretraining's flow conserves, relative to the weights' squared norm",
    "delta_w": "||W1 v|| / ||W2^T u|| during pretraining: u, v are the goal's top singular vectors",
    "predicted": "the same at the end, predicted from the start's imbalance",
    "norms": "norm of B_i A_i during fine-tuning",
    "share": "share of ||B1 A1|| in ||B1 A1|| + ||B2 A2|| at the end",
    "drawn_share": "the same share on drawn problems: median over seeds",
    "ratio": "ratio of the starts of W1 and W2",
    "seed": "seed of the pretraining's start",
    "pretraining_time": "gradient-flow time of the pretraining",
    "time": "gradient-flow time of the fine-tuning",
    "alpha": "initialisation scale",
    "layer": "layer i",
    "drawn_delta_w": "sigma_W1 / sigma_W2 of a drawn problem",
}

EXPERIMENT = Experiment.of_one(
    "how the imbalance of pretraining becomes delta_w, and which adapter then wins",
    run,
    draw,
    notes,
    seeds=5,
    meanings=MEANINGS,
)

r"""LoRA's scaling factor under Adam, on one layer: the loss over the plane of (sqrt(s) std, sqrt(s) eta), by rank.

From B = 0 a run of `W + s B A` under Adam knows nothing but a = sqrt(s) std, the size of A, and e = sqrt(s) eta, the
step (`lora_flow.effective`). So one sweep over both, with s = 1, serves every law by which `lora_alpha` = r s may grow
with the rank: a learning rate moves up and down in the plane, `lora_alpha` along its diagonals, and a law is a line
(arXiv 2606.12883). Beside it are five ReLU layers, of which the two factors are raised until they blow up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from lora_flow.experiments import relu_layers
from lora_flow.experiments.base import Experiment, Progress
from lora_flow.experiments.scaling_plane import (
    FORGIVEN,
    HIGHEST,
    SIZE,
    SIZES,
    STD,
    STEP_SIZES,
    at_rate,
    at_scaling,
    best_alphas,
    best_rates,
)
from lora_flow.figures.style import letters, panels, shades
from lora_flow.problems.one_layer import SingleLayer
from lora_flow.results.levels import spread
from lora_flow.results.report import log10, table
from lora_flow.sweeps.sweep import sweep
from lora_flow.theory.scaling import lora_alpha

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, SAVES = 300, 31
RANKS = (1, 3, 10, 32)
NOISES = (0.0, 0.5)  # standard deviation of an entry of dL/dW, whose own are of the order of 1/n
RATES = (1e-4, 10**-3.5, 1e-3, 10**-2.5)
USUAL, ALPHA = 1e-3, 16.0  # eta, and the lora_alpha that does not know the rank
FACTORS = (1.0, 8.0, 64.0, 128.0, 256.0, 512.0, 1024.0)


class Law(NamedTuple):
    """How s depends on the rank, what then is the exponent of the best eta if e^2 r is what matters, and a line."""

    scaling: Callable[[Any], Any]
    exponent: float
    style: Any


LAWS = {
    "eta": Law(lambda rank: 1.0 + 0.0 * rank, -0.5, "-"),
    "muA": Law(lambda rank: ALPHA / rank, 0.0, ":"),
    "rsLoRA": Law(lambda rank: ALPHA / np.sqrt(rank), -0.25, "--"),
    "LoRA-alpha": Law(lambda rank: lora_alpha(rank) / rank, -0.25, "-."),
}


def run(seeds: int, progress: Progress) -> xr.Dataset:
    """Last and mean losses over the plane for every rank, amount of noise and seed; and of the ReLU layers."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0] for _ in range(2))
    problem, parts = SingleLayer(left / np.arange(1, SIZE + 1) @ right.T), []
    for part in progress([*RANKS, *relu_layers.RATES]):
        if part in relu_layers.RATES:
            parts.append(_layers(part, seeds))
            continue
        how: Any = {"descend": [f"adam:{step!r}" for step in STEP_SIZES.tolist()], "gradient_noise": NOISES}
        how |= {"steps": STEPS, "saves": SAVES, "progress": False}
        loss = sweep(problem, alpha=SIZES, rank=part, seeds=seeds, **how)["loss"]
        loss = loss.squeeze("init", drop=True).rename(alpha="size").fillna(np.inf)
        parts.append(xr.Dataset({"last": loss.isel(iteration=-1, drop=True), "mean": loss.mean("iteration")}))
    with xr.set_options(use_new_combine_kwarg_defaults=True):
        planes = xr.concat(parts[: len(RANKS)], "rank")
        return planes.merge(xr.concat(parts[len(RANKS) :], "optimizer")).drop_attrs()


def _layers(optimizer: str, seeds: int) -> xr.Dataset:
    """The last and the largest loss over what is raised, by how much, and draw."""
    asked = [one for moved in relu_layers.MOVED for one in relu_layers.settings(optimizer, moved, FACTORS)]
    loss = relu_layers.trained(optimizer, tuple(asked), seeds)
    loss = loss.reshape(seeds, len(relu_layers.MOVED), len(FACTORS), -1)
    dims = ("seed", "raised", "factor")
    return xr.Dataset(
        {"layers_last": (dims, loss[..., -1]), "layers_largest": (dims, loss.max(axis=-1))},
        coords={"raised": list(relu_layers.MOVED), "factor": list(FACTORS), "seed": range(seeds)},
    ).expand_dims(optimizer=[optimizer])


def draw(dataset: xr.Dataset) -> Figure:
    with panels(3, len(RANKS), height=7.4) as (figure, axes):
        for row, noise in zip(axes, NOISES, strict=False):
            planes = log10(dataset["last"].sel(gradient_noise=noise)).clip(max=HIGHEST).mean("seed")
            span = float(planes.min()), 0.3
            for ax, rank in zip(row, RANKS, strict=True):
                image = _plane(ax, planes.sel(rank=rank).transpose("step", "size"), rank, span)
                ax.set_title(f"r = {rank}, " + (f"noise {noise:g}" if noise else "no noise"))
            figure.colorbar(image, ax=row, label=r"$\log_{10}$ last loss", fraction=0.02)
            row[0].set_ylabel(r"$e = \sqrt{s}\,\eta$")
        for ax, noise in zip(axes[2], NOISES, strict=False):
            _alphas(ax, dataset["last"].sel(gradient_noise=noise))
            ax.set_title("best, " + (f"noise {noise:g}" if noise else "no noise"))
        for ax, optimizer in zip(axes[2, 2:], relu_layers.RATES, strict=True):
            _layers_raised(ax, dataset.sel(optimizer=optimizer))
            ax.set_title("ReLU layers, " + {"adam": "Adam", "gd": "GD"}[optimizer])
        axes[2, 2].legend(loc="upper center")
        both = [ax.get_legend_handles_labels()[0] for ax in (axes[0, 0], axes[2, 0])]  # one above the other
        handles = [handle for pair in zip(*both, strict=True) for handle in pair]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(LAWS) + 1)
        letters(axes)
    return figure


def _plane(ax: Any, logs: xr.DataArray, rank: int, span: tuple[float, float]) -> Any:
    """The losses, the laws, and around the least loss what is within 10 % of it."""
    image = ax.pcolormesh(SIZES, STEP_SIZES, logs, vmin=span[0], vmax=span[1], cmap="viridis", shading="nearest")
    good = float(logs.min()) + np.log10(FORGIVEN)
    ax.contour(SIZES, STEP_SIZES, logs, levels=[good], colors="white", linewidths=0.8, linestyles="solid")
    ax.set(xscale="log", yscale="log", xlabel=r"$a = \sqrt{s}$ std", xlim=SIZES[[0, -1]], ylim=STEP_SIZES[[0, -1]])
    ax.plot(SIZES, SIZES / STD * USUAL, color="tab:red", label=rf"alpha, $\eta$ = {USUAL:g}")
    for name, law in LAWS.items():
        ax.axvline(STD * np.sqrt(law.scaling(rank)), color="tab:red", linestyle=law.style, linewidth=1.0, label=name)
    return image


def _alphas(ax: Any, plane: xr.DataArray) -> None:
    for rate, colour in zip(RATES, shades(len(RATES), of="plasma"), strict=True):
        found = best_alphas(plane, rate)
        means = found.mean("seed")
        ax.fill_between(RANKS, 10 ** means["low"], 10 ** means["high"], color=colour, alpha=0.15, linewidth=0)
        ax.plot(
            RANKS,
            10 ** found["place"].mean("seed", skipna=False),
            "o-",
            markersize=3,
            color=colour,
            label=rf"$\eta$ = {rate:.2g}",
        )
    ax.plot(RANKS, lora_alpha(np.array(RANKS)), color="0.4", linestyle=":", label=r"$256\sqrt{r}$")
    ax.set(xscale="log", yscale="log", xlabel="rank r", ylabel="lora_alpha")


def _layers_raised(ax: Any, one: xr.Dataset) -> None:
    for raised, colour in zip(relu_layers.MOVED, ("tab:blue", "tab:orange"), strict=True):
        last = one["layers_last"].sel(raised=raised).mean("seed")
        ax.plot(FACTORS, last.where(last < 2.0), "o-", markersize=3, color=colour, label=raised)
        blown = last["factor"].where(~(last < 2.0), drop=True)
        ax.plot(blown, np.full(blown.size, 1.6), "x", color=colour)
    ax.set(xscale="log", yscale="log", xlabel="raised by", ylabel="last loss (x: blown up)", ylim=(None, 2.0))


def notes(dataset: xr.Dataset) -> str:
    regimes, laws, reached, layers = [], [], [], []
    for noise in NOISES:
        for rate in RATES:
            for name in ("last", "mean"):
                found = best_alphas(dataset[name].sel(gradient_noise=noise), rate)
                shown = [spread(row.values) for row in found["place"]]
                width = float((found["high"] - found["low"]).mean())
                regimes.append([f"{noise:g}", f"{rate:.2g}", name, *shown, spread(found["p"]), f"{width:.1f}"])
        for name, law in LAWS.items():
            rates, exponents = best_rates(dataset["last"].sel(gradient_noise=noise), law.scaling)
            laws.append([f"{noise:g}", name, *map(spread, rates), spread(exponents), f"{law.exponent:g}"])
        for rank in RANKS:
            plane = dataset["last"].sel(gradient_noise=noise, rank=rank)
            by_law = [10 ** at_scaling(plane, float(law.scaling(rank))).min("step") for law in LAWS.values()]
            by_alpha = [at_rate(plane, rate).min("size") for rate in RATES]
            lowest = [plane.min(["size", "step"]), *by_law, *by_alpha]
            reached.append([f"{noise:g}", rank, *(f"{float(loss.mean()):.3g}" for loss in lowest)])
    for optimizer in relu_layers.RATES:
        for raised in relu_layers.MOVED:
            one = dataset.sel(optimizer=optimizer, raised=raised).mean("seed")
            values = [_told(one.sel(factor=factor)) for factor in FACTORS]
            layers.append([{"adam": "Adam", "gd": "GD"}[optimizer], raised, *values])
    of_ranks = [f"r = {rank}" for rank in RANKS]
    return (
        f"One layer, {SIZE} x {SIZE}, singular values 1/i, {STEPS} steps of Adam; noise is the standard deviation of "
        "an entry of dL/dW. log10 of the best lora_alpha at a learning rate eta, for the last and for the mean loss of "
        "a run, with the exponent p of best ~ r^p; and the decades of lora_alpha over which the loss is within 10 % of "
        "the least. Means and standard deviations over draws; - where the best is at an end of the grid.\n\n"
        + table(["noise", "eta", "loss", *of_ranks, "p", "decades"], regimes)
        + "\n\nlog10 of the best eta by each law, for the last loss, with the exponent of the rank, and what it is if "
        "e^2 r alone matters.\n\n"
        + table(["noise", "law", *of_ranks, "exponent", "by e^2 r"], laws)
        + "\n\nThe least last loss: over the plane, over eta by each law, and over lora_alpha at each eta.\n\n"
        + table(["noise", "rank", "both", *LAWS, *(f"alpha, {rate:.2g}" for rate in RATES)], reached)
        + "\n\nFive ReLU layers, r = 8: the last relative error where lora_alpha or the step size is raised; "
        "(the largest on the way) where the error has more than doubled.\n\n"
        + table(["", "raised", *(f"x {factor:g}" for factor in FACTORS)], layers)
    )


def _told(one: xr.Dataset) -> str:
    last, largest = float(one["layers_last"]), float(one["layers_largest"])
    return "inf" if not np.isfinite(last) else f"{last:.3g}" + (f" ({largest:.2g})" if largest > 2 else "")


EXPERIMENT = Experiment.of_one(
    "what lora_alpha and the learning rate do under Adam: the loss over the plane of both, for four ranks",
    run,
    draw,
    notes,
    seeds=2,
    meanings={
        "last": "last loss: infinite where a run diverges",
        "mean": "mean loss over the saved iterations: infinite where a run diverges",
        "gradient_noise": "standard deviation of the noise in an entry of dL/dW",
        "rank": "LoRA rank",
        "size": "a = sqrt(s) std: standard deviation of A at first",
        "step": "e = sqrt(s) eta: step size of Adam",
        "seed": "seed of the draw",
        "optimizer": "optimiser of the ReLU layers",
        "raised": "what is raised in the ReLU layers",
        "factor": "by how much it is raised",
        "layers_last": "last relative error of the ReLU layers",
        "layers_largest": "largest relative error of the ReLU layers on the way",
    },
)

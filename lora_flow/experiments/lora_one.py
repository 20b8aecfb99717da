"""LoRA-One's toy experiments (arXiv 2502.01235v3, Figures 2 and 4), by gradient descent, over several draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array

from lora_flow.adapter import Adapters
from lora_flow.dynamics.descend import Descent, descend
from lora_flow.experiments.base import Experiment, Progress
from lora_flow.figures.style import BLUE, ORANGE, band, letters, mark_rounding, panels, shades
from lora_flow.initialization import gaussian_init, lora_ga_init, lora_one_theory_init
from lora_flow.problems.offset import Offset
from lora_flow.problems.one_layer import Regression, SingleLayer
from lora_flow.problems.rounding import rounding_floor, rounding_floors
from lora_flow.results.levels import AT_ROUNDING
from lora_flow.results.report import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE, RANK, TARGET_RANK, SAMPLES = 100, 8, 4, 1600
INPUTS = ("sampled", "white")
VARIANCES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # alpha^2
ALIGNMENT_STEPS, ALIGNMENT_STEP, DIP = 1500, 1 / 64, 300
RISK_STEPS, SCALED_STEP, PLAIN_STEP, DAMPING = 100, 0.5, 0.25, 1e-3
PUBLISHED_END = {1.0: 1.0, 1e-1: 1.0, 1e-2: 0.62, 1e-3: 0.265, 1e-4: 0.265}
PUBLISHED_DIP = {1e-3: 0.20, 1e-4: 0.16}
TITLES = {"sampled": f"N = {SAMPLES} samples", "white": r"infinitely many samples, $\hat\Sigma$ = I"}


def alignment(seeds: int, progress: Progress) -> xr.Dataset:
    """The turn of A to the gradient: angle and risk over the iterations, several scales, sampled and white inputs."""
    iterations = np.arange(0, ALIGNMENT_STEPS + 1, 20)
    shape = len(INPUTS), len(VARIANCES), seeds, len(iterations)
    angle, risk, plateau = np.empty(shape), np.empty(shape), np.empty((len(INPUTS), seeds))
    for seed in progress(range(seeds)):
        for i, inputs in enumerate(INPUTS):
            problem, delta, key = _draw(seed, np.ones(TARGET_RANK), inputs)
            starts = [gaussian_init(key, problem, rank=RANK, alpha=float(np.sqrt(v))) for v in VARIANCES]
            run = _descents(problem, starts, ALIGNMENT_STEPS, ALIGNMENT_STEP, iterations, "plain")
            towards = _row_space(np.asarray(problem.linearised_task()[0]))
            ((a, b),) = jax.tree.map(np.asarray, run.history)
            plateau[i, seed] = subspace_distance(towards, delta)
            for j in range(len(VARIANCES)):
                angle[i, j, seed] = [subspace_distance(towards, one) for one in a[j]]
            risk[i, :, seed] = 0.5 * np.sum((b @ a - delta) ** 2, axis=(-2, -1))
    dims = ("inputs", "alpha2", "seed", "iteration")
    return xr.Dataset(
        {"angle": (dims, angle), "risk": (dims, risk), "plateau": (("inputs", "seed"), plateau)},
        coords={"inputs": list(INPUTS), "alpha2": list(VARIANCES), "seed": range(seeds), "iteration": iterations},
    )


def preconditioning(seeds: int, progress: Progress) -> xr.Dataset:
    """The risk of LoRA-One's and LoRA-GA's starts, with and without the preconditioner, sampled and white inputs."""
    iterations = np.arange(RISK_STEPS + 1)
    shape = len(INPUTS), 2, 2, seeds, len(iterations)
    risk, (floor, rounding) = np.empty(shape), np.empty((2, len(INPUTS), 2, seeds))
    for seed in progress(range(seeds)):
        for i, inputs in enumerate(INPUTS):
            problem, delta, key = _draw(seed, np.array([4.0, 3.0, 2.0, 1.0]) / 4, inputs)
            one = lora_one_theory_init(key, problem, rank=RANK, alpha=1.0)
            approximation = lora_ga_init(key, problem, rank=RANK, alpha=0.5)
            for j, (start, solved) in enumerate([(one, problem), (approximation, Offset(problem, approximation))]):
                frozen = 0.0 if solved is problem else np.asarray(start[0].b @ start[0].a)
                values = np.linalg.svd(delta + frozen, compute_uv=False)[RANK:]
                floor[i, j, seed] = 0.5 * np.sum(values**2)
                white = SingleLayer(delta)  # whose loss the risk is
                rounding[i, j, seed] = rounding_floor(white if solved is problem else Offset(white, start), start)
                for k, (flow, step) in enumerate([("plain", PLAIN_STEP), (f"scaled:{DAMPING}", SCALED_STEP)]):
                    run = descend(
                        solved, start, steps=RISK_STEPS, step=step, saves=iterations, flow=flow, save_adapters=True
                    )
                    ((a, b),) = jax.tree.map(np.asarray, run.history)
                    risk[i, j, k, seed] = 0.5 * np.sum((b @ a - delta - frozen) ** 2, axis=(-2, -1))
    dims = ("inputs", "init", "flow", "seed", "iteration")
    return xr.Dataset(
        {
            "risk": (dims, risk),
            "floor": (dims[:2] + dims[3:4], floor),
            "rounding_floor": (dims[:2] + dims[3:4], rounding),
        },
        coords={
            "inputs": list(INPUTS),
            "init": ["lora-one-theory", "lora-ga"],
            "flow": ["plain", "scaled"],
            "seed": range(seeds),
            "iteration": iterations,
        },
    )


def draw_alignment(dataset: xr.Dataset) -> Figure:
    with panels(2, 2, height=4.8, sharex=True) as (figure, axes):
        for column, inputs in zip(axes.T, INPUTS, strict=True):
            column[0].set(yscale="log", title=TITLES[inputs], ylim=(1e-4, 2))
            column[1].set(yscale="log", xlabel="iteration")
            for variance, colour in zip(VARIANCES, shades(len(VARIANCES)), strict=True):
                one = dataset.sel(inputs=inputs, alpha2=variance)
                label = rf"$\alpha^2$ = {_power(variance)}"
                for ax, name in zip(column, ("angle", "risk"), strict=True):
                    band(one[name], ax, color=colour, label=label)
            column[1].set_ylim(bottom=1e-9)
            if inputs == "sampled":
                level = float(dataset["plateau"].sel(inputs=inputs).median())
                column[0].axhline(level, color="0.3", linestyle=":", linewidth=1)
                note = r"row spaces of $\Delta$ and $\Delta\hat\Sigma$"
                column[0].annotate(note, (1500, level), (0, -9), textcoords="offset points", ha="right", fontsize=6.5)
        axes[0, 0].set_ylabel("angle of A to the gradient (sine)")
        axes[1, 0].set_ylabel(r"risk $\frac{1}{2}\|BA - \Delta\|_F^2$")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        letters(axes)
    return figure


def draw_preconditioning(dataset: xr.Dataset) -> Figure:
    rounding = float(_rounding(dataset).max())
    with panels(1, 2, height=2.9, sharey=True) as (figure, axes):
        for ax, inputs in zip(axes[0], INPUTS, strict=True):
            ax.set(yscale="log", xlabel="iteration", title=TITLES[inputs])
            for init, colour in (("lora-one-theory", BLUE), ("lora-ga", ORANGE)):
                for flow, style in (("plain", "--"), ("scaled", "-")):
                    one = dataset["risk"].sel(inputs=inputs, init=init, flow=flow)
                    band(one, ax, rounding, color=colour, linestyle=style, label=f"{init}, {flow}")
        for ax in axes[0]:
            mark_rounding(ax, rounding)
        floor = float(dataset["floor"].sel(inputs="sampled", init="lora-ga").median())
        first = axes[0, 0]
        first.axhline(floor, color="0.3", linestyle=":", linewidth=1)
        place = (RISK_STEPS, floor)
        first.annotate("rank floor of lora-ga", place, (0, -8), textcoords="offset points", ha="right", fontsize=6.5)
        first.set_ylabel(r"risk $\frac{1}{2}\|W - W^\star\|_F^2$")
        figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        letters(axes)
    return figure


def alignment_notes(dataset: xr.Dataset) -> str:
    rows = []
    for variance in VARIANCES:
        one = dataset["angle"].sel(alpha2=variance)
        dip = one.sel(iteration=DIP)
        rows.append(
            [
                f"{variance:g}",
                PUBLISHED_DIP.get(variance, ""),
                _median(dip.sel(inputs="sampled")),
                PUBLISHED_END[variance],
                _median(one.sel(inputs="sampled").isel(iteration=-1)),
                _median(one.sel(inputs="white").isel(iteration=-1)),
                f"{float(dataset['risk'].sel(inputs='sampled', alpha2=variance).isel(iteration=-1).median()):.2g}",
            ]
        )
    header = ["alpha^2", f"published at step {DIP}", "here", "published at the end", "here", "white inputs", "risk"]
    plateau = _median(dataset["plateau"].sel(inputs="sampled"))
    return (
        f"Sine of the largest principal angle between A's and the gradient's leading {TARGET_RANK} row directions; "
        f"medians and quartiles over draws. The row spaces of Delta and Delta Shat are {plateau} apart.\n\n"
        + table(header, rows)
    )


def preconditioning_notes(dataset: xr.Dataset) -> str:
    published = {"lora-one-theory": ("-2.9", "-26"), "lora-ga": ("", "-3")}
    rows = []
    for inputs in INPUTS:
        for init, (at_start, at_end) in published.items():
            for flow in ("plain", "scaled"):
                one = dataset["risk"].sel(inputs=inputs, init=init, flow=flow)
                least = float(_rounding(dataset).sel(inputs=inputs, init=init).max())
                told = (at_start, at_end) if inputs == "sampled" and flow == "scaled" else ("", "")
                floor = dataset["floor"].sel(inputs=inputs, init=init)
                shown = _median(_log(floor)) if float(floor.max()) > 1e-20 else "0"
                ends = [_told(one.isel(iteration=i), least) for i in (0, -1)]
                rows.append([inputs, init, flow, told[0], ends[0], told[1], ends[1], shown])
    header = ["inputs", "init", "flow", "published start", "ln risk at the start", "published end", "at the end"]
    return "Natural logarithms of the risk, medians and quartiles over draws.\n\n" + table(
        [*header, f"lowest at rank {RANK}"], rows
    )


def subspace_distance(basis: np.ndarray, matrix: np.ndarray) -> float:
    """The sine of the largest principal angle between a row space, with an orthonormal `basis`, `(k, n)`, and that of
    the matrix's first k right singular vectors."""
    rows = _row_space(matrix, len(basis))
    return float(np.linalg.norm(rows - (rows @ basis.T) @ basis, 2))


def _row_space(matrix: np.ndarray, rank: int = TARGET_RANK) -> np.ndarray:
    return np.linalg.svd(matrix, full_matrices=False)[2][:rank]


def _draw(seed: int, sigma: np.ndarray, inputs: str) -> tuple[Any, np.ndarray, Array]:
    """A problem, its shift, and a key for the start; the same shift for both kinds of inputs."""
    keys = jax.random.split(jax.random.key(seed), 4)
    left, right = (np.linalg.qr(np.asarray(jax.random.normal(k, (SIZE, TARGET_RANK))))[0] for k in keys[:2])
    delta = left * sigma @ right.T
    if inputs == "white":
        return SingleLayer(delta), delta, keys[3]
    return Regression(jax.random.normal(keys[2], (SAMPLES, SIZE)), delta), delta, keys[3]


def _descents(problem: Any, starts: list[Adapters], steps: int, step: float, saves: np.ndarray, flow: str) -> Descent:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)

    def one(start: Adapters) -> Descent:
        return descend(problem, start, steps=steps, step=step, saves=saves, flow=flow, save_adapters=True)

    return eqx.filter_vmap(one)(stacked)


def _rounding(dataset: xr.Dataset) -> xr.DataArray:
    """The rounding floor of the risks; from the largest risk where the results do not have the floor."""
    if "rounding_floor" in dataset:
        return dataset["rounding_floor"]
    return rounding_floors(dataset["risk"].rename(iteration="time").max("flow").to_dataset(name="loss"))


def _told(risk: xr.DataArray, rounding: float) -> str:
    return AT_ROUNDING if float(risk.median()) < rounding else _median(_log(risk))


def _log(values: xr.DataArray) -> xr.DataArray:
    return xr.apply_ufunc(np.log, values.clip(min=1e-35))


def _median(values: xr.DataArray) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def _power(value: float) -> str:
    return f"$10^{{{round(np.log10(value))}}}$" if value < 1 else "1"


_OF_BOTH = {
    "risk": "risk: 1/2 ||B A - Delta||_F^2",
    "inputs": "inputs: sampled, or white as of infinitely many samples",
    "seed": "seed of the draw",
    "iteration": "iteration",
}
MEANINGS = {
    "lora-one": _OF_BOTH
    | {
        "angle": "sine of the largest principal angle between the rows of A and of the gradient",
        "plateau": "sine of the largest principal angle between the rows of Delta and of the gradient",
        "alpha2": "variance of the entries of A at the start",
    },
    "preconditioner": _OF_BOTH
    | {
        "floor": "least risk of any adapters of that rank",
        "rounding_floor": "risk at rounding: what is computed below it is rounding, not a number",
        "init": "initialisation",
        "flow": "plain, or preconditioned",
    },
}

EXPERIMENTS = {
    "lora-one": Experiment.of_one(
        "alignment of A with the gradient and risk, for several alpha",
        alignment,
        draw_alignment,
        alignment_notes,
        seeds=10,
        meanings=MEANINGS["lora-one"],
    ),
    "preconditioner": Experiment.of_one(
        "risk with and without the preconditioner, LoRA-One's start and LoRA-GA's",
        preconditioning,
        draw_preconditioning,
        preconditioning_notes,
        seeds=5,
        meanings=MEANINGS["preconditioner"],
    ),
}

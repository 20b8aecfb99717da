"""Constant and adaptive steps for linear networks: Figures 1 and 2 of Xu et al. 2023 (AISTATS).

The draws are those of the authors' code, which differs from the text: X is orthogonal, the solution has entries
N(0, 1/n), and W1 = rho U_0, W2 = V_0/rho with rho^2 = (sigma + sqrt(sigma^2 + 4))/2. These draws reproduce the
values of alpha_0/beta_0 in the titles of Figure 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters
from lora_flow.coordinates.narrow import narrow
from lora_flow.dynamics.descend import StepRule
from lora_flow.dynamics.network_steps import AdaptiveStep, AdmissibleStep, AroraStep, DuStep
from lora_flow.experiments.base import Experiment, Progress
from lora_flow.experiments.over_steps import curves, first_iteration, middle, over
from lora_flow.figures.style import BLUE, GREEN, ORANGE, PURPLE, Mark, band, keys, letters, panels
from lora_flow.problems.network import LinearNetwork
from lora_flow.results.report import table
from lora_flow.theory import linear_descent as theory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE, STEPS, SOLVED = 20, 200, 1e-10
BALANCED_WIDTH, BALANCED_SCALE, NOISE = 500, 0.5, 0.04  # of experiment 4.1
WIDTH = 1000  # of experiment 4.2
SIGMAS = {"sigma = 1": 1.0, "sigma = 5": 5.0, "sigma = 100": 100.0}
EXPERIMENTS = ("balanced", *SIGMAS)
PUBLISHED = dict(zip(SIGMAS, (0.505, 0.555, 0.600), strict=True))
ADAPTIVE = {"rho": "rho", "rhohat": "current", "f(., t)": "loss", "f(., 0)": "start"}
RULES = ("constant", *ADAPTIVE, "Arora", "Du")


class Settings(NamedTuple):
    """c1 and c2 of Xu et al. 2023; the authors' code names them the other way round."""

    c1: float
    c2: float


CONSTANTS = {"balanced": Settings(0.8, 1.2), **dict.fromkeys(SIGMAS, Settings(0.5, 1.5))}


def run(seeds: int, progress: Progress) -> xr.Dataset:
    """Losses, steps and proven bounds over experiment, rule, seed and iteration; the draws have the seeds 1, 2, ...

    The steps of Arora et al. and of Du et al. are compared in the balanced experiment only, and NaN elsewhere.
    """
    draws = range(1, seeds + 1)
    drawn = {(name, seed): draw_problem(name, seed) for name in EXPERIMENTS for seed in draws}

    def about_start(name: str, seed: int) -> dict[str, Any]:
        problem, start = drawn[name, seed]
        at_start = theory.constants(*problem.network(start))
        largest = theory.largest_step(at_start, *CONSTANTS[name]).step
        return {"ratio": at_start.alpha / at_start.beta, "largest_step": largest}

    def one(name: str, rule: str, seed: int) -> dict[str, Array]:
        problem, start = drawn[name, seed]
        rules = _rules(name, problem)
        return _descend(problem, start, rules[rule], rule, CONSTANTS[name]) if rule in rules else {}

    runs = over(one, {"experiment": EXPERIMENTS, "rule": RULES, "seed": draws}, progress)
    return runs.merge(over(about_start, {"experiment": EXPERIMENTS, "seed": draws})).assign_coords(
        iteration=np.arange(STEPS + 1)
    )


def draw_problem(experiment: str, seed: int) -> tuple[LinearNetwork, Adapters]:
    """A network and its start, narrowed, by the authors' recipe and generator."""
    rng = np.random.RandomState(seed)
    if experiment == "balanced":
        theta = rng.normal(0, BALANCED_SCALE, (SIDE, 1))
        targets = theta + NOISE * rng.normal(size=(SIDE, 1))
        return LinearNetwork(targets, np.eye(SIDE)), narrow(_balanced(theta, BALANCED_WIDTH))
    x, theta = np.linalg.qr(rng.normal(size=(SIDE, SIDE)))[0], rng.normal(0, SIDE**-0.5, (SIDE, SIDE))
    sigma = SIGMAS[experiment]
    scale = np.sqrt((sigma + np.sqrt(sigma**2 + 4)) / 2)
    w1, w2 = scale * rng.normal(size=(SIDE, WIDTH)), rng.normal(size=(WIDTH, SIDE)) / scale
    return LinearNetwork(x @ theta, x), narrow((Adapter(jnp.asarray(w1.T), jnp.asarray(w2.T)),))


def _balanced(product: np.ndarray, width: int) -> Adapters:
    """W1 W2 = `product`, (n, 1), with W1^T W1 = W2 W2^T."""
    size = np.sqrt(np.linalg.norm(product))
    first = np.eye(width, 1)
    return (Adapter(jnp.asarray(first * product.T / size), jnp.asarray(size * first.T)),)


def _rules(experiment: str, problem: LinearNetwork) -> dict[str, StepRule]:
    c1, c2 = CONSTANTS[experiment]
    ours: dict[str, StepRule] = {name: AdaptiveStep(rate, c1, c2) for name, rate in ADAPTIVE.items()}
    ours["constant"] = AdmissibleStep(c1, c2)
    if experiment != "balanced":
        return ours
    epsilon = jnp.linalg.norm(problem.solution) / 2  # of the authors' code, where X = I
    return {**ours, "Arora": AroraStep(), "Du": DuStep(epsilon)}


@eqx.filter_jit
def _descend(
    problem: LinearNetwork, start: Adapters, rule: StepRule, name: str, settings: Settings
) -> dict[str, Array]:
    """At every iteration: the loss, the step, the step without the cap, and the proven bound of the loss."""
    if name in ("Arora", "Du"):
        return curves(problem, start, rule, STEPS, lambda *_: {})
    at_start = theory.constants(*problem.network(start))

    def look(adapters: Adapters, loss: Array, step: Array) -> dict[str, Any]:
        bound = _rate(name, problem, adapters, at_start, loss, settings)
        return {"factor": bound.at(step), "free_step": bound.best_step()}

    seen = curves(problem, start, rule, STEPS, look)
    factor, loss = seen.pop("factor"), seen["loss"]
    seen["bound"] = loss[0] * jnp.concatenate([jnp.ones(1), jnp.cumprod(factor[:-1])])
    return seen | ({"free_step": jnp.full_like(loss, jnp.nan)} if name == "constant" else {})


def _rate(
    name: str, problem: LinearNetwork, adapters: Adapters, start: theory.Constants, loss: Array, settings: Settings
) -> theory.RateBound:
    """The bound of the next ratio of losses from which a rule's convergence follows."""
    if name == "rho":
        return theory.rate(*problem.network(adapters))
    if name == "rhohat":
        return theory.current_rate_bound(*problem.network(adapters))
    return theory.rate_bound(start, start.loss if name == "f(., 0)" else loss, *settings)


MARKS = {
    "constant": Mark(r"constant $\eta_{\max}$", {"color": "0.75", "linewidth": 5, "solid_capstyle": "butt"}),
    "rho": Mark(r"adaptive, $\rho$", {"color": BLUE}),
    "rhohat": Mark(
        r"adaptive, $\hat\rho$", {"color": PURPLE, "linestyle": "", "marker": "o", "ms": 3, "markevery": 20}
    ),
    "f(., t)": Mark(r"adaptive, $f(\cdot, t)$", {"color": GREEN}),
    "f(., 0)": Mark(r"adaptive, $f(\cdot, 0)$", {"color": ORANGE}),
    "Arora": Mark("Arora et al.", {"color": "0.1", "linestyle": (0, (1, 1))}),
    "Du": Mark("Du et al.", {"color": "0.1", "linestyle": "-."}),
}
BOUND = Mark("its proven bound", {"color": "0.4", "linestyle": "--", "linewidth": 1})
FREE = Mark("step without the cap", {"color": "0.4", "linestyle": ":", "linewidth": 1})


def draw(dataset: xr.Dataset) -> Figure:
    with panels(2, len(EXPERIMENTS), height=4.4, look={"axes.titlesize": 7}, sharex=True) as (figure, axes):
        for column, experiment in zip(axes.T, EXPERIMENTS, strict=True):
            one = dataset.sel(experiment=experiment)
            for name, mark in MARKS.items():
                if bool(one["loss"].sel(rule=name).notnull().any()):
                    _draw_rule(one.sel(rule=name), column, mark.style)
            column[0].set(yscale="log", ylim=(1e-20, 3), title=_title(one))
            column[1].set(yscale="log", xlabel="iteration", ylim=(0.35, 7))
        for ax in axes[1, 1:]:
            ax.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
            ax.minorticks_off()
        for ax in (*axes[0, 1:], *axes[1, 2:]):
            ax.tick_params(labelleft=False)
        axes[1, 0].set_ylim(3e-5, 7)
        axes[0, 0].set_ylabel(r"loss $L/L_0$")
        axes[1, 0].set_ylabel(r"step size, in units of $\eta_{\max}$")
        figure.legend(
            handles=keys((*MARKS.values(), BOUND, FREE)), loc="outside lower center", ncols=5, columnspacing=1.2
        )
        letters(axes)
    return figure


def _draw_rule(one: xr.Dataset, axes: np.ndarray, style: Mapping[str, Any]) -> None:
    start = one["loss"].isel(iteration=0)
    for ax in axes:
        ax.set_yscale("log")
    band(one["loss"] / start, axes[0], **style)
    colour, largest = style["color"], one["largest_step"]
    if bool(one["bound"].notnull().any()):
        middle(axes[0], one["bound"] / start, **{**BOUND.style, "color": colour})
    band(one["step"] / largest, axes[1], **style)
    if str(one["rule"].values) in ("rho", "rhohat"):
        middle(axes[1], one["free_step"] / largest, **{**FREE.style, "color": colour})


def _title(one: xr.Dataset) -> str:
    name = str(one["experiment"].values)
    shown = "balanced, m = 1" if name == "balanced" else name.replace("sigma", r"$\sigma$")
    published = f" (publ. {PUBLISHED[name]:.3f})" if name in PUBLISHED else ""
    return f"{shown}\n" + rf"$\alpha_0/\beta_0$ = {float(one['ratio'].mean()):.3f}{published}"


def notes(dataset: xr.Dataset) -> str:
    rows = [
        [experiment, rule, *_row(dataset.sel(experiment=experiment, rule=rule))]
        for experiment in EXPERIMENTS
        for rule in RULES
        if bool(dataset["loss"].sel(experiment=experiment, rule=rule).notnull().any())
    ]
    header = ["experiment", "rule", "first step / eta_max", "last", f"steps to {SOLVED:g} L_0"]
    header += [f"log10 L/L_0 at {STEPS}", "proven"]
    return f"{_about(dataset)}\n\n{_findings(dataset)}\n\n" + table(header, rows)


def _about(dataset: xr.Dataset) -> str:
    ratios = [f"{float(dataset['ratio'].sel(experiment=name).mean()):.3f} ({PUBLISHED[name]:.3f})" for name in SIGMAS]
    return (
        f"Xu et al. 2023 (AISTATS), experiment 4.1 (balanced, n = {SIDE}, m = 1, c1 = 0.8, c2 = 1.2) and 4.2 "
        f"(n = m = {SIDE}, h = {WIDTH}, c1 = 0.5, c2 = 1.5), with the recipe, constants and random generator of the "
        f"authors' code; medians of {dataset.sizes['seed']} draws. Mean alpha_0/beta_0 (published): "
        f"{', '.join(ratios)}. Du's epsilon is ||Y||_F/2, as in the code."
    )


def _findings(dataset: xr.Dataset) -> str:
    capped = dataset["step"].sel(rule=["rho", "rhohat"]) >= dataset["largest_step"] * (1 - 1e-9)
    by_rho, by_rhohat = (100 * float(capped.sel(rule=rule).mean()) for rule in ("rho", "rhohat"))
    free = dataset["free_step"].sel(rule="rho") / dataset["largest_step"]
    broken = int((dataset["loss"] > dataset["bound"] * (1 + 1e-9) + rounding(dataset)).sum())
    return (
        f"Losses above their bounds, beyond rounding: {broken}. The cap eta_max binds at {by_rho:.3g} % of the steps "
        f"by rho and {by_rhohat:.3g} % of the steps by rhohat, which are then no faster than the constant eta_max. "
        f"Without the cap, steps by rho would be {float(free.min()):.2g} to {float(free.max()):.2g} eta_max. "
        "Steps by f are shorter than eta_max, and slower: the step with the best guarantee is not the fastest."
    )


def rounding(dataset: xr.Dataset) -> xr.DataArray:
    """The loss, 1e-16 L_0, below which a residual is rounding and no bound is tested."""
    return 1e-16 * dataset["loss"].isel(iteration=0)


def _row(one: xr.Dataset) -> list[str]:
    step = (one["step"] / one["largest_step"]).median("seed")
    relative = one["loss"] / one["loss"].isel(iteration=0)
    first = first_iteration(relative <= SOLVED)
    proven = (one["bound"] / one["loss"].isel(iteration=0)).isel(iteration=-1)
    ends = [f"{float(np.log10(end.median())):.3g}" for end in (relative.isel(iteration=-1), proven)]
    steps = [f"{float(step.isel(iteration=at)):.3g}" for at in (0, -1)]
    return [*steps, f"{float(first):g}" if np.isfinite(first) else "-", ends[0], ends[1].replace("nan", "-")]


MEANINGS = {
    "loss": "loss",
    "step": "step size",
    "bound": "proven bound of the loss",
    "free_step": "step size without the cap eta_max",
    "ratio": "alpha/beta at the start, of Xu et al. 2023",
    "largest_step": "eta_max of Xu et al. 2023",
    "experiment": "experiment of Xu et al. 2023",
    "rule": "step rule",
    "seed": "seed of the draw",
    "iteration": "iteration",
}

EXPERIMENT = Experiment.of_one(
    "constant and adaptive steps of linear networks, with their proven bounds",
    run,
    draw,
    notes,
    seeds=3,
    meanings=MEANINGS,
)

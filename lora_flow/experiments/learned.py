"""Whether a start that is learned beats those that people have thought of, at one norm, and what it looks like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from lora_flow.adapter import Adapter
from lora_flow.design.optimise import optimise
from lora_flow.dynamics.lanes import finished, solve_lanes
from lora_flow.experiments.base import Experiment, Progress
from lora_flow.figures.learned import learned_start
from lora_flow.initialization import initialize
from lora_flow.initialization.directions import triplets
from lora_flow.initialization.learned import LearnedStart
from lora_flow.initialization.of_norm import gaussian_norm, on_sphere
from lora_flow.problems.base import linearised_task
from lora_flow.recipes.aligned import aligned_problem
from lora_flow.recipes.turned import misaligned, noisy
from lora_flow.results.report import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALPHA, RANK, T1 = 1e-3, 4, 1.0
TRAINED, UNSEEN = (100, 101), 5  # seeds of the tasks that the rule learns from; the number of others
KINDS = ("aligned", "misaligned", "noisy", "rank 2")
INITS = ("gaussian", "spectral", "lora-one", "gora")
RULE, ENTRIES = "learned rule", "learned entries"
STEPS, RULE_STEPS = 150, 60


def task(kind: str, seed: int) -> Any:
    """A task of a kind, all of the shapes of Figure 1's problem."""
    key, turn = jax.random.split(jax.random.key(seed))
    if kind == "rank 2":
        return aligned_problem(key, component=(0, 1), shift_scale=(5.0, 3.0))
    problem = aligned_problem(key)
    if kind == "misaligned":
        return misaligned(problem, turn, angle=30.0)
    return noisy(problem, turn, noise=0.1) if kind == "noisy" else problem


def run(seeds: int, progress: Progress) -> xr.Dataset:
    """Entries learned on one aligned task, a rule learned on two of each kind, and both and others on unseen tasks."""
    how: Any = {"alpha": ALPHA, "rank": RANK, "t1": T1, "progress": False}
    dataset = xr.Dataset()
    for part in progress(["entries", "rule", *KINDS]):
        if part == "entries":
            found = optimise(task("aligned", 0), "adapters", restarts=seeds, steps=STEPS, **how)
            dataset = found.dataset.assign_attrs(problem=str(found.dataset.attrs["problem"]))
            entries = found.start
        elif part == "rule":
            family = {f"{kind} {seed}": task(kind, seed) for kind in KINDS for seed in TRAINED}
            rule = optimise(family, "scheme", restarts=3, steps=RULE_STEPS, **how)
            dataset["rule_objective"] = ("rule_restart", "rule_step"), rule.dataset["objective"].values
            for name in ("mix", "power"):
                dataset[f"rule_{name}"] = float(rule.start.numbers[name])
            weights = np.exp(rule.start.numbers["layers"])
            dataset["rule_weight"] = "layer", weights / weights.max()
        else:
            learned = [entries if part == "aligned" else None] * UNSEEN
            values = [_losses(task(part, seed), learned[seed], rule.start, seeds) for seed in range(UNSEEN)]
            dataset[f"loss {part}"] = ("task", "start", "seed"), np.stack(values)
    stacked = xr.concat([dataset[f"loss {kind}"] for kind in KINDS], "kind").rename("unseen")
    dataset = dataset.drop_vars([f"loss {kind}" for kind in KINDS]).assign(unseen=stacked)
    return dataset.assign_coords(kind=list(KINDS), start=[*INITS, RULE, ENTRIES], seed=range(seeds))


def _losses(problem: Any, entries: LearnedStart | None, rule: LearnedStart, seeds: int) -> np.ndarray:
    """log10 L(T) from every start at one norm, `(start, seed)`; NaN where entries were learned on another kind."""
    keys = jax.random.split(jax.random.key(7), seeds)
    radius = gaussian_norm(ALPHA, RANK, problem.layers)

    def drawn(init: Any) -> Any:
        def one(key: Any) -> Any:
            return on_sphere(initialize(init, key, problem, rank=RANK, alpha=ALPHA, side="A"), radius)

        return jax.vmap(one)(keys)

    named = [*INITS, rule, *([] if entries is None else [entries])]
    if np.linalg.matrix_rank(np.asarray(problem.shift), tol=1e-8) > RANK:
        named[INITS.index("spectral")] = _spectral
    starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(drawn, named))
    solved = finished(solve_lanes(problem, starts, np.array([0.0, T1]), keep=("loss",)))
    found = np.log10(np.asarray(solved.observables["loss"])[..., -1])
    return np.pad(found, [(0, len(INITS) + 2 - len(found)), (0, 0)], constant_values=np.nan)


def _spectral(key: Any, problem: Any, rank: int, alpha: Any) -> Any:
    """The spectral start along as many of the task's directions as the rank has, where the task has more."""
    keys = jax.random.split(key, len(problem.layers))
    return tuple(
        Adapter(alpha * jax.random.normal(one, (rank, 1)) * triplets(layer, rank)[2], jnp.zeros((layer.shape[0], rank)))
        for one, layer in zip(keys, linearised_task(problem), strict=True)
    )


def draw(dataset: xr.Dataset) -> Figure:
    return learned_start(dataset, _compared(dataset))


def _compared(dataset: xr.Dataset) -> dict[str, float]:
    """The objective of other starts, medians over seeds, on the task that entries were learned on."""
    one = dataset["unseen"].sel(kind="aligned").isel(task=0).median("seed")
    return {init: float(one.sel(start=init)) for init in INITS}


def notes(dataset: xr.Dataset) -> str:
    first, best = dataset["objective"].isel(step=0), dataset["objective"].min("step")
    last = dataset.isel(step=-1)
    angles = ", ".join(
        f"{factor}_{layer} {float(last['angle'].sel(layer=layer, factor=factor).max('pair').median('restart')):.0f}"
        for layer in dataset["layer"].values
        for factor in dataset["factor"].values
    )
    shares = ", ".join(
        f"{factor}_{layer} {float(last['share'].sel(layer=layer, factor=factor).median('restart')):.2f}"
        for layer in dataset["layer"].values
        for factor in dataset["factor"].values
    )
    weights = " and ".join(f"{float(one):.2f}" for one in dataset["rule_weight"].values)
    rows = []
    for kind in KINDS:
        one = dataset["unseen"].sel(kind=kind).isel(task=slice(1, None) if kind == "aligned" else slice(None))
        means = one.sel(start=[*INITS, RULE]).mean(["task", "seed"])
        rows.append([kind, *(f"{float(value):.2f}" for value in means.values)])
    return (
        f"Starts of one norm, that of Gaussian ones at alpha = {ALPHA:g} and rank {RANK}. Every entry learned on one "
        f"aligned task, {first.size} random starts: log10 L(T = {T1:g}) goes from {float(first.mean()):.2f} to "
        f"{float(best.mean()):.2f} in the mean, {float(best.min()):.2f} at best; on that task "
        + ", ".join(f"{name} {value:.2f}" for name, value in _compared(dataset).items())
        + f". Angles to the spectral span at the end, in degrees, medians: {angles}. Shares of the squared norm: "
        f"{shares}.\n\nThe rule, learned on {len(TRAINED)} tasks of each kind: mix {float(dataset['rule_mix']):.3f} "
        f"(pi/4 is 0.785), power {float(dataset['rule_power']):.2f}, weights of the layers {weights}. log10 L(T) on "
        "tasks that it has not seen, means over tasks and seeds:\n\n" + table(["tasks", *INITS, RULE], rows)
    )


EXPERIMENT = Experiment.of_one(
    "a start that is learned, beside spectral, LoRA-One and GoRA at one norm, and a rule on unseen tasks",
    run,
    draw,
    notes,
    seeds=5,
    meanings={
        "unseen": "log10 of the loss at the end: from each start, on tasks that were not learned from",
        "rule_objective": "log10 of the loss that the rule was learned by: mean over its tasks",
        "rule_mix": "mix of the rule: 0 for A alone, pi/4 for both alike",
        "rule_power": "power of the gradient's singular values in the rule",
        "rule_weight": "weight of a layer in the rule: relative to the largest",
        "kind": "kind of tasks",
        "task": "number of the task",
        "start": "initialisation",
        "seed": "seed of the draw",
    },
)

"""Continual learning: what each way to protect old inputs forgets and costs, over the overlap with the new task."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters
from lora_flow.dynamics.flows import Chain, Flow, LoRAPro, Plain
from lora_flow.dynamics.in_turn import learn_in_turn
from lora_flow.dynamics.lanes import require_finished
from lora_flow.dynamics.protected import Protected, SafeGradient
from lora_flow.dynamics.solve import solve
from lora_flow.experiments.base import Experiment, Progress
from lora_flow.figures.style import BLUE, GREEN, ORANGE, PURPLE, band, letters, panels
from lora_flow.initialization import gaussian_init, keep_away
from lora_flow.problems.base import Problem
from lora_flow.problems.continual import ProtectedInputs
from lora_flow.problems.one_layer import SingleLayer
from lora_flow.recipes.continual import tasks_problem
from lora_flow.results.report import table
from lora_flow.runtime.compiling import compiled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALL_B = 1e-3  # standard deviation of B(0) where a flow divides by B^T B
DAMPING = 1e-6  # of the exact rule: where the new task asks for nothing new, Pi A goes to zero
ALPHA, END = 0.2, 150.0
MARKS = {"plain": "o", "projected": "s", "least-squares": "D", "exact": "^", "safe-start": "x"}


def with_small_b(key: Array, problem: Problem, rank: int, alpha: float | Array) -> Adapters:
    """A ~ N(0, alpha^2), and B ~ N(0, SMALL_B^2) for the flows that divide by B^T B."""
    ((a, b),) = gaussian_init(key, problem, rank=rank, alpha=alpha)
    return (Adapter(a, SMALL_B * jax.random.normal(jax.random.fold_in(key, 1), b.shape)),)


class Rule(NamedTuple):
    """A way to learn a new task: the flow for a problem and protected inputs V, and the start."""

    label: str
    flow: Callable[[Any, Any], Flow]
    away: bool = False  # whether A(0) V = 0
    init: Callable[..., Adapters] = gaussian_init
    colour: str = "0.3"


RULES = {
    "plain": Rule("plain", lambda problem, basis: Plain(), colour=BLUE),
    "projected": Rule("projected", SafeGradient, colour=ORANGE),
    "least-squares": Rule(
        "least squares", lambda problem, basis: Chain(SafeGradient(problem, basis), LoRAPro()), init=with_small_b
    ),
    "exact": Rule(
        "exact", lambda problem, basis: Protected(basis, exact=True, damping=DAMPING), init=with_small_b, colour=PURPLE
    ),
    "safe-start": Rule("safe start", lambda problem, basis: Protected(basis), away=True, colour=GREEN),
}
IN_TURN = ("plain", "projected", "exact", "safe-start")


class Sizes(NamedTuple):
    """Of one layer with m outputs and n inputs, k of which are protected, a shift of rank 2 and adapters of rank r."""

    m: int = 20
    n: int = 24
    r: int = 6
    k: int = 4
    overlaps: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    side: int = 24  # m = n of the tasks in turn
    turn_rank: int = 4
    turn_overlaps: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)


SIZES = Sizes()


def shared_shift(key: Array, *, m: int, n: int, k: int, overlap: float | Array) -> Float[Array, "m n"]:
    """What a new task asks for: rank 2, norm 1, and the share `overlap` of its square on the first k inputs.

    Both singular values are equal. Each right singular vector has the same share on the first k inputs.
    """
    keys = jax.random.split(key, 3)
    left, old, new = (
        jnp.linalg.qr(jax.random.normal(one, (size, 2)))[0] for one, size in zip(keys, (m, k, n - k), strict=True)
    )
    right = jnp.concatenate([jnp.sqrt(overlap) * old, jnp.sqrt(1 - overlap) * new])
    return left @ right.T / jnp.sqrt(2.0)


def run(seeds: int, progress: Progress, sizes: Sizes = SIZES) -> xr.Dataset:
    """One new task after an old one, and three tasks in turn, for every rule and overlap."""
    one, several = ("rule", "overlap", "seed"), ("turn_rule", "turn_overlap", "seed")
    ends = np.stack([one_task(name, seeds, sizes) for name in progress(RULES)])
    turns = np.stack([in_turn(name, seeds, sizes) for name in progress(IN_TURN)])
    return xr.Dataset(
        {
            "forgetting": (one, ends[..., 0]),
            "new_loss": (one, ends[..., 1]),
            "forgotten": ((*several, "task"), turns[..., 0, :]),
            "when_learned": ((*several, "task"), turns[..., 1, :]),
        },
        coords={
            "rule": list(RULES),
            "overlap": list(sizes.overlaps),
            "turn_rule": list(IN_TURN),
            "turn_overlap": list(sizes.turn_overlaps),
            "task": [1, 2, 3],
            "seed": range(seeds),
        },
        attrs=sizes._asdict(),
    )


def one_task(name: str, seeds: int, sizes: Sizes = SIZES) -> np.ndarray:
    """Forgetting 1/2 ||(W - W0) V||_F^2 and the new loss at the end, `(overlap, seed, 2)`.

    White inputs; V has the first k inputs, so that all overlaps and seeds share a program.
    """
    m, n, r, k = sizes.m, sizes.n, sizes.r, sizes.k
    rule, basis = RULES[name], jnp.eye(n, k)
    keys = jax.random.split(jax.random.key(0), seeds)

    def draw(overlap: Array, key: Array) -> tuple[Array, Adapters]:
        shift = shared_shift(key, m=m, n=n, k=k, overlap=overlap)
        begun = rule.init(jax.random.fold_in(key, 2), SingleLayer(shift), rank=r, alpha=ALPHA)
        return shift, keep_away(begun, basis) if rule.away else begun

    over_seeds = jax.vmap(draw, in_axes=(None, 0))
    shifts, starts = jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))(jnp.asarray(sizes.overlaps), keys)
    status, forgotten, loss = _ends(name, shifts, starts, basis)
    require_finished(status)
    return np.stack([np.asarray(forgotten), np.asarray(loss)], axis=-1)


@compiled(quickly=True)
def _ends(name: str, shifts: Array, starts: Adapters, basis: Array) -> tuple[Array, Array, Array]:
    """Status, forgetting and loss at the end, `(overlap, seed)`; B(0) A(0) is not counted as a change."""

    def one(shift: Array, begun: Adapters) -> tuple[Array, Array, Array]:
        problem = SingleLayer(shift)
        how: Any = {"flow": RULES[name].flow(problem, basis), "derivatives": "forward"}
        ended = solve(problem, begun, t1=END, saves=2, **how)
        ((a, b),), ((a0, b0),) = ended.adapters, begun
        changed = (b @ a - b0 @ a0) @ basis
        return ended.status, 0.5 * jnp.sum(changed**2), ended.observables["loss"][-1]

    return jax.vmap(jax.vmap(one))(shifts, starts)


def in_turn(name: str, seeds: int, sizes: Sizes = SIZES, **how: Any) -> np.ndarray:
    """Forgetting of each of three tasks, and the loss of each when it was learned, `(overlap, seed, 2, 3)`.

    `how` replaces the end of the flow by arguments of `learn_in_turn`, those of descent for instance.
    """
    rule, found = RULES[name], np.empty((len(sizes.turn_overlaps), seeds, 2, 3))
    how = how or {"t1": END, "saves": 2}
    for i, overlap in enumerate(sizes.turn_overlaps):
        for seed in range(seeds):
            tasks = tasks_problem(jax.random.key(seed), m=sizes.side, n=sizes.side, overlap=overlap)
            learned = learn_in_turn(
                tasks,
                jax.random.fold_in(jax.random.key(seed), 1),
                rank=sizes.turn_rank,
                alpha=ALPHA,
                init=rule.init,
                away=rule.away,
                flow=rule.flow,
                inputs=ProtectedInputs(sizes.side),
                **how,
            )
            require_finished(learned.status)
            found[i, seed] = learned.forgetting, learned.when_learned
    return found


def draw(dataset: xr.Dataset) -> Figure:
    with panels(2, 2, height=4.2) as (figure, axes):
        for ax, name in zip(axes[0], ("forgetting", "new_loss"), strict=True):
            for rule, of in RULES.items():
                _curve(ax, dataset[name].sel(rule=rule), rule, of)
            overlap = dataset["overlap"].values
            ax.plot(overlap, overlap / 2, color="0.2", linestyle=":", label=r"$\frac{1}{2}\|\Delta V\|^2$")
            ax.set(xlabel=r"overlap, $\|\Delta V\|^2/\|\Delta\|^2$")
        for ax, values in zip(axes[1], _of_three(dataset), strict=True):
            for rule in IN_TURN:
                _curve(ax, values.sel(turn_rule=rule), rule, RULES[rule])
            ax.set(xlabel="overlap, cosine between the tasks' inputs")
        axes[0, 0].set(title="a new task: forgetting", ylabel=r"$\frac{1}{2}\|(W - W_0)\,V\|^2$")
        axes[0, 1].set(title="a new task: its loss", ylabel="new loss")
        axes[1, 0].set(title="three in turn: forgetting", ylabel="forgetting of tasks 1 and 2")
        axes[1, 1].set(title="three in turn: loss when learned", ylabel="loss of tasks 2 and 3")
        for ax in axes.flat:
            first, last = ax.get_xlim()
            ax.set_xlim(first - 0.02 * (last - first), last + 0.02 * (last - first))  # room for whole markers
        letters(axes)
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(handles))
    return figure


def _curve(ax: Axes, values: xr.DataArray, name: str, rule: Rule) -> None:
    band(values, ax, color=rule.colour, marker=MARKS[name], ms=4, label=rule.label)


def _of_three(dataset: xr.Dataset) -> tuple[xr.DataArray, xr.DataArray]:
    """Means over tasks 1 and 2 of what is forgotten, and over tasks 2 and 3 of the losses when they were learned."""
    old, new = dataset["forgotten"].sel(task=[1, 2]), dataset["when_learned"].sel(task=[2, 3])
    return old.mean("task"), new.mean("task")


def notes(dataset: xr.Dataset) -> str:
    sizes, means = Sizes(**dataset.attrs), dataset.mean("seed")
    rows, turns = [], []
    for overlap in dataset["overlap"].values:
        here = means.sel(overlap=overlap)
        pairs = [[float(here[name].sel(rule=rule)) for name in ("forgetting", "new_loss")] for rule in RULES]
        rows.append([f"{overlap:g}", f"{overlap / 2:g}", *(_told(pair) for pair in pairs)])
    for overlap in dataset["turn_overlap"].values:
        here = means.sel(turn_overlap=overlap)
        told = []
        for rule in IN_TURN:
            one = here.sel(turn_rule=rule)
            told.append(f"{_told(one['forgotten'].values[:2])}; {_told(one['when_learned'].values)}")
        turns.append([f"{overlap:g}", *told])
    labels = [rule.label for rule in RULES.values()]
    return (
        f"One new task after an old one: forgetting and new loss, means of {dataset.sizes['seed']} draws, {sizes.m} x "
        f"{sizes.n}, r = {sizes.r}, {sizes.k} protected inputs, to t = {END:g}. The shift Delta has rank 2, norm 1 and "
        "the share `overlap` of its square on old inputs. The floor 1/2 ||Delta V||^2 is the least loss under exact "
        "protection.\n\n"
        + table(["overlap", "floor", *labels], rows)
        + f"\n\nThree tasks in turn, {sizes.side} x {sizes.side}, r = {sizes.turn_rank}, each with inputs of 4 "
        "dimensions; overlap is the cosine between two tasks' inputs. Forgetting of tasks 1 and 2; the loss of each "
        "task when it was learned.\n\n" + table(["overlap in turn", *(RULES[rule].label for rule in IN_TURN)], turns)
    )


def _told(values: Any) -> str:
    """Two digits, and 0 for what is less than 1e-5."""
    return ", ".join("0" if abs(value) < 1e-5 else f"{value:.2g}" for value in np.asarray(values))


MEANINGS = {
    "forgetting": "1/2 ||(W - W0) V||_F^2 after one new task: the old task's loss",
    "new_loss": "loss of the one new task at the end",
    "forgotten": "loss of a task after all three less that when it was learned",
    "when_learned": "loss of a task when it was learned",
    "rule": "rule of the one new task",
    "overlap": "share of the squared shift on old inputs, of the one new task",
    "turn_rule": "rule of the three tasks in turn",
    "turn_overlap": "cosine between the inputs of two tasks, of the three tasks in turn",
    "task": "number of the task",
    "seed": "seed of the draw",
}

EXPERIMENT = Experiment.of_one(
    "what plain, projected, exact and safely started LoRA forget of old tasks, and what they still learn",
    run,
    draw,
    notes,
    seeds=5,
    meanings=MEANINGS,
)

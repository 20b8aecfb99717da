"""The grid of starts, sizes and ranks, of one layer or several together: losses over time, and what starts are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from lora_flow.adapter import Adapter
from lora_flow.advice.closed import closed_shares
from lora_flow.advice.starts import Drawn, draw, own_alphas, unit
from lora_flow.advice.tasks import Task, shares
from lora_flow.bridge.schemes import offsets
from lora_flow.results.phases import fall_to
from lora_flow.runtime.progress import Progress
from lora_flow.sweeps.values import start_values

OWN = "own"  # the size that `peft init` chooses by itself
BEGINS = 0.9  # of the loss: below it learning has begun
LARGEST = 30.0  # the size beyond which a start is not simulated
SAVES, DECADES, HORIZON = 100, 4, 20.0  # of the times, which end at HORIZON/(s sigma) of the last pair that is needed
DIMS = ("init", "size", "rank")


class Asked(NamedTuple):
    """What is looked at: names, sizes relative to the solution's, ranks (of several layers their mean), and seeds."""

    init: tuple[str, ...]
    size: tuple[float, ...]
    rank: tuple[int, ...]
    seeds: int


def ranks_of(tasks: Sequence[Task], rank: int, most: int) -> list[int]:
    """The rank of each layer with so many on average: those that hold most of all gradients' squared norm together.

    All layers run on one clock, and a small start learns their singular pairs in the order of the singular values.
    """
    room = [min(most, *task.shape) for task in tasks]
    chosen = [1] * len(tasks)
    pool = [(task.sigma[j], i) for i, task in enumerate(tasks) for j in range(1, room[i])]
    for _, i in sorted(pool, key=lambda one: -one[0])[: (rank - 1) * len(tasks)]:
        chosen[i] += 1
    return chosen


def floors_of(tasks: Sequence[Task], ranks: Sequence[int]) -> float:
    """The share of all layers' loss that these ranks leave."""
    left = sum(task.loss * task.floor(rank) for task, rank in zip(tasks, ranks, strict=True))
    return left / sum(task.loss for task in tasks)


def times_for(tasks: Sequence[Task], level: float) -> np.ndarray:
    """0, and then times in equal ratios: up to when the last singular pair that the level needs is learned."""
    total = sum(task.loss for task in tasks)
    rates = np.concatenate([task.scaling * task.sigma[: len(task.energies)] for task in tasks])
    energies = np.concatenate([task.energies for task in tasks])
    order = np.argsort(-rates)[: np.sum(rates > 1e-9 * rates.max())]
    left = total - 0.5 * np.cumsum(energies[order])
    last = int(np.argmax(left < level * total)) if np.any(left < level * total) else -1
    end = HORIZON / rates[order[last]]
    return np.append(0.0, np.geomspace(end * 10.0**-DECADES, end, SAVES))


def grid(tasks: list[Task], asked: Asked, level: float, progress: bool = True) -> xr.Dataset:
    """The dataset over init, size and rank, and what each layer is like.

    Several layers share the clock and the alpha of a cell; its loss is their sum.
    """
    times, most = times_for(tasks, level), max(asked.rank)
    chosen = np.array([ranks_of(tasks, rank, most) for rank in asked.rank])  # (rank, layer)
    drawn = {
        (init, j, i): draw(task, init, int(chosen[j, i]), asked.seeds)
        for init in asked.init
        for j in range(len(asked.rank))
        for i, task in enumerate(tasks)
    }
    alphas = _alphas(tasks, asked, drawn)
    with Progress(alphas[..., 0].size, "sizes", shown=progress, what="starts") as bar:
        losses = [
            _losses(task, asked, {one: drawn[*one, i] for one in _cells(asked)}, alphas[i], times, bar)
            for i, task in enumerate(tasks)
        ]
    whole = sum(task.loss for task in tasks)
    weights = [task.loss / whole for task in tasks]
    together = {
        name: sum(weight * one[name] for weight, one in zip(weights, losses, strict=True))
        for name in ("loss", "closed", "loss_floor")
    }
    told = _told(together, alphas[int(np.argmax([task.top for task in tasks]))], asked, level, times)
    of_cells = {
        name: (DIMS, np.max([one[name] for one in losses], axis=0)) for name in ("relative_size", "norm", "curvature")
    }
    of_cells["dead_directions"] = (DIMS, np.sum([one["dead_directions"] for one in losses], axis=0))
    pairs = [list(zip(tasks, row, strict=True)) for row in chosen.tolist()]
    of_layers = {
        "ranks": (("rank", "layer"), chosen),
        "held": (("rank", "layer"), [[task.held(rank) for task, rank in row] for row in pairs]),
        "floor": (
            ("rank", "layer"),
            [[task.floor(rank) for task, rank in row] for row in pairs],
        ),
        "sigma_1": ("layer", [task.sigma[0] for task in tasks]),
        "share": ("layer", weights),
        "left_out": ("layer", [task.left / task.loss for task in tasks]),
    }
    return told.assign(of_cells | of_layers).assign_coords(layer=[task.name for task in tasks])


def _cells(asked: Asked) -> list[tuple[str, int]]:
    return [(init, j) for init in asked.init for j in range(len(asked.rank))]


def _alphas(tasks: list[Task], asked: Asked, drawn: dict[tuple[str, int, int], Drawn]) -> np.ndarray:
    """alpha `(layer, init, size, rank)`: one for all layers, of the sizes of the one with the largest gradient."""
    first = int(np.argmax([task.top for task in tasks]))
    alphas = np.full((len(tasks), len(asked.init), len(asked.size) + 1, len(asked.rank)), np.nan)
    for k, init in enumerate(asked.init):
        for j in range(len(asked.rank)):
            starts = [drawn[init, j, i] for i in range(len(tasks))]
            if all(one.starts for one in starts):
                alphas[:, k, :-1, j] = np.array(asked.size) * unit(tasks[first], starts[first])
                alphas[:, k, -1, j] = own_alphas(init, tasks, starts)
    return alphas


def _losses(
    task: Task, asked: Asked, drawn: dict[tuple[str, int], Drawn], alphas: np.ndarray, times: np.ndarray, bar: Progress
) -> dict[str, np.ndarray]:
    """Of one layer: the loss's share `(init, size, rank, seed, time)`, the closed form's, and what its starts are."""
    shape, seeds = alphas.shape, asked.seeds
    loss, closed = (np.full((*shape, seeds, len(times)), np.nan) for _ in range(2))
    told = {name: np.full(shape, np.nan) for name in ("loss_floor", "dead_directions", "norm", "relative_size")}
    told["curvature"] = np.full(shape, np.nan)
    for k, size in np.ndindex(*shape[:2]):
        init, lanes = asked.init[k], list[tuple[Any, Adapter]]()
        for j, alpha in enumerate(alphas[k, size]):
            begun = drawn[init, j]
            if begun.starts and np.isfinite(alpha) and alpha <= 1.001 * LARGEST * unit(task, begun):
                lanes += [((k, size, j, seed), one) for seed, one in enumerate(begun.scaled(alpha))]
        bar.update()
        if not lanes:
            continue
        starts = [start for _, start in lanes]
        filled = starts + starts[-1:] * (seeds * shape[2] - len(starts))  # as many always, for one program
        found = shares(task, filled, [offsets(init)] * len(filled), times)
        for (place, start), one in zip(lanes, found, strict=False):
            loss[place], closed[place] = one, closed_shares(task, start, offsets(init), times)
            if place[-1] == 0:
                size_is = alphas[k, size, place[2]] / unit(task, drawn[init, place[2]])
                for name, value in _limits(task, start, offsets(init), size_is).items():
                    told[name][place[:-1]] = value
    return {"loss": _same(loss), "closed": _same(closed)} | told


def _same(values: np.ndarray) -> np.ndarray:
    """What does not depend on the seed, at every seed."""
    alone = np.isnan(values[..., 1:, :]).all(axis=(-2, -1), keepdims=True)
    return np.where(alone, values[..., :1, :], values)


def _limits(task: Task, start: Adapter, taken_off: bool, size: float) -> dict[str, float]:
    """The start's floor, dead directions and norm, and its size, the median over seeds; see `curvature_of`."""
    problem, _ = task.lane(start, False)
    found = start_values([problem], [start.a.shape[0]], [taken_off], (Adapter(start.a[None], start.b[None]),))
    return {
        "loss_floor": (float(found["loss_floor"][0]) + task.left) / task.loss,
        "dead_directions": int(found["dead_directions"][0]),
        "norm": float(np.sqrt(np.sum(start.a**2) + np.sum(start.b**2))),
        "relative_size": size,
        "curvature": curvature_of(task, size),
    }


def curvature_of(task: Task, size: float) -> float:
    """The largest second derivative of the loss on the way from a start of that size: there, or at the solution."""
    return 2 * task.scaling * task.top * task.curvature * max(size, 1.0) ** 2


def _told(together: dict[str, Any], alphas: np.ndarray, asked: Asked, level: float, times: np.ndarray) -> xr.Dataset:
    """Times to the levels, medians over seeds with their ends."""
    over, lanes = (*DIMS, "seed", "time"), {"init": list(asked.init), "rank": list(asked.rank), "time": times}
    labels = [*(f"{size:g}" for size in asked.size), OWN]
    loss, closed = (xr.DataArray(together[name], dims=over, coords=lanes) for name in ("loss", "closed"))
    whole, begins = (xr.full_like(loss.isel(time=0, drop=True), value) for value in (level, BEGINS))
    reached = fall_to(loss, whole)
    return xr.Dataset(
        {
            "alpha": (DIMS, alphas),
            "loss": loss.median("seed"),
            "loss_start": loss.isel(time=0, drop=True).median("seed"),
            "loss_floor": (DIMS, together["loss_floor"]),
            "time_begins": fall_to(loss, begins).median("seed"),
            "time_level": reached.median("seed"),
            "time_least": reached.min("seed"),
            "time_most": reached.max("seed"),
            "time_closed": fall_to(closed, whole).median("seed"),
        },
        coords={"size": labels},
        attrs={"level": level, "begins": BEGINS, "seeds": asked.seeds, "horizon": float(times[-1])},
    )

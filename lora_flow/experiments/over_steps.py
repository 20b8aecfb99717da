"""Experiments that compare step rules, iteration by iteration: how they run, and their curves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array

from lora_flow.adapter import Adapters
from lora_flow.dynamics.descend import StepRule, descend
from lora_flow.experiments.base import Progress
from lora_flow.problems.base import Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Look = Callable[[Adapters, Array, Array], dict[str, Any]]
"""What is seen at an iteration: (adapters, loss, step) -> scalars by name."""


def curves(problem: Problem, start: Adapters, rule: StepRule | Array, steps: int, look: Look) -> dict[str, Array]:
    """The loss and the step at every iteration, `(steps + 1,)`, and what `look` sees there."""
    done = descend(problem, start, steps=steps, step=rule, saves=steps + 1, save_adapters=True)
    loss, step = done.observables["loss"], done.observables["step_size"]
    seen = jax.lax.map(lambda now: jax.tree.map(jnp.asarray, look(*now)), (done.history, loss, step))
    return {"loss": loss, "step": step, **seen}


def over(
    one: Callable[..., Mapping[str, Any]], axes: Mapping[str, Iterable[Any]], progress: Progress = iter
) -> xr.Dataset:
    """`one(*point)` at every point of the product of `axes`, the last axis the fastest; `progress` is of the first.

    Values with one more dimension are over "iteration". A name that a point does not give is NaN there.
    """
    points = {dim: list(values) for dim, values in axes.items()}
    outer, *inner = points.values()
    shape = tuple(map(len, points.values()))
    found: dict[str, np.ndarray] = {}
    for i, first in enumerate(progress(outer)):
        for place, rest in zip(np.ndindex(*shape[1:]), itertools.product(*inner), strict=True):
            for name, value in one(first, *rest).items():
                values = np.asarray(value)
                found.setdefault(name, np.full((*shape, *values.shape), np.nan))[(i, *place)] = values
    dims = (*points, "iteration")
    return xr.Dataset({name: (dims[: values.ndim], values) for name, values in found.items()}, coords=points)


def middle(ax: Axes, values: xr.DataArray, **style: Any) -> None:
    """The median over seeds against the iteration, NaN where a seed is."""
    median = values.median("seed", skipna=False)
    ax.plot(median["iteration"], median, **style)


def first_iteration(where: xr.DataArray) -> xr.DataArray:
    """The first iteration at which the condition holds, median over seeds; infinite where it never holds."""
    return xr.where(where.any("iteration"), where.argmax("iteration"), np.inf).median("seed")

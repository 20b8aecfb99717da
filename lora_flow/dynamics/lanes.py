"""Many starts in one compiled program: a lane for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, ArrayLike

from lora_flow.adapter import Adapters
from lora_flow.checks import require
from lora_flow.dynamics.flows import Flow
from lora_flow.dynamics.solve import STATUS, Trajectory, solve
from lora_flow.problems.base import Problem
from lora_flow.runtime.compiling import compiled

Tree = TypeVar("Tree")
Solved = TypeVar("Solved", bound=Trajectory)


def solve_lanes(
    problem: Problem | Any,
    starts: Adapters,
    times: ArrayLike,
    *,
    flow: Flow | str = "plain",
    each: bool = False,
    keep: Sequence[str] | None = None,
    throw: bool = False,
    **how: Any,
) -> Trajectory:
    """`solve` from many starts, in one program in which each lane takes steps of its own until the last one ends.

    **Arguments:**

    - `problem`: one for all lanes; with `each`, problems stacked over the lanes.
    - `starts`: adapters with the lanes' axes in front, `(*lanes, r, in)` and `(*lanes, out, r)`, as `stack` makes them.
    - `times`: to save at, from 0 to the end; `(time,)` for all lanes, or `(*lanes, time)`.
    - `flow`: as for `solve`, and so is all that `how` may hold: `solver`, `rtol`, `max_steps`, `save_adapters`. The
      `derivatives` are "forward" unless given, which compiles sooner and has no reverse mode.
    - `keep`: the observables that are wanted, all for None; the rest is then not computed.
    - `throw`: whether lanes that do not come to their end raise.

    **Returns:** a `Trajectory`, each leaf with the lanes' axes in front.

    **Raises:** `InputError` for starts without lanes; `RuntimeError` with the number of lanes and their status, where
    asked.
    """
    lanes = np.ndim(starts[0].a) - 2
    require(lanes >= 1, "starts", "have axes of lanes in front", f"shape {np.shape(starts[0].a)}")
    times, how = np.asarray(times, float), {"derivatives": "forward", "flow": flow, **how}
    solved = _solve(problem, starts, times, lanes, each, None if keep is None else tuple(keep), how)
    return finished(solved) if throw else solved


@compiled()
def _solve(
    problem: Any, starts: Adapters, times: Any, lanes: int, each: bool, keep: tuple[str, ...] | None, how: Any
) -> Trajectory:
    def one(problem: Problem, start: Adapters, times: Array) -> Trajectory:
        run = solve(problem, start, t1=times[-1], saves=times, **how)
        return run if keep is None else only(run, *keep)

    axes = eqx.if_array(0) if each else None, 0, 0 if times.ndim > 1 else None
    for _ in range(lanes):
        one = eqx.filter_vmap(one, in_axes=axes)
    return one(problem, starts, times)


def finished(trajectory: Solved) -> Solved:
    """The lanes, all of which have come to their end; `RuntimeError` where not, see `require_finished`."""
    require_finished(trajectory.status)
    return trajectory


def require_finished(status: Any) -> None:
    """Raises a `RuntimeError` with the number of lanes and their status, where some have not come to their end."""
    counts = np.bincount(np.ravel(np.asarray(status)), minlength=len(STATUS))
    if counts[1:].any():
        told = ", ".join(f"{count} {name}" for name, count in zip(STATUS[1:], counts[1:], strict=True) if count)
        raise RuntimeError(f"{counts[1:].sum()} of {counts.sum()} lanes did not come to their end: {told}")


def only(trajectory: Solved, *names: str) -> Solved:
    """The trajectory with these observables alone: in a compiled program the rest is then not computed."""
    return dataclasses.replace(trajectory, observables={name: trajectory.observables[name] for name in names}, stats={})


def stack(trees: Sequence[Tree]) -> Tree:
    """One tree of NumPy arrays with a leading axis of lanes."""
    return jax.tree.map(lambda *leaves: np.stack(list(map(np.asarray, leaves))), *trees)

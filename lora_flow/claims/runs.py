"""What runs of one adapted layer are made of and read from: spaces to draw, lanes to stack, histories."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from lora_flow.adapter import Adapter, Adapters
from lora_flow.dynamics.flows import Flow
from lora_flow.dynamics.solve import Trajectory, solve
from lora_flow.problems.base import Problem

Tree = TypeVar("Tree")
Solved = TypeVar("Solved", bound=Trajectory)


class Run(NamedTuple):
    """A and B of one layer over time, `(..., time, r, in)` and `(..., time, out, r)`."""

    times: np.ndarray
    a: np.ndarray
    b: np.ndarray

    @classmethod
    def of(cls, trajectory: Trajectory, times: Any) -> Run:
        history: Any = finished(trajectory).history
        return cls(np.asarray(times), *(np.asarray(factor) for factor in history[0]))

    @property
    def change(self) -> np.ndarray:
        """B A."""
        return self.b @ self.a


def solve_each(problem: Problem, starts: Sequence[Adapter], times: np.ndarray, flow: Flow) -> Run:
    """A flow from every start, at rtol = 1e-10."""

    def one(start: Adapters) -> Trajectory:
        adjoint = diffrax.ForwardMode()
        return solve(
            problem,
            start,
            t1=times[-1],
            saves=times,
            flow=flow,
            solver="Dopri8",
            rtol=1e-10,
            adjoint=adjoint,
            save_adapters=True,
        )

    return Run.of(jax.vmap(one)((stacked(starts),)), times)


def adapter(a: Any, b: Any) -> Adapter:
    """An adapter of NumPy arrays."""
    return Adapter(jnp.asarray(a), jnp.asarray(b))


def spaces(rng: np.random.Generator, rows: int, columns: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Random orthonormal columns, `(rows, rank)` and `(columns, rank)`."""
    left, right = (np.linalg.qr(rng.normal(size=(size, rank)))[0] for size in (rows, columns))
    return left, right


def stacked(trees: Sequence[Tree]) -> Tree:
    """One tree of NumPy arrays with a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(list(map(np.asarray, leaves))), *trees)


def finished(trajectory: Solved) -> Solved:
    """The trajectories, all of which have come to their end."""
    status = np.asarray(trajectory.status)
    if np.any(status != 0):
        raise RuntimeError(f"{np.sum(status != 0)} runs that theory was to be held against did not finish")
    return trajectory


def only(trajectory: Solved, *names: str) -> Solved:
    """The trajectory with these observables alone: the rest is then not computed."""
    return dataclasses.replace(trajectory, observables={name: trajectory.observables[name] for name in names}, stats={})

"""The runs of one layer that several claims share, each made once, and what such runs are drawn from and read as.

Flows of one kind have one shape: lanes are the seeds, settings come one after the other, and one compiled program does
for all of them. Gradient flow is LoRA+ with a ratio of 1, unshrunk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_flow.adapter import Adapter
from lora_flow.dynamics.flows import Chain, Flow, LoRAPlus, ShrinkA
from lora_flow.dynamics.lanes import finished, solve_lanes, stack
from lora_flow.dynamics.solve import Trajectory
from lora_flow.problems.one_layer import SingleLayer

PAPER = "LoRA-One"
SIZE, RANK, SAVES = 60, 8, 121
SINGULAR_VALUES = np.array([1.0, 0.8, 0.6, 0.5])


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


def draws(seeds: int) -> Iterator[np.random.Generator]:
    return map(np.random.default_rng, range(seeds))


def adapter(a: Any, b: Any) -> Adapter:
    """An adapter of NumPy arrays."""
    return Adapter(jnp.asarray(a), jnp.asarray(b))


def spaces(rng: np.random.Generator, rows: int, columns: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Random orthonormal columns, `(rows, rank)` and `(columns, rank)`."""
    left, right = (np.linalg.qr(rng.normal(size=(size, rank)))[0] for size in (rows, columns))
    return left, right


def norm(matrices: Any) -> Any:
    """Frobenius norms, a number for one matrix."""
    return np.linalg.norm(matrices, axis=(-2, -1))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest relative distance."""
    return float(np.max(norm(found - expected) / norm(expected)))


U, V = spaces(np.random.default_rng(0), SIZE, SIZE, 4)
SHIFT = (U * SINGULAR_VALUES) @ V.T  # 60 x 60


def gaussian(alpha: float, seeds: int) -> list[Adapter]:
    """A of rank 8 drawn at this size, B = 0, for every seed."""
    return [adapter(alpha * rng.normal(size=(RANK, SIZE)), np.zeros((SIZE, RANK))) for rng in draws(seeds)]


def follow(shift: np.ndarray, starts: Sequence[Adapter], times: np.ndarray, flow: Flow) -> Run:
    """A flow of one layer with white inputs from every start, at rtol = 1e-10."""
    how: Any = {"solver": "Dopri8", "rtol": 1e-10, "save_adapters": True}
    return Run.of(solve_lanes(SingleLayer(shift), (stack(starts),), times, flow=flow, keep=(), **how), times)


def plain(
    shift: np.ndarray, starts: Sequence[Adapter], times: np.ndarray, ratio: float = 1.0, rate: float = 0.0
) -> Run:
    """Gradient flow; or LoRA+ with a ratio, or with A shrinking at a rate."""
    return follow(shift, starts, times, Chain(LoRAPlus(ratio), ShrinkA(rate)))


@functools.cache
def driven(ratio: float, rate: float, seeds: int) -> Run:
    """The same from alpha = 0.1 and B = 0 to t = 12."""
    return plain(SHIFT, gaussian(0.1, seeds), np.linspace(0.0, 12.0, SAVES), ratio, rate)

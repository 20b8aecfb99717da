"""A layer as a task: what its gradient asks for, what starts are made of, and the flow in few coordinates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lora_flow.adapter import Adapter, pad
from lora_flow.algebra.low_rank import LowRank
from lora_flow.bridge.truncated import Truncated, truncated_svd
from lora_flow.checks import require
from lora_flow.dynamics.lanes import solve_lanes, stack
from lora_flow.problems.one_layer import AdaptedLayer, Regression, SingleLayer

KEPT = 48  # singular pairs of a layer that a simulation keeps at least, where it has more
ROUNDING = 1e-12  # of the loss
WIDEST = 512  # inputs of a layer whose inputs are known: such a layer is simulated as it is


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """One layer's task, `1/2 ||D - s B A||^2` for white inputs, or that of a `Regression`.

    - `name`, `shape` `(out, in)`, `scaling` s, and the largest `rank` that is looked at.
    - `descent`: the leading singular triplets of -dL/dW at the weight, which for white inputs is D.
    - `read_weight`: reads the pretrained weight, where it is known.
    - `known`: the problem itself where its inputs are known; None where they are taken as white.
    """

    name: str
    shape: tuple[int, int]
    scaling: float
    rank: int
    descent: Truncated
    read_weight: Callable[[], Float[np.ndarray, "out in"]] | None = None
    known: Regression | None = None

    @classmethod
    def of(cls, name: str, problem: AdaptedLayer, rank: int) -> Task:
        """The task of a problem of one layer."""
        fed = problem if isinstance(problem, Regression) else None
        linear = isinstance(problem, SingleLayer) if fed is None else fed.activation == "linear"
        require(linear, "problem", "be a SingleLayer, or a linear Regression", type(problem).__name__)
        shape, s, weight = problem.layers[0], float(problem.scaling), problem.weight
        wide = f"have at most {WIDEST} inputs where these are known; without them they are taken as white"
        require(fed is None or shape[1] <= WIDEST, "problem", wide, shape[1])
        descent = truncated_svd(np.asarray(problem.linearised_task()[0], float) / s, kept(shape, rank))
        read = None if weight is None else lambda: np.asarray(weight, float)
        return cls(name, shape, s, rank, descent, read, fed)

    @property
    def sigma(self) -> np.ndarray:
        """The gradient's leading singular values; small starts grow at s times these."""
        return np.asarray(self.descent.triplets.s)

    @functools.cached_property
    def top(self) -> float:
        """The largest singular value of what is to be learned."""
        return float(self.sigma[0] if self.known is None else np.linalg.norm(np.asarray(self.known.shift), 2))

    @functools.cached_property
    def energies(self) -> np.ndarray:
        """Twice the loss of each singular pair of what is to be learned, as the inputs see it."""
        if self.known is None:
            return self.sigma**2
        seen = np.asarray(self.known.shift) @ np.asarray(self.known.features).T
        return np.linalg.svd(seen, compute_uv=False)[: len(self.sigma)] ** 2

    @functools.cached_property
    def curvature(self) -> float:
        """The largest second derivative of the loss by the weight: 1 for white inputs."""
        return 1.0 if self.known is None else float(np.linalg.norm(np.asarray(self.known.features), 2)) ** 2

    @functools.cached_property
    def loss(self) -> float:
        """At the pretrained weight."""
        return 0.5 * self.descent.energy if self.known is None else float(self.known.loss_of(jnp.zeros(self.shape)))

    @functools.cached_property
    def left(self) -> float:
        """The loss of the singular pairs that are not simulated."""
        left = self.loss - 0.5 * float(np.sum(self.sigma**2)) if self.known is None else 0.0
        return left if left > ROUNDING * self.loss else 0.0

    @property
    def is_reduced(self) -> bool:
        return self.known is None and len(self.sigma) < min(self.shape)

    @functools.cached_property
    def weight_norm(self) -> float:
        """The weight's Frobenius norm; NaN where it is not known."""
        return float("nan") if self.read_weight is None else float(np.linalg.norm(self.read_weight()))

    @functools.cached_property
    def principal(self) -> LowRank | None:
        """The weight's leading triplets."""
        return None if self.read_weight is None else truncated_svd(self.read_weight(), self.rank).triplets

    @functools.cached_property
    def minor(self) -> LowRank | None:
        """The weight's last triplets, the smallest last."""
        return (
            None if self.read_weight is None else truncated_svd(self.read_weight(), self.rank, smallest=True).triplets
        )

    def held(self, rank: int) -> float:
        """The share of the gradient's squared norm that a rank holds."""
        return min(self.descent.held(rank), 1.0)

    def floor(self, rank: int) -> float:
        """The share of the loss that a rank leaves, from a start that is not taken off the weights."""
        return 1 - self.held(rank) if self.known is None else self.known.lowest_loss(rank) / self.loss

    def enter(self, start: Adapter) -> Adapter:
        """A start in the coordinates that it is solved in: along the singular pairs, and across them; of equal norms.

        The flow lives in the span of these pairs and of the start. That is exact for a gradient of as many pairs.
        """
        if self.known is not None:
            return start
        size = len(self.sigma) + self.rank
        u, vt = np.asarray(self.descent.triplets.u), np.asarray(self.descent.triplets.vt)
        a, b = (np.asarray(factor) for factor in start)
        factors: Any = (_along(a, vt, size), _along(b.T, u.T, size).T)
        return Adapter(*factors)

    def lane(self, start: Adapter, taken_off: bool) -> tuple[AdaptedLayer, tuple[Adapter, ...]]:
        """The problem and the start to solve, padded to the largest rank; `start` is in these coordinates.

        A start that is taken off the weights leaves D + s B_0 A_0 to be learned.
        """
        change = self.scaling * (start.b @ start.a) if taken_off else 0.0
        if self.known is not None:
            fed = eqx.tree_at(lambda one: one.shift, self.known, jnp.asarray(self.known.shift + change))
            return fed, pad((start,), self.rank)
        shift = np.diag(np.append(self.sigma, np.zeros(self.rank)))
        return SingleLayer(shift + change, self.scaling), pad((start,), self.rank)

    def size_of(self, start: Adapter) -> float:
        """||Z||_2 of a start over that of a balanced solution, sqrt(2 sigma_1/s)."""
        return float(np.linalg.norm(np.vstack([start.b, start.a.T]), 2)) / np.sqrt(2 * self.top / self.scaling)


def kept(shape: tuple[int, int], rank: int) -> int:
    """The number of singular pairs that are looked at: twice the rank at the least, where there are as many."""
    return min(max(2 * rank, KEPT), *shape)


def shares(task: Task, starts: Sequence[Adapter], taken_off: Sequence[bool], times: np.ndarray) -> np.ndarray:
    """The loss over that at the pretrained weight, `(start, time)`, from each start; NaN where a run failed."""
    lanes = [task.lane(*one) for one in zip(starts, taken_off, strict=True)]
    problems, begun = (stack(one) for one in zip(*lanes, strict=True))
    solved: Any = solve_lanes(problems, begun, times, each=True, keep=("loss",))
    return (np.asarray(solved.observables["loss"]) + task.left) / task.loss


def _along(rows: Float[np.ndarray, "r n"], basis: Float[np.ndarray, "k n"], size: int) -> np.ndarray:
    """Rows in coordinates: along the basis, and across it in a triangular basis of their own."""
    along = rows @ basis.T
    across = rows - along @ basis
    own: Any = np.linalg.qr((across - (across @ basis.T) @ basis).T, mode="r")
    return np.pad(np.hstack([along, own.T]), ((0, 0), (0, size - along.shape[1] - len(own))))

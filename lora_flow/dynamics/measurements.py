"""The measurements that a solve saves: each layer's adapter beside its principal direction, as small matrices.

A singular value decomposition inside the solve would run at every step of every lane. The solve saves the products with
the principal direction and the r x r matrices below instead, from which the observables follow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters
from lora_flow.algebra.diagonal import Matrix
from lora_flow.algebra.spectra import or_zero, positive, top_space
from lora_flow.problems.base import Problem, as_problem
from lora_flow.runtime.compiling import compiled


class Direction(NamedTuple):
    """The singular pair that one layer's adapter aligns with, B along `left` and A along `right`; zeros for no pair.

    `tied` holds the left and right vectors of tied pairs, a row each, and rows of zeros; None without ties.
    """

    left: Float[Array, "*batch out"]
    right: Float[Array, "*batch in"]
    tied: tuple[Float[Array, "*batch others out"], Float[Array, "*batch others in"]] | None = None

    @property
    def gamma(self) -> Float[Array, "*batch stacked"]:
        """(left; right) / sqrt(2), the unit vector that Z = [B; A^T] aligns with."""
        return jnp.concatenate([self.left, self.right], axis=-1) / jnp.sqrt(2.0)

    @property
    def pairs(self) -> tuple[Float[Array, "*batch pairs out"], Float[Array, "*batch pairs in"]]:
        """All left and right vectors, a row each; Z may align with any mixture of tied pairs."""
        lone = self.left[..., None, :], self.right[..., None, :]
        if self.tied is None:
            return lone
        left, right = (jnp.concatenate(both, axis=-2) for both in zip(lone, self.tied, strict=True))
        return left, right


class Gram(NamedTuple):
    """X^T X as `size**2 * matrix`, because single precision cannot hold the squares of a start of size 1e-30."""

    matrix: Float[Array, "*time rank rank"]
    size: Float[Array, "*time"]

    @classmethod
    def of(cls, x: Float[Array | np.ndarray, "rows rank"]) -> Gram:
        size = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
        unit = jnp.asarray(x) / positive(size)
        return cls(unit.T @ unit, size)

    def over(self, unit: Float[Array, "*time"]) -> Float[Array, "*time rank rank"]:
        """X^T X / unit^2."""
        return ((self.size / unit) ** 2)[..., None, None] * self.matrix


class Measurement(NamedTuple):
    """One layer's adapter at one time, relative to its principal directions (l, r); NaN without a direction."""

    left: Float[Array, "*time pairs rank"]  # B^T l
    right: Float[Array, "*time pairs rank"]  # A r
    across: Gram  # R^T R, with R = Z - gamma gamma^T Z
    gram_a: Gram  # A A^T
    gram_b: Gram  # B^T B

    @property
    def along(self) -> Float[Array, "*time pairs rank"]:
        """Z^T gamma."""
        return (self.left + self.right) / jnp.sqrt(2.0)

    @property
    def size(self) -> Float[Array, "*time"]:
        """The approximate size of Z; 1 where Z is zero."""
        along = jax.lax.stop_gradient(jnp.max(jnp.abs(or_zero(self.along)), axis=(-2, -1)))
        return positive(jnp.maximum(along, self.across.size))


def principal_directions(problem: Problem) -> tuple[Direction, ...]:
    """The top singular pair of each layer's linearised task, which the layer's adapter aligns with.

    On an aligned problem their `gamma` is the paper's gamma_1 = (g; v)/sqrt(2) and gamma_2 = (u; g)/sqrt(2). Where
    several singular values tie for the largest, all their pairs count. A layer has no direction where its task is zero,
    or rounding beside the matrices that the task was made from, and where more than eight singular values tie.
    """
    asked = as_problem(problem)

    def direction(task: Matrix, size: Array) -> Direction:
        left, right = top_space(task, size)
        return Direction(left[0], right[0], (left[1:], right[1:]))

    return tuple(map(direction, asked.linearised_task(), asked.task_sizes()))


@compiled()
def directions_of(problem: Any, stacked: bool = False) -> tuple[Direction, ...]:
    """`principal_directions` in one program; for stacked problems those of each."""
    return eqx.filter_vmap(principal_directions)(problem) if stacked else principal_directions(problem)


def measure(adapters: Adapters, directions: tuple[Direction, ...]) -> tuple[Measurement, ...]:
    """The measurements of every layer, in O((out + in) r^2) each."""

    def one(adapter: Adapter, direction: Direction) -> Measurement:
        a, b = adapter
        left, right = direction.pairs
        gamma, stacked = jnp.concatenate([left, right], axis=1) / jnp.sqrt(2.0), adapter.stacked
        rest = stacked - gamma.T @ (gamma @ stacked)
        none = jnp.where(jnp.any(gamma != 0), 0.0, jnp.nan)
        return Measurement(left @ b + none, right @ a.T + none, Gram.of(rest), Gram.of(a.T), Gram.of(b))

    return tuple(map(one, adapters, directions))


def padded(measurements: tuple[Measurement, ...]) -> tuple[Measurement, ...]:
    """Measurements of a common rank; zeros change none of the observables."""
    rank = max(measured.left.shape[-1] for measured in measurements)

    def pad(leaf: Array, axes: int = 1) -> Array:
        wide = jnp.pad(leaf, [(0, 0)] * (leaf.ndim - axes) + [(0, rank - leaf.shape[-1])] * axes)
        return jnp.where(jnp.isnan(leaf).any(axis=-1, keepdims=True), jnp.nan, wide) if axes == 1 else wide

    def pad_gram(gram: Gram) -> Gram:
        return gram._replace(matrix=pad(gram.matrix, 2))

    return tuple(Measurement(pad(m.left), pad(m.right), *map(pad_gram, m[2:])) for m in measurements)

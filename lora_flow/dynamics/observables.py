"""The observables: small matrices are saved inside the solve, and the quantities of interest computed after it.

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
from lora_flow.algebra.spectra import dominant, norm, positive, root, rounded, top_eigenvectors, top_space
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
        along = jax.lax.stop_gradient(jnp.max(jnp.abs(_or_zero(self.along)), axis=(-2, -1)))
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


def observables(
    measurements: tuple[Measurement, ...],
    conserved: float | Float[Array, ""] = 1.0,
    start: tuple[Measurement, ...] | None = None,
) -> dict[str, Float[Array, " time"]]:
    """Named observables over time, from measurements whose leading axis is time; `start`, without time, is at t = 0.

    **Returns:** name -> `(time,)`. For layer i, with (l, r) its principal direction and gamma_i = (l; r)/sqrt(2):

    - `alignment_error` for layer 1, `alignment_error_2` for layer 2, and so on: 1 - |cos| of the angle between gamma_i
      and the top left singular vector of Z_i. The component across gamma gives the angle, not the cosine, and resolves
      errors down to eps ||R||^2 / ||Z||^2 with R the part of Z across gamma: to 1e-30 while only one direction of Z is
      large (`analyse` has no such floor). Of tied singular pairs, of the task or of Z, the nearest count: the angle is
      between the spaces. NaN where Z is zero, and where the task has no direction (`principal_directions`);
      without a direction `norm_along`, `norm_across` and `overlap` are NaN too.
    - `norm_z1`, ...: the spectral norms of the stacked factors.
    - `norm_b1a1`, ...: the spectral norms of the products B_i A_i; their ratio says which adapter is selected.
    - `norm_along1`, `norm_across1`, ...: ||gamma_i^T Z_i|| and the Frobenius norm of the rest of Z_i.
    - `overlap_1`, ...: l^T B_i A_i r, which defines the paper's T1; the sum over tied pairs.
    - `drift`: the largest over layers of ||C_i(t) - C_i(0)||_F / ||Z_i(t)||^2, with
      C_i = `conserved` A_i A_i^T - B_i^T B_i. Gradient flow conserves C_i with 1, LoRA+ with its ratio, so the drift is
      an error of the integration. NaN where `conserved` is NaN, for flows without such a quantity. C_i(0) is that of
      `start`, or else of the first measurement.
    """
    measurements = _padded(measurements)
    begin = jax.tree.map(lambda leaf: leaf[:1], measurements)
    if start is not None:
        begin = jax.tree.map(lambda leaf: leaf[None], _padded(start))
    none = jnp.isnan(conserved)
    weight = jnp.where(none, 0.0, conserved)  # NaN would spoil derivatives of everything else
    # all of Z over its size, whose squares hold
    alongs = [m.along / m.size[..., None, None] for m in measurements]
    acrosses = [m.across.over(m.size) for m in measurements]
    grams = jnp.stack([across + _gram(_or_zero(along)) for along, across in zip(alongs, acrosses, strict=True)])
    products = jnp.stack([_over_its_trace(m.gram_b.matrix) @ _over_its_trace(m.gram_a.matrix) for m in measurements])
    projections = dominant(jnp.concatenate([grams, products]))  # all in one loop
    squared_norms, tops = _top_eigenpair(grams, projections[: len(grams)])
    spaces = jax.lax.stop_gradient(rounded(projections[: len(grams)]))
    shares = _top_eigenvalue(products, projections[len(grams) :])
    named, drifts = {}, []
    for i, (measured, first, along, across, squared_norm, top, space, share) in enumerate(
        zip(measurements, begin, alongs, acrosses, squared_norms, tops, spaces, shares, strict=True), start=1
    ):
        size, gram_a, gram_b = measured.size, measured.gram_a, measured.gram_b
        top = _nearest(space, along, top)
        cosine2 = jnp.sum(jnp.einsum("...ki,...i->...k", along, top) ** 2, axis=-1)
        undefined = jnp.where(jnp.isnan(along).any(axis=(-2, -1)), jnp.nan, 0.0)
        sine2 = jnp.maximum(jnp.einsum("...i,...ij,...j->...", top, across, top), 0.0)
        total = cosine2 + sine2
        error = sine2 / positive(total) / (1 + root(cosine2 / positive(total)))
        named["alignment_error" if i == 1 else f"alignment_error_{i}"] = jnp.where(total > 0, error, jnp.nan)
        named[f"norm_z{i}"] = root(squared_norm) * size
        shared = root(share * _trace(gram_b.matrix) * _trace(gram_a.matrix))
        named[f"norm_b{i}a{i}"] = shared * gram_b.size * gram_a.size
        named[f"norm_along{i}"] = norm(along, axis=(-2, -1)) * size
        named[f"norm_across{i}"] = root(_trace(measured.across.matrix)) * measured.across.size + undefined
        named[f"overlap_{i}"] = jnp.sum(measured.left * measured.right, axis=(-2, -1))
        change = norm(_imbalance(measured, size, weight) - _imbalance(first, size, weight), axis=(-2, -1))
        drift = jnp.where(squared_norm > 0, change / positive(squared_norm), 0.0)
        drifts.append(jnp.where(none, jnp.nan, drift))
    named["drift"] = jnp.max(jnp.stack(drifts), axis=0)
    return named


def _padded(measurements: tuple[Measurement, ...]) -> tuple[Measurement, ...]:
    """Measurements of a common rank; zeros change none of the observables."""
    rank = max(measured.left.shape[-1] for measured in measurements)

    def pad(leaf: Array, axes: int = 1) -> Array:
        wide = jnp.pad(leaf, [(0, 0)] * (leaf.ndim - axes) + [(0, rank - leaf.shape[-1])] * axes)
        return jnp.where(jnp.isnan(leaf).any(axis=-1, keepdims=True), jnp.nan, wide) if axes == 1 else wide

    def pad_gram(gram: Gram) -> Gram:
        return gram._replace(matrix=pad(gram.matrix, 2))

    return tuple(Measurement(pad(m.left), pad(m.right), *map(pad_gram, m[2:])) for m in measurements)


Matrices = Float[Array, "*time rank rank"]


def _imbalance(measured: Measurement, unit: Float[Array, "*time"], weight: Float[Array, ""]) -> Matrices:
    """(`weight` A A^T - B^T B) / unit^2."""
    return weight * measured.gram_a.over(unit) - measured.gram_b.over(unit)


def _or_zero(values: Array) -> Array:
    """Zero in place of NaN."""
    return jnp.where(jnp.isnan(values), 0.0, values)


def _gram(rows: Float[Array, "*time pairs rank"]) -> Matrices:
    return jnp.einsum("...ki,...kj->...ij", rows, rows)


def _nearest(
    space: Matrices, along: Float[Array, "*time pairs rank"], top: Float[Array, "*time rank"]
) -> Float[Array, "*time rank"]:
    """The nearest to the direction among the tied singular vectors of Z, given by their projection.

    Rounding would decide which of them is the top one. Without a tie the result is the top one.
    """
    inside = jax.lax.stop_gradient(_or_zero(along)) @ space
    power = _gram(inside)
    for _ in range(6):
        power = power / positive(_trace(power))[..., None, None]
        power = power @ power
    nearest = top_eigenvectors(power)
    ties = (_trace(space) > 1.5) & jnp.any(nearest != 0, axis=-1)
    return jnp.where(ties[..., None], nearest, top)


@jax.custom_jvp
def _top_eigenpair(grams: Matrices, projections: Matrices) -> tuple[Float[Array, "*time"], Float[Array, "*time rank"]]:
    """The largest eigenvalue of symmetric matrices, and a unit vector of its eigenspace."""
    top = top_eigenvectors(projections)
    return jnp.einsum("...i,...ij,...j->...", top, grams, top), top


@_top_eigenpair.defjvp
def _(primals: Any, tangents: Any) -> Any:
    """First-order perturbation theory: dv = (lambda - G)^+ dG v."""
    (grams, _), (change, _) = primals, tangents
    value, top = _top_eigenpair(*primals)
    turned = jnp.einsum("...ij,...j->...i", change, top)
    slope = jnp.sum(top * turned, axis=-1)
    scale = positive(value)[..., None, None]
    identity = jnp.broadcast_to(jnp.eye(grams.shape[-1]), grams.shape)
    resolvent = scale * (identity + top[..., :, None] * top[..., None, :]) - grams
    return (value, top), (slope, jnp.linalg.solve(resolvent, (turned - slope[..., None] * top)[..., None])[..., 0])


def _top_eigenvalue(matrices: Matrices, projections: Matrices) -> Float[Array, "*time"]:
    """The largest eigenvalue of matrices that need not be symmetric; its derivative needs none of the projection's."""
    return jnp.sum(matrices * projections.mT, axis=(-2, -1)) / positive(_trace(projections))


def _trace(matrices: Matrices) -> Float[Array, "*time"]:
    return jnp.trace(matrices, axis1=-2, axis2=-1)


def _over_its_trace(grams: Matrices) -> Matrices:
    return grams / positive(_trace(grams))[..., None, None]

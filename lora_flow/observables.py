"""What is read off along the way: small matrices inside the solve, the quantities of interest after it.

A singular value decomposition inside the solve would run at every step of every lane. What is saved
instead are the products with the principal direction and the r x r matrices below, from which the rest follows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters
from lora_flow.matrices import Matrix, dominant, positive, root, rounded, top_eigenvectors, top_space
from lora_flow.problem import Problem, linearised_task, task_sizes


class Direction(NamedTuple):
    """The singular pair that one layer's adapter aligns with, B along `left` and A along `right`; zeros where none is.

    `tied` holds what ties with it, left and right vectors, a row each, and rows of zeros; None is nothing.
    """

    left: Float[Array, "*batch out"]
    right: Float[Array, "*batch in"]
    tied: tuple[Float[Array, "*batch others out"], Float[Array, "*batch others in"]] | None = None

    @property
    def gamma(self) -> Float[Array, "*batch stacked"]:
        """(left; right) / sqrt(2), the unit vector with which Z = [B; A^T] aligns."""
        return jnp.concatenate([self.left, self.right], axis=-1) / jnp.sqrt(2.0)

    @property
    def pairs(self) -> tuple[Float[Array, "*batch pairs out"], Float[Array, "*batch pairs in"]]:
        """All the left and right vectors, a row each: a mixture of the pairs is as good as one of them."""
        lone = self.left[..., None, :], self.right[..., None, :]
        if self.tied is None:
            return lone
        left, right = (jnp.concatenate(both, axis=-2) for both in zip(lone, self.tied, strict=True))
        return left, right


class Measurement(NamedTuple):
    """One layer's adapter at one time, as seen from its principal direction (l, r), or directions; NaN without one."""

    left: Float[Array, "*time pairs rank"]  # B^T l
    right: Float[Array, "*time pairs rank"]  # A r
    across: Float[Array, "*time rank rank"]  # R^T R, with R = Z - gamma gamma^T Z
    gram_a: Float[Array, "*time rank rank"]  # A A^T
    gram_b: Float[Array, "*time rank rank"]  # B^T B

    @property
    def along(self) -> Float[Array, "*time pairs rank"]:
        """Z^T gamma."""
        return (self.left + self.right) / jnp.sqrt(2.0)


def principal_directions(problem: Problem) -> tuple[Direction, ...]:
    """The top singular pair of each layer's linearised task, with which its adapter aligns.

    On an aligned problem `gamma` of these is the paper's gamma_1 = (g; v)/sqrt(2) and gamma_2 = (u; g)/sqrt(2). Where
    several singular values tie for the largest, all their pairs. There is none where a task is zero, or no more than
    rounding beside the matrices that it was made from, and where more than eight tie.
    """
    tasks = linearised_task(problem)

    def direction(task: Matrix, size: Array) -> Direction:
        left, right = top_space(task, size)
        return Direction(left[0], right[0], (left[1:], right[1:]))

    return tuple(map(direction, tasks, task_sizes(problem, tasks)))


def measure(adapters: Adapters, directions: tuple[Direction, ...]) -> tuple[Measurement, ...]:
    """The measurements of every layer, in O((out + in) r^2) each."""

    def one(adapter: Adapter, direction: Direction) -> Measurement:
        a, b = adapter
        left, right = direction.pairs
        gamma, stacked = jnp.concatenate([left, right], axis=1) / jnp.sqrt(2.0), adapter.stacked
        rest = stacked - gamma.T @ (gamma @ stacked)
        none = jnp.where(jnp.any(gamma != 0), 0.0, jnp.nan)
        return Measurement(left @ b + none, right @ a.T + none, rest.T @ rest, a @ a.T, b.T @ b)

    return tuple(map(one, adapters, directions))


def observables(
    measurements: tuple[Measurement, ...],
    conserved: float | Float[Array, ""] = 1.0,
    start: tuple[Measurement, ...] | None = None,
) -> dict[str, Float[Array, " time"]]:
    """Named observables over time, from measurements whose leading axis is time; `start` is that at t = 0, without it.

    For layer i, with (l, r) its principal direction and gamma_i = (l; r)/sqrt(2):

    - `alignment_error` for layer 1, `alignment_error_2` for layer 2, and so on: 1 - |cos| of the angle between gamma_i
      and the top left singular vector of Z_i. It comes from the component across gamma, not from the cosine, and
      resolves errors down to eps ||R||^2 / ||Z||^2 with R the part of Z across gamma: to 1e-30 while only one direction
      of Z is large (`analyse` has no such floor). Of what ties, the task's singular pairs or those of Z, the nearest
      count: it is the angle between the spaces. NaN where there is no direction: where Z is zero, and where the task is
      (`principal_directions`); so are the next but two.
    - `norm_z1`, ...: the spectral norms of the stacked factors.
    - `norm_b1a1`, ...: the spectral norms of the products B_i A_i; their ratio says which adapter is selected.
    - `norm_along1`, `norm_across1`, ...: ||gamma_i^T Z_i|| and the Frobenius norm of the rest of Z_i.
    - `overlap_1`, ...: l^T B_i A_i r, which the paper's T1 is read from; the sum over pairs that tie.
    - `drift`: the largest over layers of ||C_i(t) - C_i(0)||_F / ||Z_i(t)||^2, with
      C_i = `conserved` A_i A_i^T - B_i^T B_i. Gradient flow conserves C_i with 1, LoRA+ with its ratio, so this is an
      error of the integration; NaN where `conserved` is, for flows without such a quantity. C_i(0) is that of `start`,
      or else of the first of the measurements.
    """
    measurements = _padded(measurements)
    begin = jax.tree.map(lambda leaf: leaf[0], measurements) if start is None else _padded(start)
    none = jnp.isnan(conserved)
    weight = jnp.where(none, 0.0, conserved)  # NaN would spoil derivatives of everything else
    grams = jnp.stack([m.across + _gram(jnp.where(jnp.isnan(m.along), 0.0, m.along)) for m in measurements])
    products = jnp.stack([_over_its_trace(m.gram_b) @ _over_its_trace(m.gram_a) for m in measurements])
    projections = dominant(jnp.concatenate([grams, products]))  # all in one loop
    squared_norms, tops = _top_eigenpair(grams, projections[: len(grams)])
    spaces = jax.lax.stop_gradient(rounded(projections[: len(grams)]))
    shares = _top_eigenvalue(products, projections[len(grams) :])
    named, drifts = {}, []
    for i, (measured, first, squared_norm, top, space, share) in enumerate(
        zip(measurements, begin, squared_norms, tops, spaces, shares, strict=True), start=1
    ):
        top = _nearest(space, measured.along, top)
        cosine2 = jnp.sum(jnp.einsum("...ki,...i->...k", measured.along, top) ** 2, axis=-1)
        undefined = jnp.where(jnp.isnan(measured.along).any(axis=(-2, -1)), jnp.nan, 0.0)
        sine2 = jnp.maximum(jnp.einsum("...i,...ij,...j->...", top, measured.across, top), 0.0)
        total = cosine2 + sine2
        named["alignment_error" if i == 1 else f"alignment_error_{i}"] = sine2 / total / (1 + jnp.sqrt(cosine2 / total))
        named[f"norm_z{i}"] = jnp.sqrt(squared_norm)
        named[f"norm_b{i}a{i}"] = root(share * _trace(measured.gram_b) * _trace(measured.gram_a))
        named[f"norm_along{i}"] = root(jnp.sum(measured.along**2, axis=(-2, -1))) + undefined
        named[f"norm_across{i}"] = root(_trace(measured.across)) + undefined
        named[f"overlap_{i}"] = jnp.sum(measured.left * measured.right, axis=(-2, -1))
        imbalance, at_start = (weight * seen.gram_a - seen.gram_b for seen in (measured, first))
        change = jnp.sum((imbalance - at_start[None]) ** 2, axis=(-2, -1))
        moved = (change > 0) & (squared_norm > 0)
        drift = jnp.sqrt(jnp.where(moved, change, 1.0)) / jnp.where(moved, squared_norm, 1.0)
        drifts.append(jnp.where(none, jnp.nan, jnp.where(moved, drift, 0.0)))
    named["drift"] = jnp.max(jnp.stack(drifts), axis=0)
    return named


def _padded(measurements: tuple[Measurement, ...]) -> tuple[Measurement, ...]:
    """Measurements of a common rank; zeros change none of the observables."""
    rank = max(measured.left.shape[-1] for measured in measurements)

    def pad(leaf: Array, axes: int) -> Array:
        wide = jnp.pad(leaf, [(0, 0)] * (leaf.ndim - axes) + [(0, rank - leaf.shape[-1])] * axes)
        return jnp.where(jnp.isnan(leaf).any(axis=-1, keepdims=True), jnp.nan, wide) if axes == 1 else wide

    return tuple(
        Measurement(pad(m.left, 1), pad(m.right, 1), pad(m.across, 2), pad(m.gram_a, 2), pad(m.gram_b, 2))
        for m in measurements
    )


Matrices = Float[Array, "*time rank rank"]


def _gram(rows: Float[Array, "*time pairs rank"]) -> Matrices:
    return jnp.einsum("...ki,...kj->...ij", rows, rows)


def _nearest(
    space: Matrices, along: Float[Array, "*time pairs rank"], top: Float[Array, "*time rank"]
) -> Float[Array, "*time rank"]:
    """Of the singular vectors of Z that tie, given by their projection, the one nearest to the direction.

    Any of them could be the top one: which is, rounding would decide. Where none ties, the top one.
    """
    inside = jax.lax.stop_gradient(jnp.where(jnp.isnan(along), 0.0, along)) @ space
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

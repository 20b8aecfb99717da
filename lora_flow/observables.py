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
from lora_flow.matrices import dominant, positive, root, top_eigenvectors, top_pair
from lora_flow.problem import Problem, linearised_task


class Direction(NamedTuple):
    """The singular pair that one layer's adapter aligns with: B along `left`, A along `right`."""

    left: Float[Array, "*batch out"]
    right: Float[Array, "*batch in"]

    @property
    def gamma(self) -> Float[Array, "*batch stacked"]:
        """(left; right) / sqrt(2), the unit vector with which Z = [B; A^T] aligns."""
        return jnp.concatenate([self.left, self.right], axis=-1) / jnp.sqrt(2.0)


class Measurement(NamedTuple):
    """One layer's adapter at one time, as seen from its principal direction (l, r)."""

    left: Float[Array, "*time rank"]  # B^T l
    right: Float[Array, "*time rank"]  # A r
    across: Float[Array, "*time rank rank"]  # R^T R, with R = Z - gamma gamma^T Z
    gram_a: Float[Array, "*time rank rank"]  # A A^T
    gram_b: Float[Array, "*time rank rank"]  # B^T B

    @property
    def along(self) -> Float[Array, "*time rank"]:
        """Z^T gamma."""
        return (self.left + self.right) / jnp.sqrt(2.0)


def principal_directions(problem: Problem) -> tuple[Direction, ...]:
    """The top singular pair of each layer's linearised task, with which its adapter aligns.

    On an aligned problem `gamma` of these is the paper's gamma_1 = (g; v)/sqrt(2) and gamma_2 = (u; g)/sqrt(2).
    """

    return tuple(Direction(*top_pair(task)) for task in linearised_task(problem))


def measure(adapters: Adapters, directions: tuple[Direction, ...]) -> tuple[Measurement, ...]:
    """The measurements of every layer, in O((out + in) r^2) each."""

    def one(adapter: Adapter, direction: Direction) -> Measurement:
        (a, b), gamma = adapter, direction.gamma
        stacked = adapter.stacked
        rest = stacked - jnp.outer(gamma, gamma @ stacked)
        return Measurement(direction.left @ b, a @ direction.right, rest.T @ rest, a @ a.T, b.T @ b)

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
      of Z is large (`analyse` has no such floor). NaN where Z is zero.
    - `norm_z1`, ...: the spectral norms of the stacked factors.
    - `norm_b1a1`, ...: the spectral norms of the products B_i A_i; their ratio says which adapter is selected.
    - `norm_along1`, `norm_across1`, ...: ||gamma_i^T Z_i|| and the Frobenius norm of the rest of Z_i.
    - `overlap_1`, ...: l^T B_i A_i r, which the paper's T1 is read from.
    - `drift`: the largest over layers of ||C_i(t) - C_i(0)||_F / ||Z_i(t)||^2, with
      C_i = `conserved` A_i A_i^T - B_i^T B_i. Gradient flow conserves C_i with 1, LoRA+ with its ratio, so this is an
      error of the integration; NaN where `conserved` is, for flows without such a quantity. C_i(0) is that of `start`,
      or else of the first of the measurements.
    """
    measurements = _padded(measurements)
    begin = jax.tree.map(lambda leaf: leaf[0], measurements) if start is None else _padded(start)
    none = jnp.isnan(conserved)
    weight = jnp.where(none, 0.0, conserved)  # NaN would spoil derivatives of everything else
    grams = jnp.stack([m.across + m.along[..., :, None] * m.along[..., None, :] for m in measurements])
    products = jnp.stack([_over_its_trace(m.gram_b) @ _over_its_trace(m.gram_a) for m in measurements])
    projections = dominant(jnp.concatenate([grams, products]))  # all in one loop
    squared_norms, tops = _top_eigenpair(grams, projections[: len(grams)])
    shares = _top_eigenvalue(products, projections[len(grams) :])
    named, drifts = {}, []
    for i, (measured, first, squared_norm, top, share) in enumerate(
        zip(measurements, begin, squared_norms, tops, shares, strict=True), start=1
    ):
        cosine2 = jnp.einsum("...i,...i->...", measured.along, top) ** 2
        sine2 = jnp.maximum(jnp.einsum("...i,...ij,...j->...", top, measured.across, top), 0.0)
        total = cosine2 + sine2
        named["alignment_error" if i == 1 else f"alignment_error_{i}"] = sine2 / total / (1 + jnp.sqrt(cosine2 / total))
        named[f"norm_z{i}"] = jnp.sqrt(squared_norm)
        named[f"norm_b{i}a{i}"] = root(share * _trace(measured.gram_b) * _trace(measured.gram_a))
        named[f"norm_along{i}"] = root(jnp.sum(measured.along**2, axis=-1))
        named[f"norm_across{i}"] = root(_trace(measured.across))
        named[f"overlap_{i}"] = jnp.einsum("...i,...i->...", measured.left, measured.right)
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
        return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - axes) + [(0, rank - leaf.shape[-1])] * axes)

    return tuple(
        Measurement(pad(m.left, 1), pad(m.right, 1), pad(m.across, 2), pad(m.gram_a, 2), pad(m.gram_b, 2))
        for m in measurements
    )


Matrices = Float[Array, "*time rank rank"]


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

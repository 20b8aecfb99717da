"""One layer over time as the observables see it: its measurements, and the spectra that several of them need."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_flow.algebra.spectra import dominant, or_zero, positive, rounded, top_eigenvectors
from lora_flow.dynamics.measurements import Measurement, padded

Matrices = Float[Array, "*time rank rank"]


class Layer(NamedTuple):
    """The measurements of one layer over time, and what several observables make of them."""

    measured: Measurement
    start: Measurement  # at t = 0, with one time
    conserved: float | Float[Array, ""]  # the weight of A A^T in the matrix that the flow conserves; NaN without one
    size: Float[Array, " time"]  # about that of Z
    along: Float[Array, "time pairs rank"]  # Z^T gamma over that size, as the next two are
    across: Float[Array, "time rank rank"]  # R^T R
    squared_norm: Float[Array, " time"]  # ||Z||_2^2
    top: Float[Array, "time rank"]  # Z's top right singular vector; of tied ones the nearest to the direction
    share: Float[Array, " time"]  # the largest eigenvalue of B^T B A A^T over the two traces


def layers_over_time(
    measurements: tuple[Measurement, ...], conserved: float | Float[Array, ""], start: tuple[Measurement, ...] | None
) -> list[Layer]:
    """The layers, with the eigenvectors of all of them from one loop."""
    measurements = padded(measurements)
    begin = jax.tree.map(lambda leaf: leaf[:1], measurements)
    if start is not None:
        begin = jax.tree.map(lambda leaf: leaf[None], padded(start))
    sizes = [m.size for m in measurements]  # over which squares of Z hold
    alongs = [m.along / size[..., None, None] for m, size in zip(measurements, sizes, strict=True)]
    acrosses = [m.across.over(size) for m, size in zip(measurements, sizes, strict=True)]
    grams = jnp.stack([across + _gram(or_zero(along)) for along, across in zip(alongs, acrosses, strict=True)])
    products = jnp.stack([_over_its_trace(m.gram_b.matrix) @ _over_its_trace(m.gram_a.matrix) for m in measurements])
    projections = dominant(jnp.concatenate([grams, products]))  # all in one loop
    squared_norms, tops = _top_eigenpair(grams, projections[: len(grams)])
    spaces = jax.lax.stop_gradient(rounded(projections[: len(grams)]))
    shares = _top_eigenvalue(products, projections[len(grams) :])
    nearest = [_nearest(space, along, top) for space, along, top in zip(spaces, alongs, tops, strict=True)]
    shared = zip(sizes, alongs, acrosses, squared_norms, nearest, shares, strict=True)
    return [Layer(m, first, conserved, *rest) for m, first, rest in zip(measurements, begin, shared, strict=True)]


def trace(matrices: Matrices) -> Float[Array, "*time"]:
    return jnp.trace(matrices, axis1=-2, axis2=-1)


def _gram(rows: Float[Array, "*time pairs rank"]) -> Matrices:
    return jnp.einsum("...ki,...kj->...ij", rows, rows)


def _nearest(
    space: Matrices, along: Float[Array, "*time pairs rank"], top: Float[Array, "*time rank"]
) -> Float[Array, "*time rank"]:
    """The nearest to the direction among the tied singular vectors of Z, given by their projection.

    Rounding would decide which of them is the top one. Without a tie the result is the top one.
    """
    inside = jax.lax.stop_gradient(or_zero(along)) @ space

    def square(_: Any, power: Matrices) -> Matrices:
        power = _over_its_trace(power)
        return power @ power

    power = jax.lax.fori_loop(0, 6, square, _gram(inside))
    nearest = top_eigenvectors(power)
    ties = (trace(space) > 1.5) & jnp.any(nearest != 0, axis=-1)
    return jnp.where(ties[..., None], nearest, top)


@jax.custom_jvp
def _top_eigenpair(grams: Matrices, projections: Matrices) -> tuple[Float[Array, "*time"], Float[Array, "*time rank"]]:
    """The largest eigenvalue of symmetric matrices, and a unit vector of its eigenspace."""
    top = top_eigenvectors(projections)
    return jnp.einsum("...i,...ij,...j->...", top, grams, top), top


@_top_eigenpair.defjvp
def _(primals: Any, tangents: Any) -> Any:
    """First-order perturbation theory: dv = (lambda - G)^+ dG v, which is the motion out of the space of tied ones."""
    (grams, projections), (change, _) = primals, tangents
    tied = jax.lax.stop_gradient(rounded(projections))
    value, top = _top_eigenpair(*primals)
    turned = jnp.einsum("...ij,...j->...i", change, top)
    slope = jnp.sum(top * turned, axis=-1)
    scale = positive(value)[..., None, None]
    outside = turned[..., None] - tied @ turned[..., None]
    identity = jnp.broadcast_to(jnp.eye(grams.shape[-1]), grams.shape)
    resolvent = scale * (identity + tied) - grams
    return (value, top), (slope, jnp.linalg.solve(resolvent, outside)[..., 0])


def _top_eigenvalue(matrices: Matrices, projections: Matrices) -> Float[Array, "*time"]:
    """The largest eigenvalue of matrices that need not be symmetric; its derivative needs none of the projection's."""
    return jnp.sum(matrices * projections.mT, axis=(-2, -1)) / positive(trace(projections))


def _over_its_trace(grams: Matrices) -> Matrices:
    return grams / positive(trace(grams))[..., None, None]

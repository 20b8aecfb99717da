"""The observables of every run, each with its name, its meaning and its formula.

They follow from the measurements that the solve saves. To add one is to write its formula of a `Layer`, or of all
layers, below its name and meaning: trajectories, sweeps and their labels then have it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_flow.algebra.spectra import norm, positive, root
from lora_flow.dynamics.layer_spectra import Layer, Matrices, layers_over_time, trace
from lora_flow.dynamics.measurements import Measurement
from lora_flow.dynamics.observable_tables import Observables

OBSERVABLES = Observables()


def observables(
    measurements: tuple[Measurement, ...],
    conserved: float | Float[Array, ""] = 1.0,
    start: tuple[Measurement, ...] | None = None,
) -> dict[str, Float[Array, " time"]]:
    """The `OBSERVABLES` by name, from measurements whose leading axis is time.

    **Arguments:** the layers' `measurements`; the weight of A A^T in the matrix that the flow has `conserved`, 1 for
    gradient flow, LoRA+'s ratio, or NaN; the measurements at the `start`, without time, or else the first ones count.

    **Returns:** name -> `(time,)`; `OBSERVABLES.meanings(layers)` has their meanings. Without a direction
    `alignment_error`, `norm_along`, `norm_across` and `overlap` are NaN.
    """
    return OBSERVABLES.values(layers_over_time(measurements, conserved, start))


@OBSERVABLES.of_each_layer("alignment_error", "1 - |cos(gamma_{i}, top left singular vector of Z_{i})|")
def alignment_error(layer: Layer) -> Float[Array, " time"]:
    """1 - |cos| of the angle between gamma = (l; r)/sqrt(2) and the top left singular vector of Z.

    The component across gamma gives the angle, not the cosine, and resolves errors down to eps ||R||^2 / ||Z||^2 with R
    the part of Z across gamma: to 1e-30 while only one direction of Z is large (`analyse` has no such floor). Of tied
    singular pairs, of the task or of Z, the nearest count: the angle is between the spaces. NaN where Z is zero, and
    where the task has no direction (`principal_directions`). Its derivative at tied singular values of Z is that for
    the nearest vector held fixed.
    """
    cosine2 = jnp.sum(jnp.einsum("...ki,...i->...k", layer.along, layer.top) ** 2, axis=-1)
    sine2 = jnp.maximum(jnp.einsum("...i,...ij,...j->...", layer.top, layer.across, layer.top), 0.0)
    total = cosine2 + sine2
    error = sine2 / positive(total) / (1 + root(cosine2 / positive(total)))
    return jnp.where(total > 0, error, jnp.nan)


@OBSERVABLES.of_each_layer("norm_z{i}", "spectral norm of Z_{i} = [B_{i}; A_{i}^T]")
def norm_z(layer: Layer) -> Float[Array, " time"]:
    """The spectral norm of the stacked factors. The derivative of this and of every other norm at zero is zero."""
    return root(layer.squared_norm) * layer.size


@OBSERVABLES.of_each_layer("norm_b{i}a{i}", "spectral norm of B_{i} A_{i}")
def norm_ba(layer: Layer) -> Float[Array, " time"]:
    """The spectral norm of the product; the ratio of the layers' says which adapter is selected."""
    gram_a, gram_b = layer.measured.gram_a, layer.measured.gram_b
    return root(layer.share * trace(gram_b.matrix) * trace(gram_a.matrix)) * gram_b.size * gram_a.size


@OBSERVABLES.of_each_layer("norm_along{i}", "||gamma_{i}^T Z_{i}||")
def norm_along(layer: Layer) -> Float[Array, " time"]:
    """The norm of the part of Z along gamma."""
    return norm(layer.along, axis=(-2, -1)) * layer.size


@OBSERVABLES.of_each_layer("norm_across{i}", "||Z_{i} - gamma_{i} gamma_{i}^T Z_{i}||_F")
def norm_across(layer: Layer) -> Float[Array, " time"]:
    """The Frobenius norm of the rest of Z."""
    across = layer.measured.across
    undefined = jnp.where(jnp.isnan(layer.along).any(axis=(-2, -1)), jnp.nan, 0.0)
    return root(trace(across.matrix)) * across.size + undefined


@OBSERVABLES.of_each_layer(
    "overlap_{i}", "l_{i}^T B_{i} A_{i} r_{i}: with gamma_{i} = (l_{i}; r_{i})/sqrt(2), summed over tied pairs"
)
def overlap(layer: Layer) -> Float[Array, " time"]:
    """l^T B A r, which defines the paper's T1; the sum over tied pairs."""
    return jnp.sum(layer.measured.left * layer.measured.right, axis=(-2, -1))


@OBSERVABLES.of_all_layers(
    "drift", "drift of what the flow conserves: A A^T - B^T B if plain, relative to ||Z||^2 (an integration error)"
)
def drift(layers: Sequence[Layer]) -> Float[Array, " time"]:
    """The largest over layers of ||C(t) - C(0)||_F / ||Z(t)||^2, with C = `conserved` A A^T - B^T B.

    Gradient flow conserves C with 1, LoRA+ with its ratio, so the drift is an error of the integration. NaN where
    `conserved` is NaN, for flows without such a quantity.
    """
    return jnp.max(jnp.stack(list(map(_drift, layers))), axis=0)


def _drift(layer: Layer) -> Float[Array, " time"]:
    none = jnp.isnan(layer.conserved)
    weight = jnp.where(none, 0.0, layer.conserved)  # NaN would spoil derivatives of everything else
    size, squared_norm = layer.size, layer.squared_norm
    then, now = (_imbalance(measured, size, weight) for measured in (layer.start, layer.measured))
    change = jnp.where(squared_norm > 0, norm(now - then, axis=(-2, -1)) / positive(squared_norm), 0.0)
    return jnp.where(none, jnp.nan, change)


def _imbalance(measured: Measurement, unit: Float[Array, "*time"], weight: Float[Array, ""]) -> Matrices:
    """(`weight` A A^T - B^T B) / unit^2."""
    return weight * measured.gram_a.over(unit) - measured.gram_b.over(unit)

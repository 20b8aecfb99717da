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
from lora_flow.problem import Problem, linearised_task


class Measurement(NamedTuple):
    """One layer's stacked factor Z = [B; A^T] at one time, as seen from its principal direction gamma."""

    along: Float[Array, "*time rank"]  # gamma^T Z
    across: Float[Array, "*time rank rank"]  # R^T R, with R = Z - gamma gamma^T Z
    imbalance: Float[Array, "*time rank rank"]  # A A^T - B^T B


def principal_directions(problem: Problem) -> tuple[Array, ...]:
    """The unit vectors gamma_i of shape `(out + in,)` with which the stacked factors Z_i align.

    gamma_i = (left; right) / sqrt(2), with the top singular pair of layer i's linearised task. On an
    aligned problem these are the paper's gamma_1 = (g; v)/sqrt(2) and gamma_2 = (u; g)/sqrt(2).
    """

    def direction(task: Array) -> Array:
        u, _, vt = jnp.linalg.svd(task, full_matrices=False)
        return jnp.concatenate([u[:, 0], vt[0]]) / jnp.sqrt(2.0)

    return tuple(map(direction, linearised_task(problem)))


def measure(adapters: Adapters, directions: tuple[Array, ...]) -> tuple[Measurement, ...]:
    """The measurements of every layer, in O((out + in) r^2) each."""

    def one(adapter: Adapter, gamma: Array) -> Measurement:
        stacked = adapter.stacked
        along = gamma @ stacked
        rest = stacked - jnp.outer(gamma, along)
        return Measurement(along, rest.T @ rest, adapter.imbalance)

    return tuple(map(one, adapters, directions))


def observables(measurements: tuple[Measurement, ...]) -> dict[str, Float[Array, " time"]]:
    """Named observables over time, from measurements whose leading axis is time.

    - `alignment_error`: 1 - |cos| of the angle between gamma_1 and the top left singular vector of
      Z_1; `alignment_error_2` the same for layer 2, and so on. It comes from the component across gamma, not
      from the cosine, and resolves errors down to eps ||R||^2 / ||Z||^2 with R the part of Z across gamma: to
      1e-30 while only one direction of Z is large. NaN where Z is zero.
    - `norm_z1`, `norm_z2`, ...: the spectral norms of the stacked factors.
    - `drift`: the largest over layers of ||C_i(t) - C_i(0)||_F / ||Z_i(t)||^2, with C_i = A_i A_i^T - B_i^T B_i.
      Gradient flow conserves C_i, so this is an error of the integration.
    """
    named, drifts = {}, []
    for layer, (along, across, imbalance) in enumerate(measurements, start=1):
        squared_norm, top = _top_eigenpair(across + along[..., :, None] * along[..., None, :])
        cosine2 = jnp.einsum("...i,...i->...", along, top) ** 2
        sine2 = jnp.maximum(jnp.einsum("...i,...ij,...j->...", top, across, top), 0.0)
        total = cosine2 + sine2
        cosine = jnp.sqrt(cosine2 / total)
        named[f"norm_z{layer}"] = jnp.sqrt(squared_norm)
        named["alignment_error" if layer == 1 else f"alignment_error_{layer}"] = sine2 / total / (1 + cosine)
        change = jnp.sum((imbalance - imbalance[..., :1, :, :]) ** 2, axis=(-2, -1))
        moved = (change > 0) & (squared_norm > 0)
        drift = jnp.sqrt(jnp.where(moved, change, 1.0)) / jnp.where(moved, squared_norm, 1.0)
        drifts.append(jnp.where(moved, drift, 0.0))
    named["drift"] = jnp.max(jnp.stack(drifts), axis=0)
    return named


def _top_eigenpair(gram: Float[Array, "*time rank rank"]) -> tuple[Float[Array, "*time"], Float[Array, "*time rank"]]:
    """The largest eigenvalue of positive semidefinite matrices, and a unit vector of its eigenspace.

    By repeated squaring, which only multiplies matrices: LAPACK calls inside a compiled program are slow for
    thousands of tiny matrices, and on CPU the two layers' calls can wait for each other for ever. After 40 squarings
    a second eigenvalue smaller by a relative 1e-10 has vanished; one closer than that is a tie.
    """

    def square(_: Any, power: Array) -> Array:
        power = power / jnp.maximum(jnp.max(jnp.abs(power), axis=(-2, -1), keepdims=True), tiny)
        return power @ power

    tiny = jnp.finfo(gram.dtype).tiny
    power = jax.lax.fori_loop(0, 40, square, gram)
    column = jnp.argmax(jnp.diagonal(power, axis1=-2, axis2=-1), axis=-1)
    top = jnp.take_along_axis(power, column[..., None, None], axis=-1)[..., 0]
    top = top / jnp.maximum(jnp.linalg.norm(top, axis=-1, keepdims=True), tiny)
    return jnp.einsum("...i,...ij,...j->...", top, gram, top), top

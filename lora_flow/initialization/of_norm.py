"""Starts of one norm, and along the gradient by a few numbers: what is compared, and what is learned."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters
from lora_flow.algebra.diagonal import Matrix
from lora_flow.algebra.spectra import norm
from lora_flow.initialization.directions import triplets
from lora_flow.problems.base import Layers, Problem, linearised_task


def total_norm(adapters: Adapters) -> Float[Array, ""]:
    """The Frobenius norm of all factors of all layers together."""
    return norm(jnp.concatenate([jnp.ravel(factor) for adapter in adapters for factor in adapter]))


def on_sphere(adapters: Adapters, radius: float | Array) -> Adapters:
    """The adapters in the same direction whose total norm is the radius."""
    factor = radius / total_norm(adapters)
    scaled: Adapters = jax.tree.map(lambda leaf: factor * leaf, adapters)
    return scaled


def gaussian_norm(alpha: float | Array, rank: int, layers: Layers) -> float | Array:
    """The root mean square of the total norm of Gaussian starts, which draw A: alpha sqrt(rank sum of inputs)."""
    return alpha * float(np.sqrt(rank * sum(n_in for _, n_in in layers)))


def along_gradient(
    problem: Problem, rank: int, mix: float | Array, power: float | Array, layers: Float[Array, " layers"]
) -> Adapters:
    r"""Starts along the singular vectors of each layer's negative gradient U S V^T, up to their norm:

        A_i = w_i cos(mix) (S_r/S_1)^power V_r^T,   B_i = w_i sin(mix) U_r (S_r/S_1)^power.

    The weights w_i are exp(layers_i), relative to the largest. At mix = 0 only A is there, along the spectral start's
    span; mix = pi/4 and power = 1/2 are LoRA-One's balanced factors. Directions beyond the gradient's rank are zero.
    """
    weights = jnp.exp(layers - jax.lax.stop_gradient(jnp.max(layers)))

    def one(task: Matrix, weight: Array) -> Adapter:
        u, s, vt = triplets(task, rank)
        known = s > 0
        size = jnp.where(known, jnp.exp(power * jnp.log(jnp.where(known, s, 1.0) / s[0])), 0.0) * weight
        return Adapter(jnp.cos(mix) * size[:, None] * vt, jnp.sin(mix) * u * size[None])

    return tuple(map(one, linearised_task(problem), weights))

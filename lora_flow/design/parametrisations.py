"""What is searched: free numbers, and the adapters that they stand for, whatever the numbers are."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_flow.adapter import Adapters
from lora_flow.algebra.spectra import norm


def total_norm(adapters: Adapters) -> jax.Array:
    """The Frobenius norm of all factors of all layers together."""
    return norm(jnp.concatenate([jnp.ravel(factor) for adapter in adapters for factor in adapter]))


def on_sphere(adapters: Adapters, radius: float | jax.Array) -> Adapters:
    """The adapters in the same direction whose total norm is the radius."""
    factor = radius / total_norm(adapters)
    scaled: Adapters = jax.tree.map(lambda leaf: factor * leaf, adapters)
    return scaled

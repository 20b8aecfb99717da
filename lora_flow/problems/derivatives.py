"""What differentiation tells of a loss that comes without formulas."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters, zero_adapters
from lora_flow.algebra.spectra import norm

Loss = Callable[[Adapters], Array]
Layers = tuple[tuple[int, int], ...]


def probe(layers: Layers, rank: int) -> Adapters:
    """Adapters at which nothing vanishes, always the same."""

    def wave(rows: int, columns: int, phase: float) -> Array:
        return jnp.cos(phase + jnp.arange(rows)[:, None] + 0.7 * jnp.arange(columns)[None] ** 1.5) / np.sqrt(rank)

    return tuple(Adapter(wave(rank, n_in, 0.1), wave(n_out, rank, 0.5)) for n_out, n_in in layers)


def task(loss: Loss, layers: Layers, index: int, a: float | Array = 0.0) -> Float[Array, "out in"]:
    """Minus the gradient with respect to one layer's A, at B = I: the layer's task where A = 0.

    B A = 0 changes no layer, and with B = I the gradient with respect to A is that with respect to the layer's weight.
    """
    unit = jnp.eye(layers[index][0])
    start = list(zero_adapters(layers, len(unit)))
    start[index] = Adapter(start[index].a + a, unit)
    return -jax.grad(loss)(tuple(start))[index].a


def task_size(loss: Loss, layers: Layers, index: int) -> Float[Array, ""]:
    """||J|| ||E|| of one layer, whose task is J^T E with E the residual and J its derivative.

    ||E|| is that of a sum of squares, (2 L)^(1/2), and ||J||^2 the curvature along some change of the layer.
    """
    ((change, _),) = probe((layers[index],), layers[index][0])
    change = change / norm(change)
    try:
        _, slope = jax.jvp(lambda a: task(loss, layers, index, a), (jnp.zeros_like(change),), (change,))
    except Exception:  # of a loss that is not made to be differentiated twice, exact zeros are all that is known
        slope = jnp.zeros_like(change)
    norms = jnp.sqrt(2 * jnp.abs(loss(zero_adapters(layers, 1))) * norm(slope))
    return jnp.where(jnp.isfinite(norms), norms, 0.0)

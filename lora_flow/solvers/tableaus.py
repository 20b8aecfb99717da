"""A step of an explicit Runge-Kutta method, given by its tableau: the field is traced once, however many stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Field = Callable[[Float[Array, " d"]], Float[Array, " d"]]  # which does not depend on the time


def tableau_slopes(
    tableau: Any, count: int, field: Field, y0: Float[Array, " d"], dt: Float[Array, ""]
) -> Float[Array, "count d"]:
    """The slopes at the first stages of a step by a tableau, as diffrax has them."""
    weights = np.zeros((count, count))
    for length, row in enumerate(tableau.a_lower[: count - 1], start=1):
        weights[length, :length] = row

    def stage(slopes: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        index, weights = row
        return slopes.at[index].set(field(y0 + dt * weighted(weights, slopes))), None

    rows = jnp.arange(count), jnp.asarray(weights, y0.dtype)
    return jax.lax.scan(stage, jnp.zeros((count, *y0.shape), y0.dtype), rows)[0]


def tableau_step(tableau: Any, field: Field, y0: Float[Array, " d"], dt: Float[Array, ""]) -> dict[str, Array]:
    """The step as diffrax's interpolations take it: its ends, and the slopes times dt."""
    k = dt * tableau_slopes(tableau, len(tableau.b_sol), field, y0, dt)
    return {"y0": y0, "y1": y0 + weighted(tableau.b_sol, k), "k": k}


def weighted(weights: Any, vectors: Float[Array, "count d"]) -> Float[Array, " d"]:
    """Their sum, entry by entry: as a matrix product it would copy them, once more for each of many lanes."""
    return jnp.sum(jnp.asarray(weights, vectors.dtype)[:, None] * vectors, axis=0)

"""What the oracles check of their arguments: matrices, and assumptions that hold up to rounding."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from lora_flow.algebra.diagonal import as_matrix, dense
from lora_flow.arrays import real_array
from lora_flow.checks import concrete, require

ROUNDING = 1e3  # spacings of the type, relative to its size, by which a start may miss its assumptions


def matrix(name: str, value: ArrayLike) -> Array:
    return dense(as_matrix(name, value))


def finite(name: str, value: ArrayLike) -> Array:
    """Finite numbers of any shape."""
    array = real_array(name, value)
    known = concrete(array)
    require(known is None or np.all(np.isfinite(known)), name, "be finite", "entries that are not")
    return array


def concrete_all(*values: Array) -> list[np.ndarray] | None:
    """The values, for checks, unless JAX traces any of them."""
    known = [concrete(value) for value in values]
    return None if any(value is None for value in known) else known  # type: ignore[return-value]


def require_times(t: Array) -> None:
    """Raises for times that are negative or not finite, as far as they are known."""
    times = concrete(t)
    if times is not None and times.size:
        first, last = float(np.min(times)), float(np.max(times))
        require(first >= 0 and last < np.inf, "t", "be finite and at least 0", f"{first:g} ... {last:g}")


def multiple_of_identity(square: np.ndarray, size: float, name: str, must: str) -> float:
    """The multiple c of a matrix that is c I up to rounding."""
    multiple = np.trace(square) / len(square)
    require_zero(square - multiple * np.eye(len(square)), size, name, must)
    return float(multiple)


def require_zero(difference: np.ndarray, size: float, name: str, must: str) -> None:
    worst = np.abs(difference).max()
    require(worst <= ROUNDING * jnp.finfo(float).eps * abs(size), name, must, f"a difference of {worst:.2g}")

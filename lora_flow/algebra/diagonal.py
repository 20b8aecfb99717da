"""A diagonal matrix that is not written out, and what it has in common with one that is."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.algebra.low_rank import LowRank
from lora_flow.arrays import AnyArray, numbers, real_array
from lora_flow.checks import concrete, kind, require

WRITTEN_OUT = 1024  # the largest dimension at which matrices are made, and decomposed, without being asked for


class Diagonal(eqx.Module):
    """A real matrix of the given `shape` with `values` on the first places of its diagonal, zero elsewhere.

    Multiplies arrays with `@` from either side, in O(rows) for each column; `dense()` and `numpy.asarray` write it out.
    """

    values: Float[Array | np.ndarray, " rank"]
    shape: tuple[int, int] = eqx.field(static=True)

    __array_ufunc__ = None  # NumPy leaves `array @ diagonal` to `__rmatmul__`

    def __init__(self, values: AnyArray, shape: tuple[int, int]):
        pair = isinstance(shape, (tuple, list)) and len(shape) == 2
        whole = pair and all(isinstance(one, (int, np.integer)) and one is not True and one >= 0 for one in shape)
        require(whole, "shape", "be two whole numbers", kind(shape))
        self.shape = int(shape[0]), int(shape[1])
        self.values, room = numbers("values", values), min(self.shape)  # NumPy's stay so: nothing is compiled for them
        fits = self.values.ndim == 1 and len(self.values) <= room
        require(fits, "values", f"be a vector of at most {room} entries", f"shape {self.values.shape}")

    @property
    def rank(self) -> int:
        """The number of places with a value."""
        return self.values.shape[-1]

    @property
    def T(self) -> Diagonal:
        return Diagonal(self.values, self.shape[::-1])

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def __matmul__(self, x: Any) -> Any:
        if isinstance(x, Diagonal):
            require(self.shape[1] == x.shape[0], "a factor", f"have {self.shape[1]} rows", f"shape {x.shape}")
            k = min(self.rank, x.rank)
            return Diagonal(self.values[:k] * x.values[:k], (self.shape[0], x.shape[1]))
        require(x.ndim == 2 and len(x) == self.shape[1], "a factor", f"have {self.shape[1]} rows", f"shape {x.shape}")
        return jnp.pad(self.values[:, None] * x[: self.rank], ((0, self.shape[0] - self.rank), (0, 0)))

    def __rmatmul__(self, x: Any) -> Any:
        fits = x.ndim == 2 and x.shape[1] == self.shape[0]
        require(fits, "a factor", f"have {self.shape[0]} columns", f"shape {x.shape}")
        return jnp.pad(x[:, : self.rank] * self.values[None], ((0, 0), (0, self.shape[1] - self.rank)))

    def __truediv__(self, divisor: Any) -> Diagonal:
        return Diagonal(self.values / divisor, self.shape)

    def dense(self) -> Float[Array, "rows columns"]:
        return self @ jnp.eye(self.shape[1], dtype=self.dtype)

    def factors(self) -> tuple[Float[Array, "rows rank"], Float[Array, "rank columns"]]:
        """Thin factors, `dense() == left @ right`."""
        rows, columns = self.shape
        unit = jnp.ones(self.rank, self.dtype)
        return Diagonal(self.values, (rows, self.rank)).dense(), Diagonal(unit, (self.rank, columns)).dense()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.dense(), dtype)


Matrix = Array | np.ndarray | Diagonal | LowRank


def as_matrix(name: str, value: Any) -> Array | Diagonal:
    """The value as a finite matrix of JAX's default floating-point type, a copy, or `InputError` under that name."""
    if isinstance(value, Diagonal):
        values = real_array(name, value.values)
        _check_size(name, values)
        return Diagonal(values, value.shape)
    array = real_array(name, value, "be a matrix of real numbers")
    require(array.ndim == 2, name, "be a matrix", f"shape {array.shape}")
    require(array.size > 0, name, "have at least one entry", f"shape {array.shape}")
    _check_size(name, array)
    return array


def _check_size(name: str, array: Array) -> None:
    values = concrete(array)
    if values is None:
        return
    bad, limits = int(np.sum(~np.isfinite(values))), np.finfo(values.dtype)
    require(bad == 0, name, "be finite", f"{bad} entries that are NaN or infinite")
    largest, most = np.max(np.abs(values), initial=0.0), float(limits.max) ** 0.25
    must = f"have no entry above {most:.2g} in size, for its squares to hold in {values.dtype}"
    require(largest <= most, name, must, f"{largest:.3g}")


def check_task(name: str, matrix: Matrix) -> None:
    """Raises for a matrix to learn that is zero, or so small that its squares are."""
    for leaf in jax.tree.leaves(matrix):
        values = concrete(leaf)
        if values is None:
            return
        largest, least = np.max(np.abs(values), initial=0.0), float(np.finfo(values.dtype).tiny) ** 0.25
        require(largest > 0, name, "have a non-zero entry", "nothing to learn")
        must = f"have an entry of at least {least:.2g} in size, for its squares to hold in {values.dtype}"
        require(largest >= least, name, must, f"{largest:.3g}")


def dense(matrix: Matrix) -> Any:
    """The matrix written out."""
    return matrix.dense() if isinstance(matrix, (Diagonal, LowRank)) else matrix

"""A matrix that is known by some of its singular triplets."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class LowRank(eqx.Module):
    """U diag(S) V^T, with orthonormal columns of U and rows of V^T, and S in decreasing order.

    It stands for a larger matrix where only these triplets matter, the first ones or the last.
    """

    u: Float[Array | np.ndarray, "rows k"]
    s: Float[Array | np.ndarray, " k"]
    vt: Float[Array | np.ndarray, "k columns"]

    __array_ufunc__ = None  # NumPy leaves `array @ low_rank` to `__rmatmul__`

    @property
    def shape(self) -> tuple[int, int]:
        return self.u.shape[0], self.vt.shape[1]

    @property
    def dtype(self) -> Any:
        return self.s.dtype

    @property
    def T(self) -> LowRank:
        return LowRank(self.vt.T, self.s, self.u.T)

    def __len__(self) -> int:
        return self.shape[0]

    def __matmul__(self, x: Any) -> Array:
        return (jnp.asarray(self.u) * jnp.asarray(self.s)[None]) @ (jnp.asarray(self.vt) @ x)

    def __rmatmul__(self, x: Any) -> Array:
        return (x @ (jnp.asarray(self.u) * jnp.asarray(self.s)[None])) @ jnp.asarray(self.vt)

    def __mul__(self, factor: Any) -> LowRank:
        """For a positive factor."""
        return LowRank(self.u, self.s * factor, self.vt)

    def __truediv__(self, divisor: Any) -> LowRank:
        """For a positive divisor."""
        return LowRank(self.u, self.s / divisor, self.vt)

    def first(self, count: int) -> LowRank:
        return LowRank(self.u[:, :count], self.s[:count], self.vt[:count])

    def dense(self) -> Float[Array, "rows columns"]:
        return (jnp.asarray(self.u) * jnp.asarray(self.s)[None]) @ jnp.asarray(self.vt)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.dense(), dtype)

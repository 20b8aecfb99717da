"""Thin factors: norms, frames and small systems, without LAPACK."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.algebra.diagonal import Diagonal, Matrix
from lora_flow.algebra.spectra import norm, norm_on_host


def column_norms(matrix: Matrix) -> np.ndarray:
    if isinstance(matrix, Diagonal):
        return np.pad(np.abs(matrix.values), (0, matrix.shape[1] - matrix.rank))
    return norm_on_host(np.asarray(matrix), axis=0)


def gram_schmidt(
    x: Float[Array, "rows columns"], least: Any = 0.0
) -> tuple[Float[Array, "rows columns"], Float[Array, "columns columns"]]:
    """A thin QR factorisation x = Q R by Gram-Schmidt with every column orthogonalised twice (Giraud et al. 2005).

    A column that depends on earlier ones gets zeros in Q; its diagonal place of R has the size of what is left of it,
    which is rounding, or at most `least`. There is no LAPACK in it: such calls inside a compiled program are slow for
    many small matrices, and on CPU can wait for each other for ever.
    """
    sizes = norm(x, axis=0)
    rounding = x.shape[0] * jnp.finfo(x.dtype).eps

    def orthogonalise(j: Any, factors: tuple[Array, Array]) -> tuple[Array, Array]:
        q, r = factors
        column, overlap = x[:, j], jnp.zeros(x.shape[1], x.dtype)
        for _ in range(2):
            again = q.T @ column
            column, overlap = column - q @ again, overlap + again
        size = norm(column)
        independent = size > jnp.maximum(rounding * sizes[j], least)
        unit = jnp.where(independent, column / jnp.where(independent, size, 1.0), 0.0)
        return q.at[:, j].set(unit), r.at[:, j].set(overlap).at[j, j].set(size)

    count = x.shape[1]
    return jax.lax.fori_loop(0, count, orthogonalise, (jnp.zeros_like(x), jnp.zeros((count, count), x.dtype)))


class Root(NamedTuple):
    """R, upper triangular, with R^T R = x^T x: a root of a Gram matrix that keeps the digits of x.

    Solutions have 0 in the places of columns of x that depend on earlier ones.
    """

    r: Float[Array, "k k"]
    inverse: Float[Array, " k"]  # of R's diagonal, 0 for such columns

    @classmethod
    def of(cls, x: Float[Array, "rows k"]) -> Root:
        _, r = gram_schmidt(x)
        size = jnp.diagonal(r)
        independent = size > x.shape[0] * jnp.finfo(x.dtype).eps * norm(x, axis=0)
        return cls(r, jnp.where(independent, 1 / jnp.where(independent, size, 1.0), 0.0))

    def solve_transposed(self, y: Float[Array, "k n"]) -> Float[Array, "k n"]:
        """z with R^T z = y."""

        def down(j: Any, z: Array) -> Array:
            return z.at[j].set(self.inverse[j] * (y[j] - self.r[:, j] @ z))

        return jax.lax.fori_loop(0, len(self.r), down, jnp.zeros_like(y))

    def solve(self, y: Float[Array, "k n"]) -> Float[Array, "k n"]:
        """z with R z = y."""
        count = len(self.r)

        def up(i: Any, z: Array) -> Array:
            j = count - 1 - i
            above = jnp.where(jnp.arange(count) > j, self.r[j], 0.0)
            return z.at[j].set(self.inverse[j] * (y[j] - above @ z))

        return jax.lax.fori_loop(0, count, up, jnp.zeros_like(y))


def solve_gram(x: Float[Array, "rows columns"], y: Float[Array, "columns k"]) -> Float[Array, "columns k"]:
    """z with x^T x z = y and 0 in the places of columns of x that depend on earlier ones; without LAPACK."""
    root = Root.of(x)
    return root.solve(root.solve_transposed(y))


@jax.custom_jvp
def squared_norm_of_product(x: Float[Array, "m k"], y: Float[Array, "k n"]) -> Float[Array, ""]:
    """||x y||_F^2 from the triangular factors of x and y^T, in O((m + n) k^2).

    The Gram matrices of x and y would lose half of the digits of a small product of large factors. The derivative,
    which is linear in the product, may use them.
    """
    return jnp.sum((gram_schmidt(x)[1] @ gram_schmidt(y.T)[1].T) ** 2)


@squared_norm_of_product.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x, y), (dx, dy) = primals, tangents
    slope = 2 * (jnp.sum(dx * (x @ (y @ y.T))) + jnp.sum(dy * ((x.T @ x) @ y)))
    return squared_norm_of_product(x, y), slope

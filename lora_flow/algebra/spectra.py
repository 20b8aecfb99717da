"""Norms, singular values and singular vectors."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float

from lora_flow.algebra.diagonal import Diagonal, Matrix, dense

WIDEST = 8  # singular vectors of one value that are taken together

NULL = 10  # n eps of the largest eigenvalue, up to which the others of a symmetric matrix are rounding
NEGLIGIBLE = 64  # eps of what it was made from, up to which a product of matrices is rounding


def top_pair(matrix: Matrix) -> tuple[Array, Array]:
    """The top left and right singular vectors, which derivatives take for constants."""
    if isinstance(matrix, Diagonal):
        values = jnp.pad(jnp.asarray(matrix.values), (0, 1))  # which may be none
        first = jnp.argmax(jnp.abs(values))
        left, right = (jnp.where(jnp.arange(size) == first, 1.0, 0.0) for size in matrix.shape)
        return jnp.where(values[first] < 0, -1.0, 1.0) * left, right
    x = jax.lax.stop_gradient(jnp.asarray(matrix))
    if x.shape[0] > x.shape[1]:
        return top_pair(x.T)[::-1]
    x = x / positive(jnp.max(jnp.abs(x)))
    left = top_eigenvectors(dominant(x @ x.T))
    right = x.T @ left
    zero = ~jnp.any(x)
    left, right = (jnp.where(zero, jnp.arange(len(v)) == 0, v) for v in (left, right))
    return left, right / norm(right)


def top_space(matrix: Matrix, size: Any = 0.0) -> tuple[Float[Array, "k rows"], Float[Array, "k columns"]]:
    """The singular vectors of the largest singular value, all that tie for it; a row each, the others of `WIDEST` zero.

    All of them are zero where no direction is the matrix's own: where it is zero, or rounding beside what it was made
    from, the product of whose norms is `size`, and where more than `WIDEST` tie. For derivatives they are constants.
    """
    widest = min(*matrix.shape, WIDEST)
    if isinstance(matrix, Diagonal):
        values = jax.lax.stop_gradient(jnp.pad(jnp.asarray(matrix.values), (0, widest)))
        largest, places = jax.lax.top_k(jnp.abs(values), widest)
        tied = jnp.abs(values) >= (1 - tie(values.dtype)) * largest[0]
        own = _is_own(jnp.sum(tied), jnp.linalg.norm(values / positive(largest[0])) * largest[0], size)
        kept = tied[places] & own
        left, right = (jnp.where(kept[:, None], jax.nn.one_hot(places, n, dtype=values.dtype), 0) for n in matrix.shape)
        return jnp.where(values[places] < 0, -1.0, 1.0)[:, None] * left, right
    x = jax.lax.stop_gradient(jnp.asarray(matrix))
    if x.shape[0] > x.shape[1]:
        return top_space(x.T, size)[::-1]
    unit = jnp.max(jnp.abs(x))
    x = x / positive(unit)
    space = rounded(dominant(x @ x.T))
    count = jnp.round(jnp.trace(space))
    own = _is_own(count, jnp.linalg.norm(x) * unit, size)

    def add(j: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left, rest = carry
        vector = jnp.where(own & (j < count), top_eigenvectors(rest), 0.0)
        return left.at[j].set(vector), rest - jnp.outer(vector, vector @ rest)

    left, _ = jax.lax.fori_loop(0, widest, add, (jnp.zeros((widest, len(x)), x.dtype), space))
    right = left @ x
    return left, right / positive(jnp.linalg.norm(right, axis=1, keepdims=True))


def _is_own(count: Array, length: Array, size: Any) -> Array:
    return (length > NEGLIGIBLE * jnp.finfo(length.dtype).eps * size) & (length > 0) & (count <= WIDEST)


def spectral_norm(matrix: Matrix) -> Array:
    """The largest singular value."""
    _, right = top_pair(matrix)
    return norm(matrix @ right[:, None])


def singular_triplets(
    matrix: Matrix, count: int
) -> tuple[Float[Array, "rows k"], Float[Array, " k"], Float[Array, "k columns"]]:
    """(U, S, V^T) of the largest singular values, at most as many as the smaller dimension."""
    if isinstance(matrix, Diagonal):
        order = jnp.argsort(-jnp.abs(matrix.values))[:count]
        values = matrix.values[order]
        left, right = (jax.nn.one_hot(order, size, dtype=matrix.dtype) for size in matrix.shape)
        return (jnp.where(values < 0, -1.0, 1.0)[:, None] * left).T, jnp.abs(values), right
    u, s, vt = jnp.linalg.svd(dense(matrix), full_matrices=False)
    return u[:, :count], s[:count], vt[:count]


def singular_values(matrix: Matrix) -> np.ndarray:
    """All the singular values that can be non-zero, the largest first."""
    if isinstance(matrix, Diagonal):
        return np.sort(np.abs(matrix.values))[::-1]
    return np.linalg.svd(np.asarray(matrix), compute_uv=False)


def eigenvalue_rounding(values: Any) -> Any:
    """The size up to which eigenvalues of a symmetric matrix count as zero, from all of them, of NumPy or JAX."""
    return NULL * len(values) * np.finfo(values.dtype).eps * abs(values).max(initial=0.0)


def frobenius_norm(matrix: Matrix) -> Array:
    return norm(jnp.asarray(matrix.values if isinstance(matrix, Diagonal) else matrix))


Matrices = Float[Array, "*batch n n"]


def dominant(matrices: Matrices) -> Matrices:
    """Multiples of the projections on the eigenspaces of the largest eigenvalues, none of which is negative.

    By repeated squaring, which only multiplies matrices: LAPACK calls inside a compiled program are slow for
    thousands of tiny matrices, and on CPU two of them can wait for each other for ever. After 40 squarings
    a second eigenvalue smaller by a relative 1e-10 has vanished; one closer than that is a tie. In single precision 15
    do, and 1e-3: what is closer than rounding must not be told apart.
    """
    most = squarings(matrices.dtype)

    def unsettled(carry: tuple[Array, Array, Array]) -> Array:
        count, _, change = carry
        return (count < most) & jnp.any(change > 8 * jnp.finfo(matrices.dtype).eps)

    def square(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, power, _ = carry
        power = power / positive(jnp.trace(power))[None, None]
        squared = _product(power)  # which is the power itself once only one eigenvalue is left
        return count + 1, squared, jnp.max(jnp.abs(squared - power), axis=(0, 1))

    side_by_side = jax.lax.stop_gradient(jnp.moveaxis(matrices, (-2, -1), (0, 1)))
    start = jnp.zeros((), int), side_by_side, jnp.ones(matrices.shape[:-2], matrices.dtype)
    return jnp.moveaxis(jax.lax.while_loop(unsettled, square, start)[1], (0, 1), (-2, -1))


def squarings(dtype: Any) -> int:
    return 40 if jnp.finfo(dtype).bits > 32 else 15


def tie(dtype: Any) -> float:
    """The relative gap below which two singular values tie: 3e-13 in double precision, 1e-5 in single.

    Directions that are told apart by less come from rounding. It is where `dominant`, of squares, leaves a half.
    """
    return float(np.log(2)) / 2 ** (squarings(dtype) + 1)


def rounded(projections: Matrices) -> Matrices:
    """Projections from `dominant`'s multiples of them: what ties gets 1, the rest 0."""
    top = top_eigenvectors(projections)
    largest = jnp.einsum("...i,...ij,...j->...", top, projections, top)

    def to_nearer(_: Any, space: Matrices) -> Matrices:
        """3 x^2 - 2 x^3 takes everything to the nearer of 0 and 1."""
        square = space @ space
        return 3 * square - 2 * square @ space

    return jax.lax.fori_loop(0, 5, to_nearer, projections / positive(largest)[..., None, None])


def top_eigenvectors(projections: Matrices) -> Float[Array, "*batch n"]:
    """A unit vector of the eigenspace that each of the `dominant` projections is on; zero where that is zero."""
    column = jnp.argmax(jnp.diagonal(projections, axis1=-2, axis2=-1), axis=-1)
    top = jnp.take_along_axis(projections, column[..., None, None], axis=-1)[..., 0]
    return top / positive(jnp.linalg.norm(top, axis=-1, keepdims=True))


def _product(power: Float[Array, "n n *batch"]) -> Float[Array, "n n *batch"]:
    """The square of each matrix; for thousands of tiny ones, a sum of products takes a tenth of a product's time."""
    rank = power.shape[0]
    if rank > 8:
        return jnp.einsum("ik...,kj...->ij...", power, power)
    return sum((power[:, k, None] * power[None, k] for k in range(1, rank)), power[:, 0, None] * power[None, 0])


def positive(values: Array) -> Array:
    """The values to divide by, 1 in place of 0: what is divided is then 0 as well."""
    return jnp.where(values > 0, values, 1.0)


def or_zero(values: Array) -> Array:
    """Zero in place of NaN."""
    return jnp.where(jnp.isnan(values), 0.0, values)


@partial(jax.jit, static_argnames="axis", inline=True)  # traced once for each shape
def norm(x: Array | np.ndarray, axis: int | tuple[int, ...] | None = None) -> Array:
    """The Euclidean norm of all entries, or along an axis, even where their squares are beyond the type's range.

    Squares of single precision underflow below 1e-19, and a start may be smaller. The derivative at zero is zero.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0))
    scale = jnp.where((largest > 0) & (largest < jnp.inf), largest, 1.0)
    squares = jnp.sum((x / scale) ** 2, axis=axis)
    return jnp.where(squares == 0, 0.0, jnp.sqrt(jnp.where(squares == 0, 1.0, squares)) * jnp.squeeze(scale, axis))


def norm_on_host(x: np.ndarray, axis: int | tuple[int, ...] | None = None) -> Any:
    """The same by NumPy, for which nothing is compiled."""
    largest = np.max(np.abs(x), axis=axis, keepdims=True, initial=0.0)
    scale = np.where((largest > 0) & (largest < np.inf), largest, 1.0)
    return np.sqrt(np.sum((x / scale) ** 2, axis=axis)) * np.squeeze(scale, axis)


def root(values: Array) -> Array:
    """The square root, with a derivative of zero at zero; NaN stays NaN."""
    return jnp.where(values > 0, jnp.sqrt(positive(values)), 0.0 * values)


@sequential_vmap
def svd(x: Float[Array, "rows columns"]) -> tuple[Array, Array, Array]:
    """The thin decomposition (U, S, V^T), of one matrix after another under `vmap`; it has no derivatives."""
    return tuple(jnp.linalg.svd(x, full_matrices=False))


@jax.custom_jvp
def spectrum(x: Float[Array, "rows columns"]) -> Float[Array, " k"]:
    """The singular values, in decreasing order, with first derivatives where they are distinct."""
    return svd(x)[1]


@spectrum.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    u, s, vt = svd(x)
    return s, jnp.einsum("ik,ij,kj->k", u, dx, vt)


@sequential_vmap
def _difference_modes(x: Float[Array, "rows first"], y: Float[Array, "rows second"]) -> tuple[Array, Array]:
    r = jnp.linalg.qr(jnp.concatenate([x, y], axis=1))
    a, b = r[1][:, : x.shape[1]], r[1][:, x.shape[1] :]
    values, vectors = jnp.linalg.eigh(a @ a.T - b @ b.T)
    return values[::-1], (r[0] @ vectors)[:, ::-1]


@jax.custom_jvp
def difference_spectrum(x: Float[Array, "rows first"], y: Float[Array, "rows second"]) -> Float[Array, " k"]:
    """The eigenvalues of x x^T - y y^T in decreasing order, with first derivatives where they are distinct.

    Of k = min(rows, first + second) dimensions; in the others it is zero. By a QR factorisation of [x, y], so that many
    rows cost no more than the columns do.
    """
    return _difference_modes(x, y)[0]


@difference_spectrum.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x, y), (dx, dy) = primals, tangents
    values, v = _difference_modes(x, y)
    return values, 2 * (jnp.sum((v.T @ x) * (v.T @ dx), axis=1) - jnp.sum((v.T @ y) * (v.T @ dy), axis=1))

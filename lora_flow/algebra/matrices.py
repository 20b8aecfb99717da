"""Structured matrices: a diagonal one that is not written out, and thin factors without LAPACK."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float

from lora_flow.arrays import AnyArray, numbers, real_array
from lora_flow.checks import concrete, kind, require

WIDEST = 8  # singular vectors of one value that are taken together
NEGLIGIBLE = 64  # eps of what it was made from, up to which a product of matrices is rounding

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

    def dense(self) -> Float[Array, "rows columns"]:
        return self @ jnp.eye(self.shape[1], dtype=self.dtype)

    def factors(self) -> tuple[Float[Array, "rows rank"], Float[Array, "rank columns"]]:
        """Thin factors, `dense() == left @ right`."""
        rows, columns = self.shape
        unit = jnp.ones(self.rank, self.dtype)
        return Diagonal(self.values, (rows, self.rank)).dense(), Diagonal(unit, (self.rank, columns)).dense()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.dense(), dtype)


Matrix = Array | np.ndarray | Diagonal


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
    return matrix.dense() if isinstance(matrix, Diagonal) else matrix


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
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u[:, :count], s[:count], vt[:count]


def singular_values(matrix: Matrix) -> np.ndarray:
    """All the singular values that can be non-zero, the largest first."""
    if isinstance(matrix, Diagonal):
        return np.sort(np.abs(matrix.values))[::-1]
    return np.linalg.svd(np.asarray(matrix), compute_uv=False)


def frobenius_norm(matrix: Matrix) -> Array:
    return norm(jnp.asarray(matrix.values if isinstance(matrix, Diagonal) else matrix))


def column_norms(matrix: Matrix) -> np.ndarray:
    if isinstance(matrix, Diagonal):
        return np.pad(np.abs(matrix.values), (0, matrix.shape[1] - matrix.rank))
    return norm_on_host(np.asarray(matrix), axis=0)


def gram_schmidt(
    x: Float[Array, "rows columns"],
) -> tuple[Float[Array, "rows columns"], Float[Array, "columns columns"]]:
    """A thin QR factorisation x = Q R by Gram-Schmidt with every column orthogonalised twice (Giraud et al. 2005).

    A column that depends on earlier ones gets zeros in Q; its diagonal place of R has the size of what is left of it,
    which is rounding. There is no LAPACK in it: such calls inside a compiled program are slow for many small matrices,
    and on CPU can wait for each other for ever.
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
        independent = size > rounding * sizes[j]
        unit = jnp.where(independent, column / jnp.where(independent, size, 1.0), 0.0)
        return q.at[:, j].set(unit), r.at[:, j].set(overlap).at[j, j].set(size)

    count = x.shape[1]
    return jax.lax.fori_loop(0, count, orthogonalise, (jnp.zeros_like(x), jnp.zeros((count, count), x.dtype)))


def solve_gram(x: Float[Array, "rows columns"], y: Float[Array, "columns k"]) -> Float[Array, "columns k"]:
    """z with x^T x z = y and 0 in the places of columns of x that depend on earlier ones; without LAPACK."""
    _, r = gram_schmidt(x)
    size = jnp.diagonal(r)
    independent = size > x.shape[0] * jnp.finfo(x.dtype).eps * norm(x, axis=0)
    inverse = jnp.where(independent, 1 / jnp.where(independent, size, 1.0), 0.0)
    count = len(size)

    def down(j: Any, z: Array) -> Array:  # R^T z = y
        return z.at[j].set(inverse[j] * (y[j] - r[:, j] @ z))

    def up(i: Any, z: Array) -> Array:  # R z = the z of before
        j = count - 1 - i
        above = jnp.where(jnp.arange(count) > j, r[j], 0.0)
        return z.at[j].set(inverse[j] * (z[j] - above @ z))

    return jax.lax.fori_loop(0, count, up, jax.lax.fori_loop(0, count, down, jnp.zeros_like(y)))


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
    space = projections / positive(largest)[..., None, None]
    for _ in range(5):  # 3 x^2 - 2 x^3 takes everything to the nearer of 0 and 1
        square = space @ space
        space = 3 * square - 2 * square @ space
    return space


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


# LAPACK's factorisations of many matrices at once, inside a compiled program on CPU, can wait for each other for ever:
# under `vmap` these take one after another.


@sequential_vmap
def _svd(x: Float[Array, "rows columns"]) -> tuple[Array, Array, Array]:
    return tuple(jnp.linalg.svd(x, full_matrices=False))


@jax.custom_jvp
def spectrum(x: Float[Array, "rows columns"]) -> Float[Array, " k"]:
    """The singular values, in decreasing order, with first derivatives where they are distinct."""
    return _svd(x)[1]


@spectrum.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    u, s, vt = _svd(x)
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

"""The leading singular triplets of a large matrix, right in their last direction too, and the residual that says so.

A randomised decomposition with two power steps is not: on slowly decaying spectra the last of its directions have
sines of 0.5 to 1 with the true ones. On a CPU this is ARPACK's Lanczos method in double precision. Elsewhere it is a
block Krylov method that goes on until its residual is small.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float
from scipy.sparse.linalg import ArpackError, svds

from lora_flow.algebra.low_rank import LowRank

SMALL = 128  # the smaller dimension up to which all triplets are found
TOLERANCE = 1e-8  # of the relative residual; directions are then right to this over the relative gap
DEPTH = 8  # blocks of a first Krylov space


class Truncated(NamedTuple):
    """Singular triplets, the largest `||M^T u - s v||/s` among them, and the squared norm of the whole matrix."""

    triplets: LowRank
    residual: float
    energy: float

    def held(self, count: int) -> float:
        """The share of the matrix's squared norm that the first so many hold."""
        return float(np.sum(np.square(self.triplets.s[:count])) / self.energy) if self.energy > 0 else 0.0


def truncated_svd(
    matrix: Float[np.ndarray, "rows columns"], count: int, *, smallest: bool = False, seed: int = 0
) -> Truncated:
    """The `count` largest triplets, or smallest, in decreasing order, in double precision.

    The smallest ones, small matrices and counts above a quarter of the dimension take a whole decomposition.
    """
    matrix = np.asarray(matrix, np.float64)
    least, energy = min(matrix.shape), float(np.vdot(matrix, matrix))
    if smallest or least <= SMALL or 4 * count > least or energy == 0:
        found = whole(matrix, count, smallest)
    elif jax.default_backend() == "cpu":
        found = lanczos(matrix, count, seed)
    else:
        found = krylov(matrix, count, seed)
    return Truncated(found, residual(matrix, found), energy)


def residual(matrix: np.ndarray, found: LowRank) -> float:
    """The largest of ||M^T u - s v||/s and ||M v - s u||/s over the triplets that are not rounding."""
    s, most = np.asarray(found.s), np.max(found.s, initial=0.0)
    kept = s > 1e-9 * most
    if not np.any(kept):
        return 0.0
    s, u, v = s[kept], np.asarray(found.u)[:, kept], np.asarray(found.vt)[kept].T
    sides = (matrix.T @ u - s * v, matrix @ v - s * u)
    return float(max(np.max(np.linalg.norm(one, axis=0) / s) for one in sides))


def whole(matrix: np.ndarray, count: int, smallest: bool = False) -> LowRank:
    """By LAPACK."""
    u, s, vt = scipy.linalg.svd(matrix, full_matrices=False, check_finite=False)
    kept = slice(len(s) - count, None) if smallest else slice(count)
    rounding = s > 10 * max(matrix.shape) * np.finfo(s.dtype).eps * s[0]  # which the last ones alone do not tell
    return LowRank(u[:, kept].copy(), np.where(rounding, s, 0.0)[kept], vt[kept].copy())


def lanczos(matrix: np.ndarray, count: int, seed: int = 0) -> LowRank:
    """By ARPACK; by LAPACK where ARPACK does not get there."""
    start = np.random.default_rng(seed).standard_normal(min(matrix.shape))
    try:
        u, s, vt = svds(matrix, k=count, v0=start, tol=np.sqrt(TOLERANCE) / 10)
    except ArpackError:
        return whole(matrix, count)
    order = np.argsort(-s)
    found = LowRank(u[:, order], s[order], vt[order])
    return found if residual(matrix, found) <= 1e2 * TOLERANCE else whole(matrix, count)


def krylov(matrix: Any, count: int, seed: int = 0, depth: int = DEPTH) -> LowRank:
    """By a block Krylov space of M^T M, twice as deep until the residual is small, on JAX's device; or by LAPACK.

    In JAX's default precision: in single precision the residual ends at 1e-5 or so, which counts as small.
    """
    array = jnp.asarray(matrix, float)
    enough = max(TOLERANCE, 1e2 * float(jnp.finfo(array.dtype).eps))
    block = count + max(4, count // 2)
    while depth * block < min(array.shape) // 2:
        found = LowRank(*(np.asarray(one, np.float64) for one in _krylov(array, count, block, depth, seed)))
        if residual(np.asarray(matrix, np.float64), found) <= enough:
            return found
        depth *= 2
    return whole(np.asarray(matrix, np.float64), count)


def _krylov(matrix: Array, count: int, block: int, depth: int, seed: int) -> tuple[Array, Array, Array]:
    """Rayleigh-Ritz in span(Q, M^T M Q, ...), each block made orthogonal to those before, twice."""
    q = jnp.linalg.qr(jax.random.normal(jax.random.key(seed), (matrix.shape[1], block), matrix.dtype))[0]
    space = q
    for _ in range(depth - 1):
        q = matrix.T @ (matrix @ q)
        for _ in range(2):
            q = jnp.linalg.qr(q - space @ (space.T @ q))[0]
        space = jnp.concatenate([space, q], axis=1)
    u, s, small = jnp.linalg.svd(matrix @ space, full_matrices=False)
    return u[:, :count], s[:count], (small @ space.T)[:count]

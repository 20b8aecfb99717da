"""Directions that a matrix leaves open, chosen the same way everywhere, where a decomposition returns rounding.

The singular vector of a simple value is determined up to a sign, those of a multiple value up to a rotation, and for
the value 0 the matrix only says what the vectors are orthogonal to. LAPACK's choice differs between machines and
between programs, and a start with this choice would make runs differ. Here the coordinate axes choose. The first vector
is the projection of an axis on the open space: the first axis with at least half as much in this space as any other.
The next vectors come in the same way from the remaining space. For a simple value the result is its vector, with a
positive sign.

Derivatives are those of the vectors of simple values. Vectors of a multiple value move as far as their space does, and
those of the value 0 do not move.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lora_flow.algebra.diagonal import Diagonal, Matrix
from lora_flow.algebra.low_rank import LowRank
from lora_flow.algebra.spectra import norm, positive, singular_triplets, svd, tie
from lora_flow.initialization.checks import above_rounding

Columns = Float[Array, "size count"]
Triplets = tuple[Columns, Float[Array, " count"], Float[Array, "count columns"]]


def triplets(matrix: Matrix, count: int, smallest: bool = False) -> Triplets:
    """(U, S, V^T) of that many largest singular values, or smallest, in decreasing order; rounding is exactly zero.

    `count` is at most the smaller dimension. U is chosen as the module says; V follows from it, but for the value 0,
    where it is chosen likewise. Of a `LowRank` they are among those that it holds.
    """
    if isinstance(matrix, LowRank):
        return _choose_compiled(matrix.shape, jnp.asarray(matrix.u), jnp.asarray(matrix.s), matrix.vt, count, smallest)
    if isinstance(matrix, Diagonal) and not smallest:  # along the axes, and possibly too large to write out
        values = jnp.pad(matrix.values, (0, min(matrix.shape) - matrix.rank))
        u, s, vt = singular_triplets(Diagonal(values, matrix.shape), count)
        sign = jnp.sum(u, axis=0)
        return u * sign[None], s, vt * sign[:, None]
    return _triplets(matrix.dense() if isinstance(matrix, Diagonal) else jnp.asarray(matrix), count, smallest)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
@functools.partial(jax.jit, static_argnums=(1, 2))
def _triplets(matrix: Float[Array, "rows columns"], count: int, smallest: bool) -> Triplets:
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return _choose(matrix.shape, u, s, vt, count, smallest)


def _choose(shape: tuple[int, ...], u: Array, s: Array, vt: Array, count: int, smallest: bool) -> Triplets:
    """The vectors that the module says, of a decomposition in decreasing order."""
    s, v = above_rounding(s, shape), vt.T
    group = jnp.cumsum(jnp.concatenate([jnp.zeros(1, bool), s[:-1] - s[1:] > tie(s.dtype) * s[0]]))  # of equal values
    if smallest:
        u, s, v, group = (jnp.flip(array, axis=-1) for array in (u, s, v, group))
    chosen_u, chosen_v = jnp.zeros((len(u), count), s.dtype), jnp.zeros((len(v), count), s.dtype)

    def choose(j: Any, chosen: tuple[Array, Array]) -> tuple[Array, Array]:
        left, right = chosen
        same, nothing = group == group[j], s[j] == 0
        before = same[:count] & (jnp.arange(count) < j)
        within = jnp.where(nothing, s > 0, same)
        first = _axis_in(u * within[None], nothing, left * before[None])
        partner = (v * within[None]) @ (u.T @ first)
        second = jnp.where(nothing, _axis_in(v * within[None], nothing, right * before[None]), _unit(partner))
        return left.at[:, j].set(first), right.at[:, j].set(second)

    left, right = jax.lax.fori_loop(0, count, choose, (chosen_u, chosen_v))
    if smallest:
        return left[:, ::-1], s[:count][::-1], right[:, ::-1].T
    return left, s[:count], right.T


_choose_compiled = jax.jit(_choose, static_argnums=(0, 4, 5))


@_triplets.defjvp
def _(count: int, smallest: bool, primals: Any, tangents: Any) -> tuple[Triplets, Triplets]:
    """The first-order motion of each vector among those of other values; among equal ones, and where 0, it is held."""
    (matrix,), (change,) = primals, tangents
    u, s, vt = _triplets(matrix, count, smallest)
    every_u, every_s, every_vt = svd(matrix)
    across, back = every_u.T @ change @ vt.T, every_vt @ change.T @ u  # u_i^T dM v_j and v_i^T dM^T u_j
    apart = (s[None] - every_s[:, None]) * (s[None] + every_s[:, None])
    others = (jnp.abs(s[None] - every_s[:, None]) > tie(s.dtype) * every_s[0]) & (s[None] > 0)
    share = jnp.where(others, 1 / jnp.where(others, apart, 1.0), 0.0)
    reach = jnp.where(s > 0, 1 / positive(s), 0.0)
    outside_u = change @ vt.T - every_u @ across
    outside_v = change.T @ u - every_vt.T @ back
    moved_u = every_u @ (share * (s[None] * across + every_s[:, None] * back)) + outside_u * reach[None]
    moved_v = every_vt.T @ (share * (s[None] * back + every_s[:, None] * across)) + outside_v * reach[None]
    grown = jnp.where(s > 0, jnp.einsum("ij,ik,jk->k", change, u, vt.T), 0.0)
    return (u, s, vt), (moved_u, grown, moved_v.T)


@functools.partial(jax.jit, static_argnums=1)
def frame_of(matrix: Float[Array, "rows columns"], count: int) -> Columns:
    """Q of `W = Q R`, R with a diagonal that is not negative.

    A column that depends on earlier ones leaves its own of Q open, which is then chosen as the module says,
    orthogonal to those before.
    """
    size = max(matrix.shape)

    def choose(j: Any, q: Columns) -> Columns:
        column = matrix[:, j]
        rest = column
        for _ in range(2):
            rest = rest - q @ (q.T @ rest)
        open_ = norm(rest) <= 10 * size * jnp.finfo(rest.dtype).eps * norm(column)
        return q.at[:, j].set(jnp.where(open_, _axis_in(q, jnp.asarray(True), jnp.zeros_like(q)), _unit(rest)))

    return jax.lax.fori_loop(0, count, choose, jnp.zeros((len(matrix), count), matrix.dtype))


def _axis_in(
    basis: Float[Array, "size spanned"], outside: Bool[Array, ""], taken: Float[Array, "size before"]
) -> Float[Array, " size"]:
    """The unit vector along the chosen axis's projection on the basis's span, or on what is outside; `taken` is not."""

    def project(x: Float[Array, " size"]) -> Float[Array, " size"]:
        inside = basis @ (basis.T @ x)
        kept = jnp.where(outside, x - inside, inside)
        return kept - taken @ (taken.T @ kept)

    share = jnp.sum(basis**2, axis=1)
    share = jnp.where(outside, 1 - share, share) - jnp.sum(taken**2, axis=1)
    axis = jnp.zeros_like(share).at[jnp.argmax(share >= 0.5 * jnp.max(share))].set(1.0)
    return _unit(project(_unit(project(axis))))


def _unit(x: Float[Array, " size"]) -> Float[Array, " size"]:
    return x / positive(norm(x))

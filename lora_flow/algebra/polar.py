"""Polar factors, and the balanced factors of a product, without LAPACK."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_flow.algebra.spectra import norm, positive
from lora_flow.algebra.thin import gram_schmidt

LEAST = 1e-8  # of a matrix's norm: the least smoothing, beyond which fewer singular values than all would come to 1
STEEPEST = 2.5  # of the scaling, beyond which a step would take the largest singular values to small ones
SMOOTHED, WHOLE = 30, 54  # steps by which singular values from LEAST and from rounding on, relative to the norm, are 1


def orthogonalised(g: Float[Array, "rows columns"], smoothing: Array) -> Float[Array, "rows columns"]:
    """g (g^T g + smoothing^2 I)^{-1/2}: with g's singular vectors, and s/sqrt(s^2 + smoothing^2) for singular values s.

    This is the polar factor of g where its singular values are far above the smoothing, and g/smoothing where they are
    far below. Zero stays zero. The smoothing is at least 1e-8 of g's norm.
    """
    if g.shape[0] < g.shape[1]:
        return orthogonalised(g.T, smoothing).T
    size = jax.lax.stop_gradient(norm(g))
    smoothing = jnp.maximum(smoothing, LEAST * size)
    count = g.shape[1]
    q, r = gram_schmidt(jnp.concatenate([g, smoothing * jnp.eye(count, dtype=g.dtype)]))
    whole = jax.lax.stop_gradient(norm(r))
    return q[: len(g)] @ _to_one(r / whole, jax.lax.stop_gradient(smoothing) / whole, SMOOTHED)


def polar_factor(x: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """The polar factor of a square matrix, with all the digits that its least singular value leaves.

    Directions of singular values that are rounding are left out: there the factor is between 0 and an isometry.
    """
    size = jax.lax.stop_gradient(positive(norm(x)))
    return _to_one(x / size, jnp.asarray(jnp.finfo(x.dtype).eps, x.dtype), WHOLE)


def _to_one(x: Float[Array, "k k"], least: Array, steps: int) -> Float[Array, "k k"]:
    """x with all singular values from `least` to 1 brought to 1, by that many Newton-Schulz steps.

    Each step is scaled by what is known of the least one (Chen and Chow, "A stable scaling of Newton-Schulz", 2014), up
    to a limit, for the largest ones must not become small on the way: their directions would lose digits.
    """

    def step(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, least = carry
        scale = jnp.minimum(3 / (1 + least + least**2), STEEPEST)
        root = jnp.sqrt(scale)
        low, high = (root * value * (3 - scale * value**2) / 2 for value in (least, 1.0))
        return root / 2 * (3 * x - scale * x @ (x.T @ x)), jnp.minimum(jnp.minimum(low, high), 1.0)

    return jax.lax.fori_loop(0, steps, step, (x, least))[0]


def balanced_factors(a: Float[Array, "r n"], b: Float[Array, "m r"]) -> tuple[Float[Array, "r n"], Float[Array, "m r"]]:
    """The factors A and B with the product b a and A A^T = B^T B that are nearest to a and b.

    With thin factorisations b = Q_B R_B and a^T = Q_A R_A the core C = R_B R_A^T has the product's singular values, and
    its polar factor P makes S = C P^T = X X^T. Then B = Q_B X O and A = O^T X^T P Q_A^T are balanced for every
    orthogonal O. The nearest one is the polar factor of X^T (R_B + P R_A).
    """
    (q_b, r_b), (q_a, r_a) = gram_schmidt(b), gram_schmidt(a.T)
    core = r_b @ r_a.T
    polar = polar_factor(core)
    square = core @ polar.T
    x = _semidefinite_root((square + square.T) / 2)
    nearest = polar_factor(x.T @ (r_b + polar @ r_a))
    return (nearest.T @ (x.T @ polar)) @ q_a.T, q_b @ (x @ nearest)


def _semidefinite_root(s: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """x with x x^T = s, of a positive semi-definite s: Cholesky's factorisation with pivots, in the pivots' order."""
    rounding = len(s) * jnp.finfo(s.dtype).eps * jax.lax.stop_gradient(jnp.max(jnp.diagonal(s), initial=0.0))

    def column(j: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, rest = carry
        pivot = jnp.argmax(jnp.diagonal(rest))
        size = rest[pivot, pivot]
        alive = size > rounding
        taken = jnp.where(alive, rest[:, pivot] / jnp.sqrt(jnp.where(alive, size, 1.0)), 0.0)
        return x.at[:, j].set(taken), rest - jnp.outer(taken, taken)

    return jax.lax.fori_loop(0, len(s), column, (jnp.zeros_like(s), s))[0]

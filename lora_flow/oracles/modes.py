"""Scalar modes in closed form, written so that nothing cancels and every derivative exists."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.jit
def imbalanced_mode(y: Array, u0: Array, v0: Array, t: Array) -> tuple[Array, Array]:
    r"""u(t) and v(t) from u' = (y - u v) v, v' = (y - u v) u; the arguments broadcast.

    (u + v)(u - v) = d is conserved, and z = (u + v)^2 obeys z' = 2 y z - z^2/2 + d^2/2, with rest points 2 y +- s. So

        z(t)/z(0) = [((u0 - v0)^2 + 2 y + s) g + 2 e] / [((u0 + v0)^2 - 2 y + s) g + 2 e]

    with e = exp(-s t) and g = (1 - e)/s: only positive terms, and z(0) = 0 is nothing special.
    """
    y, u0, v0, t = jnp.broadcast_arrays(y, u0, v0, t)
    plus, minus = u0 + v0, u0 - v0
    d = plus * minus
    size = jnp.where(y >= 0, y, -y)  # |y|, whose slope at 0 must be that of the branch below
    square = 4 * y**2 + d**2
    s = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)  # the ratio is even in s
    large = s + 2 * size
    small = jnp.where(large > 0, d**2 / jnp.where(large > 0, large, 1.0), s - 2 * size)
    moved, left = t * mean_exponential(-s * t), 2 * jnp.exp(-s * t)
    floor = jnp.finfo(s.dtype).tiny / jnp.finfo(s.dtype).eps  # on the way into the saddle u = v = 0 both terms vanish
    growth = jnp.sqrt(jnp.maximum((minus**2 + jnp.where(y >= 0, large, small)) * moved + left, floor))
    decay = jnp.sqrt(jnp.maximum((plus**2 + jnp.where(y >= 0, small, large)) * moved + left, floor))
    plus, minus = plus * (growth / decay), minus * (decay / growth)
    return (plus + minus) / 2, (plus - minus) / 2


@jax.jit
def symmetric_mode(s: Array, p0: Array, t: Array) -> Array:
    """p(t) from p' = 2 p (s - p); the arguments broadcast."""
    s, p0, t = jnp.broadcast_arrays(s, p0, t)
    size = jnp.where(s >= 0, s, -s)
    gone = jnp.exp(-2 * size * t)
    moved = 2 * t * p0 * mean_exponential(-2 * size * t)
    whole = moved + jnp.where(s >= 0, gone, 1.0)
    return p0 * jnp.where(s >= 0, 1.0, gone) / jnp.where(whole > 0, whole, 1.0)  # both vanish late from p0 = 0


def mean_exponential(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """(e^x - 1)/x, by its series near 0, where the quotient's derivatives would cancel."""
    near = jnp.abs(x) < 0.25
    inside, outside = jnp.where(near, x, 0.0), jnp.where(near, 1.0, x)
    series = jnp.ones_like(x)
    for order in range(14, 1, -1):
        series = 1 + inside * series / order
    return jnp.where(near, series, jnp.expm1(outside) / outside)

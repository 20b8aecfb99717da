"""The matrix Riccati equation P' = F P + P F - P^2, symmetric F, in sub-steps that keep its digits at long times."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.checks import concrete, require, require_integer
from lora_flow.oracles.given import require_times

REACH = 4.0  # of one sub-step, in units of 1/||F||_2: growing modes swamp the others' digits beyond it
SLACK = 1e-5  # for the rounding of rates and times, in single precision too


def count_substeps(rate: float | None, t: Array, steps: int | None) -> int:
    """`steps`, if they are enough as far as that can be known; by default the next power of two that is.

    A power of two, so that few programs are compiled. The rate is the norm of F, None where it is traced.

    **Raises:** `InputError` for times that are negative or not finite, for too few steps, and for no steps where values
    are traced.
    """
    require_times(t)
    times = concrete(t)
    if steps is not None:
        require_integer("steps", steps, "be at least 1", 1)
    if rate is None or times is None:
        require(steps is not None, "steps", "be given where values are traced (by jit, vmap or grad)", steps)
        return int(steps)  # type: ignore[arg-type]
    latest = float(np.max(times, initial=0.0))
    needed = max(1, int(np.ceil((1 - SLACK) * rate * latest / REACH)))
    require(steps is None or steps >= needed, "steps", f"be at least {needed} to reach t = {latest:g}", steps)
    return 1 << (needed - 1).bit_length() if steps is None else int(steps)


def riccati_gram(f: Float[Array, "k k"], q: Float[Array, "k h"], t: Array, steps: int) -> Float[Array, "*times k k"]:
    """P(t) = Q Q^T from Q' = F Q - 1/2 Q Q^T Q, at times of any shape; NaN where more sub-steps are needed.

    By the semigroup property: each sub-step is the closed form, which gives Q up to a rotation from the right. In the
    eigenbasis of F the modes do not mix, and small ones keep their digits beside large ones. For derivatives the basis
    is constant, and F has some off its diagonal there: eigenvectors of repeated eigenvalues have no derivatives.
    """
    constant = jax.lax.stop_gradient(f)
    values, basis = jnp.linalg.eigh(constant)

    def advance(time: Array) -> Array:
        turned = jnp.diag(values) + basis.T @ (f - constant) @ basis
        grown, gain = propagators(turned, time / steps)

        def step(q: Array, _: Any) -> tuple[Array, None]:
            lower = jnp.linalg.cholesky(jnp.eye(q.shape[1]) + q.T @ gain @ q)
            return jax.scipy.linalg.solve_triangular(lower, (grown @ q).T, lower=True).T, None

        reached = basis @ jax.lax.scan(step, basis.T @ q, length=steps)[0]
        return jnp.where(reaches(jnp.max(jnp.abs(values)), time, steps), reached @ reached.T, jnp.nan)

    with jax.default_matmul_precision("highest"):  # accelerators round products in single precision to less
        return jax.vmap(advance)(t.ravel()).reshape(*t.shape, *f.shape)


def reaches(rate: Array, time: Array, steps: int) -> Array:
    """Whether the sub-steps are enough, for a rate that is the norm of F."""
    return (1 - SLACK) * rate * time <= REACH * steps


def propagators(f: Array, dt: Array) -> tuple[Array, Array]:
    """e^{F dt} and the integral of e^{2 F s} over 0 ... dt, by the power series of a 16th and four doublings.

    Up to ||F|| dt = REACH, and to rounding in each mode of a diagonal F; singular or not, no eigenvalue is divided by.
    """
    x, one = f * (dt / 16), jnp.eye(len(f))
    mean = one  # of e^{F s} over the 16th: (e^x - 1)/x
    for order in range(14, 1, -1):
        mean = one + x @ mean / order
    grown = one + x @ mean
    for _ in range(4):
        mean, grown = 0.5 * (mean + grown @ mean), grown @ grown
    return grown, 0.5 * dt * (mean + grown @ mean)

"""LoRA from a large start, in closed form."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from lora_flow.arrays import real_array
from lora_flow.checks import require, require_number
from lora_flow.oracles.given import concrete_all, matrix, require_zero
from lora_flow.oracles.substeps import count_substeps, propagators, reaches


def large_start(
    shift: ArrayLike, rows: ArrayLike, a: ArrayLike, t: ArrayLike, *, steps: int | None = None
) -> Float[Array, "*times"]:
    r"""The loss L(t) = 1/2 ||Y (I - P(t))||_F^2 of LoRA on one layer, from B = 0 and a large A = a O.

    Y is the `shift`, and P(t) the projection on the rows of `O exp(Y^T Y t/a^2)`: Oja's flow. Where a^2 is far above
    Y's largest singular value sigma_1, B comes to the least squares fit `Y A^T (A A^T)^{-1}` within t ~ 1/a^2, and then
    only the row space of A moves, with A A^T conserved. L is a function of t/a^2 alone, for times far above 1/a^2, and
    LoRA's scaling s cancels: it multiplies a^2 and t alike. For a random B and A = 0 take Y^T and B's columns, as rows.
    Derived for this project. The limit is off by about (sigma_1/a^2)^2 of log10 L: .04, .003 and less than .0005 at
    a = 2, 4 and 8, with sigma_1 = 1. (Rows of unequal length turn at unequal rates, along another curve.)

    Shapes: `shift` (m, n), `rows` O (r, n), orthonormal. `steps` is at least sigma_1^2 t/(4 a^2), and given where
    values are traced: L is NaN where they are too few. P is accurate to 1e-14, and so L down to 1e-27 of its start.

    **Returns:** L, of shape `times`, that of `t`.

    **Raises:** `InputError` for shapes that do not match, for rows that are not orthonormal, for an a that is not
    positive, for times that are negative or not finite, and for a bad number of sub-steps.
    """
    y, o, size, t = matrix("shift", shift), matrix("rows", rows), real_array("a", a), real_array("t", t)
    require_number("a", size, "be positive", lambda known: known > 0)
    require(o.shape[1] == y.shape[1], "rows", f"have {y.shape[1]} columns", f"shape {o.shape}")
    rate = None
    if known := concrete_all(y, o, size):
        goal, frame, scale = known
        require_zero(frame @ frame.T - np.eye(len(frame)), 1.0, "rows", "be orthonormal")
        rate = float(np.linalg.norm(goal, 2) / scale) ** 2
    return _large_start(y, o, size, t, count_substeps(rate, t, steps))


@partial(jax.jit, static_argnames="steps")
def _large_start(shift: Array, rows: Array, a: Array, t: Array, steps: int) -> Array:
    """In the eigenbasis of Y^T Y, for derivatives a constant, as in `riccati_gram`: singular values may repeat."""
    constant = jax.lax.stop_gradient(shift)
    _, sigma, basis = jnp.linalg.svd(constant, full_matrices=True)
    rates = jnp.pad(sigma**2, (0, len(basis) - len(sigma)))

    def loss(time: Array) -> Array:
        change = shift - constant
        moved = jnp.diag(rates) + basis @ (change.T @ shift + constant.T @ change) @ basis.T
        grown, _ = propagators(moved, time / (a**2 * steps))

        def step(columns: Array, _: Any) -> tuple[Array, None]:
            return jnp.linalg.qr(grown @ columns)[0], None

        columns, _ = jax.lax.scan(step, basis @ rows.T, length=steps)
        goal = shift @ basis.T
        left = jnp.sum((goal - (goal @ columns) @ columns.T) ** 2) / 2
        return jnp.where(reaches(rates[0] / a**2, time, steps), left, jnp.nan)

    with jax.default_matmul_precision("highest"):
        return jax.vmap(loss)(t.ravel()).reshape(t.shape)

"""Subspaces by orthonormal columns: a basis that somebody gives, and a matrix without its part there."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.algebra.diagonal import as_matrix, dense
from lora_flow.arrays import AnyArray, real_array
from lora_flow.checks import concrete, require


def as_basis(name: str, value: AnyArray) -> Float[Array, "n k"]:
    """Orthonormal columns that span what the given columns span; a matrix `(n, 0)` spans nothing.

    **Raises:** `InputError` under that name unless it is a finite matrix with linearly independent columns.
    """
    given = real_array(name, value, "be a matrix of real numbers")
    if given.ndim == 2 and given.shape[0] > 0 and given.shape[1] == 0:
        return given
    columns = dense(as_matrix(name, given))
    known, count = concrete(columns), columns.shape[1]
    if known is not None:
        rounding = 10 * max(known.shape) * np.finfo(known.dtype).eps * np.linalg.norm(known, 2)
        rank = int(np.linalg.matrix_rank(known, tol=rounding))
        require(rank == count, name, "have linearly independent columns", f"{count} columns of rank {rank}")
    return jnp.linalg.qr(columns)[0]


def without(x: Float[Array, "*lanes rows n"], basis: Float[Array, "n k"]) -> Float[Array, "*lanes rows n"]:
    """x (I - V V^T): the rows without their part in the span of the basis V."""
    return x - (x @ basis) @ basis.T

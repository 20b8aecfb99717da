"""Draws of symmetric factorisations."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array

from lora_flow.arrays import real_array, require_key
from lora_flow.checks import kind, require, require_integer
from lora_flow.problems.symmetric import SymmetricFactorization

EIGENVALUES = (2.0, 1.0)


def symmetric_problem(key: Array, *, m: int = 10, eigenvalues: Sequence[float] = EIGENVALUES) -> SymmetricFactorization:
    r"""A symmetric matrix to factorise, `M = V diag(eigenvalues, 0, ...) V^T` of size m, along a random basis V.

    **Arguments:**

    - `m`: the size, rows and columns of M.
    - `eigenvalues`: at most m, of either sign; the others are 0. They may repeat.

    **Raises:** `InputError` where an argument is out of its range.
    """
    require_key(key)
    require_integer("m", m, "be at least 1", 1)
    values = np.asarray(real_array("eigenvalues", eigenvalues, "be real numbers"))
    finite = values.ndim == 1 and np.all(np.isfinite(values)) and np.any(values)
    require(finite, "eigenvalues", "be finite numbers that are not all 0", kind(eigenvalues))
    require(len(values) <= m, "eigenvalues", f"be at most {m}, the size m", len(values))
    basis, _ = np.linalg.qr(np.asarray(jax.random.normal(key, (m, m))))
    basis = basis[:, : len(values)]
    return SymmetricFactorization(basis * values @ basis.T)

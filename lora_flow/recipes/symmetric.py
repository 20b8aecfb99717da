"""Draws of symmetric factorisations."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array

from lora_flow.algebra.spectra import eigenvalue_rounding
from lora_flow.arrays import real_array, require_key
from lora_flow.checks import kind, require, require_integer
from lora_flow.problems.symmetric import SymmetricFactorization
from lora_flow.recipes.kinds import Symmetric


def symmetric_problem(
    key: Array, *, m: int = 10, eigenvalues: Sequence[float] = Symmetric.eigenvalues
) -> SymmetricFactorization:
    r"""A symmetric matrix to factorise, `M = V diag(eigenvalues, 0, ...) V^T` of size m, along a random basis V.

    **Arguments:**

    - `m`: the size, rows and columns of M.
    - `eigenvalues`: at most m, of either sign, one of them positive; the others are 0. They may repeat.

    **Raises:** `InputError` where an argument is out of its range.
    """
    require_key(key)
    require_integer("m", m, "be at least 1", 1)
    values = np.asarray(real_array("eigenvalues", eigenvalues, "be real numbers"))
    finite = values.ndim == 1 and np.all(np.isfinite(values))
    require(finite, "eigenvalues", "be finite numbers", kind(eigenvalues))
    require(len(values) <= m, "eigenvalues", f"be at most m = {m} in number", len(values))
    values = np.pad(values, (0, m - len(values)))
    positive = np.any(values > eigenvalue_rounding(values))
    require(positive, "eigenvalues", "have a positive one that is not rounding beside the others", kind(eigenvalues))
    basis, _ = np.linalg.qr(np.asarray(jax.random.normal(key, (m, m))))
    return SymmetricFactorization(basis * values @ basis.T)

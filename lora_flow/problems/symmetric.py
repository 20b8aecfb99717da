"""The symmetric factorisation of a matrix: a problem of one factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters
from lora_flow.algebra.diagonal import as_matrix, check_task, dense
from lora_flow.algebra.spectra import eigenvalue_rounding, frobenius_norm, norm, spectral_norm
from lora_flow.algebra.thin import gram_schmidt
from lora_flow.arrays import AnyArray
from lora_flow.checks import InputError, concrete, require
from lora_flow.oracles.given import require_zero
from lora_flow.problems.base import AbstractProblem, Layers
from lora_flow.problems.factorization import spectrum_text

ROUNDING = 10  # n eps of its length, up to which what the others leave of a row is zero


class SymmetricFactorization(AbstractProblem):
    r"""`1/4 ||M - X X^T||_F^2` of one factor X `(n, r)`, in excess of its least value over all X and r.

    The flow is `X' = (M - X X^T) X`, that of Mohammadi, Tinati, Tu, Soltanolkotabi and Jovanović (arXiv 2411.15972). M
    is symmetric and may have eigenvalues of either sign. X learns the positive ones. The negative ones make
    `least_loss`, `1/4 sum min(lambda_i, 0)^2`, which `loss` leaves out, so that its digits last down to rounding.

    **One factor among adapters.** `X = (B + A^T)/sqrt(2)` of one layer `(n, n)`, and the loss depends on X alone. This
    is a rotation of (A, B): the flow of the adapters is that of X, and `B - A^T` rests. So adapters that are tied,
    B = A^T, stay tied also where M is indefinite; under `SingleLayer(M)`, whose loss is twice that and whose flow from
    `A = B^T = X^T` is that of X, a most negative eigenvalue -l parts them like e^{l t}. `adapters(x)` makes tied
    adapters, `factor(adapters)` gives X, and the initialisation "tied" draws them. r may exceed n.

    The observable `noise` is ||S||_2, with S the Schur complement in X X^T of its block on the eigenvectors of M's
    positive eigenvalues (`lora_flow.oracles.cascade`). It has no derivatives.

    **Arguments:** `matrix`, M of shape `(n, n)`. Eigenvalues that are rounding beside the largest |lambda| are zero.
    With respect to M, `loss` and `least_loss` have first derivatives only.

    **Raises:** `InputError` unless M is a finite, symmetric matrix with a positive eigenvalue.
    """

    positive: Float[Array, "n n"]  # M without its negative eigenvalues
    negative: Float[Array, "n n"]  # N, with N N^T what is missing in M there
    learned: Float[Array, "n n"]  # the eigenvectors of positive eigenvalues, and columns of zeros

    any_width = True

    def __init__(self, matrix: AnyArray):
        m = dense(as_matrix("matrix", matrix))
        require(m.shape[0] == m.shape[1], "matrix", "be square", f"shape {m.shape}")
        check_task("matrix", m)
        if (known := concrete(m)) is not None:
            require_zero(known - known.T, np.abs(known).max(), "matrix", "be symmetric")
        m = (m + m.T) / 2
        values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(m))  # to first order the loss needs no derivatives
        rounding = eigenvalue_rounding(values)
        if (largest := concrete(values[-1])) is not None:
            require(largest > rounding, "matrix", "have a positive eigenvalue", f"a largest one of {largest:.2g}")
        self.learned = vectors * (values > rounding)[None]
        self.negative = vectors * jnp.sqrt(jnp.where(values < -rounding, -values, 0.0))[None]
        self.positive = m + self.negative @ self.negative.T

    @property
    def layers(self) -> Layers:
        return (self.positive.shape,)  # type: ignore[return-value]

    @property
    def matrix(self) -> Float[Array, "n n"]:
        """M."""
        return self.positive - self.negative @ self.negative.T

    @property
    def least_loss(self) -> Float[Array, ""]:
        """The least value of `1/4 ||M - X X^T||_F^2`."""  # whose derivative is that at the best X X^T, held fixed
        return jnp.sum((self.matrix - jax.lax.stop_gradient(self.positive)) ** 2) / 4

    @staticmethod
    def factor(adapters: Adapters) -> Float[Array | np.ndarray, "*lanes n r"]:
        """X of adapters, with any leading axes."""
        ((a, b),) = adapters
        return (b + a.mT) / np.sqrt(2.0)

    @staticmethod
    def adapters(x: Float[Array | np.ndarray, "*lanes n r"]) -> Adapters:
        """Tied adapters with the factor X, with any leading axes."""
        half = x / np.sqrt(2.0)
        return (Adapter(half.mT, half),)

    def loss(self, adapters: Adapters) -> Float[Array, ""]:
        x = self.factor(adapters)
        return jnp.sum((self.positive - x @ x.T) ** 2) / 4 + jnp.sum((self.negative.T @ x) ** 2) / 2

    def field(self, adapters: Adapters) -> Adapters:
        x = self.factor(adapters)
        return self.adapters((self.positive - x @ x.T) @ x - self.negative @ (self.negative.T @ x))

    def linearised_task(self) -> tuple[Float[Array, "n n"]]:
        """M without its negative eigenvalues, along whose eigenvectors small factors grow."""
        return (self.positive,)

    def task_sizes(self) -> tuple[Float[Array, ""]]:
        return (frobenius_norm(self.positive) + frobenius_norm(self.negative) ** 2,)

    def growth_bound(self) -> Callable[[Adapters], Float[Array, ""]]:
        """A bound on the largest eigenvalue of M - X X^T."""

        def bound(adapters: Adapters) -> Float[Array, ""]:
            x = self.factor(adapters)
            return frobenius_norm(self.positive - x @ x.T)

        return bound

    def lowest_loss(self, rank: int, frozen: np.ndarray | None = None) -> float:
        """The least loss at a rank: a quarter of the sum of squares of the positive eigenvalues beyond the first r."""
        return 0.25 * float(np.sum(self._positive_eigenvalues()[rank:] ** 2))

    def offset(self, start: Adapters) -> AbstractProblem:
        """Refused: no weight is frozen beside X that a start could be subtracted from."""
        raise InputError("init must not offset weights, of which a SymmetricFactorization has none")

    def observe(self, adapters: Adapters) -> dict[str, Array]:
        x = jax.lax.stop_gradient(self.factor(adapters))
        signal = self.learned.T @ x
        used, triangle = gram_schmidt(signal.T)  # the rows that the signal spans, as columns
        known = jnp.diagonal(triangle) > ROUNDING * len(x) * jnp.finfo(x.dtype).eps * norm(signal, axis=1)
        used, rest = used * known[None], x - self.learned @ signal
        return {"noise": spectral_norm(rest - (rest @ used) @ used.T) ** 2}

    def meanings(self) -> dict[str, str]:
        return {"noise": "spectral norm of S, the part of X X^T that the signal does not carry"}

    def summary(self) -> dict[str, Any]:
        return {"eigenvalues": np.linalg.eigvalsh(np.asarray(self.matrix))[::-1].tolist()}

    def _positive_eigenvalues(self) -> np.ndarray:
        """In decreasing order."""
        values = np.linalg.eigvalsh(np.asarray(self.matrix))[::-1]
        return values[values > eigenvalue_rounding(values)]

    def __str__(self) -> str:
        kept, n = self._positive_eigenvalues(), len(self.positive)
        lost = f"; least loss {float(self.least_loss):.4g}" if np.any(np.asarray(self.negative)) else ""
        return f"{type(self).__name__}: {n} x {n}; {spectrum_text(kept, 'positive part')}{lost}"

"""Flows that leave the outputs of old inputs alone, as continual learning asks for.

V is an orthonormal basis of the protected inputs, `(in, k)`, N = I - V V^T, and G = -dL/dW the negative gradient of the
one layer's weight. The layer's outputs at protected inputs stay where dW V = 0. The formulas are in
`lora_flow.theory.continual`.
"""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters
from lora_flow.algebra.spectra import norm, positive
from lora_flow.algebra.subspaces import as_basis, without
from lora_flow.algebra.thin import gram_schmidt
from lora_flow.arrays import AnyArray
from lora_flow.checks import concrete, require, require_flag
from lora_flow.dynamics.flows import Flow, check_rank, not_negative, over_gram
from lora_flow.problems.base import Problem, as_problem, kind_of, require_problem

ROUNDING = 100  # in units of eps and of the larger dimension of A: below this share of ||A|| a direction is rounding


class Protected(Flow):
    r"""A's rows learn nothing of protected inputs; with `exact`, neither does W.

        project-A:  A' = D_A N,                             B' = D_B
        exact:      A' = (B^T B + d I)^{-1} D_A N,          B' = (I - P_B) D_B Pi (Pi A A^T Pi + d Pi)^+

    with D_A = -dL/dA, D_B = -dL/dB, Pi = I - (A V)(A V)^+, P_B = B (B^T B + d I)^{-1} B^T and the damping d.

    Both conserve A V. The exact rule conserves B A V too, with any damping, and by gradient descent with any step,
    since dA V = 0 and dB A V = 0. Undamped, W moves by the part of G that is closest to G N among all motions of the
    adapters that are exactly safe, P_B G N + (I - P_B) G P with P the projection on the rows of Pi A. Outside B's
    columns the rank of this motion is at most max(r - rank(A V), 0). So with r or more protected directions and a
    generic A, B's column space never turns. From a start with A V = 0 (`keep_away`) the project-A rule is exactly safe,
    and restricts B in nothing.

    Derived for this project. It is a guess at the "gradient rectification" of Janus-LoRA (arXiv 2605.28495), whose
    formula is not public. An optimiser that changes the gradient entry by entry, as Adam does, comes after the flow and
    leads out of the safe directions; momentum does not.

    **Arguments:** `basis`, columns that span the protected inputs, `(in, k)`, made orthonormal here; `exact`;
    `damping` d, of the exact rule only. Ranks are decided against the size of A: what A V or Pi A has less than
    100 max(in, r) eps ||A|| of is zero.

    **Raises:** `InputError` for columns that depend on each other, a negative damping, or a damping without `exact`;
    at the start for adapters of several layers or of another number of inputs, and undamped for B of lower rank.
    """

    name: ClassVar[str] = "protected"

    basis: Float[Array, "in k"]
    damping: Float[Array, ""]
    exact: bool = eqx.field(static=True)

    def __init__(self, basis: AnyArray, exact: bool = False, damping: float | Array = 0.0):
        require_flag("exact", exact)
        self.basis, self.exact = as_basis("basis", basis), bool(exact)
        self.damping = not_negative("damping", damping)
        known = concrete(self.damping)
        require(exact or known is None or known == 0, "damping", "be left out without exact=True", known)

    def velocity(self, descent: Adapter, adapter: Adapter) -> Adapter:
        if not self.exact:
            return Adapter(without(descent.a, self.basis), descent.b)
        (a, b), n_in = adapter, len(self.basis)
        free = self._free(a)
        of_b = descent.b @ free  # in B's columns and outside
        solved = over_gram(b, jnp.concatenate([descent.a, b.T @ of_b], axis=1), self.damping)
        outside = of_b - b @ solved[:, n_in:]
        rest = norm(a) * (jnp.eye(len(free), dtype=a.dtype) - free)  # makes the Gram matrix of Pi A invertible
        steps = over_gram(jnp.concatenate([a.T @ free, rest]), outside.T, self.damping)
        return Adapter(without(solved[:, :n_in], self.basis), steps.T @ free)

    def _free(self, a: Float[Array, "r in"]) -> Float[Array, "r r"]:
        """The projection on the column space of Pi A, the combinations of A's rows that miss V and are not zero."""
        unit = a / positive(norm(a))
        least = ROUNDING * max(a.shape) * jnp.finfo(a.dtype).eps
        _, triangle = gram_schmidt(unit.T, least)  # its rows combine A's rows to orthogonal ones
        blocked_first = jnp.concatenate([unit @ self.basis, triangle.T], axis=1)
        free = gram_schmidt(blocked_first, least)[0][:, self.basis.shape[1] :]
        return free @ free.T

    @property
    def always_defined(self) -> bool:
        return False

    def check_start(self, adapters: Adapters) -> None:
        check_inputs(self.basis, adapters)
        if self.exact:
            check_rank(adapters, self.damping, "B")

    def __str__(self) -> str:
        damping = concrete(self.damping)
        rule = f", exact, damping {'traced' if damping is None else f'{damping:g}'}" if self.exact else ""
        return f"{self.name} from {_told(self.basis)}{rule}"


class SafeGradient(Flow):
    r"""The factors' gradients of the safe gradient G N of W in place of G: A' = B^T G N, B' = G N A^T.

    Each factor's gradient is then safe, and the motion of W is not: B' A V = G N A^T A V stays wherever A's rows have a
    part in V. In `Chain(SafeGradient(problem, V), LoRAPro())` W moves by the closest B A' + B' A to G N, which is not
    safe either. `Protected` needs the factors' gradients alone. These rules need G, so they take the `problem`, which
    must be the one that is solved.

    **Raises:** `InputError` unless the problem has one layer and a loss of its product B A, and the basis as many rows
    as the layer has inputs and independent columns.
    """

    name: ClassVar[str] = "safe-gradient"

    problem: Any
    basis: Float[Array, "in k"]

    def __init__(self, problem: Problem, basis: AnyArray):
        require_problem(problem)
        asked = as_problem(problem)
        must = "adapt one layer, with a loss of the product B A, for SafeGradient"
        require(len(asked.layers) == 1 and asked.of_products, "problem", must, kind_of(problem))
        self.problem, self.basis = problem, as_basis("basis", basis)
        _check_rows(self.basis, asked.layers[0][1])

    def velocity(self, descent: Adapter, adapter: Adapter) -> Adapter:
        a, b = adapter
        safe = without(as_problem(self.problem).product_descent((adapter,)), self.basis)
        return Adapter(b.T @ safe, safe @ a.T)

    def __str__(self) -> str:
        return f"{self.name} from {_told(self.basis)}"


def check_inputs(basis: Float[Array, "in k"], adapters: Adapters) -> None:
    """Raises unless the adapters are of one layer, with an input for each row of the basis."""
    require(len(adapters) == 1, "adapters", "be of one layer, whose inputs the basis is of", f"{len(adapters)} layers")
    _check_rows(basis, adapters[0].a.shape[-1])


def _check_rows(basis: Float[Array, "in k"], n_in: int) -> None:
    require(len(basis) == n_in, "basis", f"have {n_in} rows, one for each input of the layer", f"shape {basis.shape}")


def _told(basis: Float[Array, "in k"]) -> str:
    """The size of a basis, and what tells one from another in the settings of a run."""
    known, (n_in, k) = concrete(basis), basis.shape
    if known is None:
        return f"{k} of {n_in} directions"
    digest = hashlib.sha256(np.ascontiguousarray(known).tobytes()).hexdigest()[:8]
    return f"{k} of {n_in} directions ({digest})"

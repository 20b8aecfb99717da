"""Initialisations of networks that are trained from scratch: both factors non-zero, A = W1^T and B = W2^T of one layer.

On LoRA the function is then not the pretrained one at t = 0; there these starts serve for comparison.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters
from lora_flow.algebra.diagonal import Matrix
from lora_flow.algebra.spectra import root
from lora_flow.checks import require_number
from lora_flow.initialization.checks import check, layer_inputs
from lora_flow.initialization.directions import triplets
from lora_flow.problems.base import Layers, Problem, linearised_task

DEFAULT_P = 0.5


def gaussian_both_init(
    key: Array, problem: Problem, *, rank: int, alpha: float | Array, ratio: float | Array = 1.0
) -> Adapters:
    r"""Both factors random, with entries N(0, alpha^2 ratio) in A and N(0, alpha^2/ratio) in B.

    sigma_U and sigma_V of Min et al. 2021 (arXiv 2105.06351, section 5) are alpha sqrt(ratio) and alpha/sqrt(ratio),
    and A is their U^T. With alpha = 1 and ratio = rho^2 this is W1 = rho U_0, W2 = V_0/rho of Xu et al. 2023 (AISTATS).
    `ratio` unbalances the weights and keeps their product. In a sweep: "gaussian-both:25".

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for a bad rank (that of a `LinearNetwork` may be any), alpha or ratio.
    """
    check(key, problem, rank, alpha, any_width=True)
    require_number("ratio", ratio, "be positive and finite", lambda known: known > 0)
    return _both(key, problem.layers, rank, alpha * jnp.sqrt(ratio), alpha / jnp.sqrt(ratio))


def gaussian_wide_init(
    key: Array, problem: Problem, *, rank: int, alpha: float | Array, p: float | Array = DEFAULT_P
) -> Adapters:
    r"""Both factors random, with entries N(0, alpha^2 h^{-2p}), h the rank.

    The start of Min et al. 2021 (arXiv 2105.06351, Theorem 2, where p is called alpha) and Xu et al. 2025 (arXiv
    2505.11664, Theorem 3.3), both with alpha = 1 and 1/4 < p <= 1/2. p = 1/2 has N(0, 1/h). In a sweep:
    "gaussian-wide:0.375".

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for a bad rank (that of a `LinearNetwork` may be any) or alpha, or p below 0.
    """
    check(key, problem, rank, alpha, any_width=True)
    require_number("p", p, "be at least 0", lambda known: known >= 0)
    scale = alpha * rank ** -jnp.asarray(p, float)
    return _both(key, problem.layers, rank, scale, scale)


def balanced_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    r"""The product of `gaussian_both_init`, `B A = U S V^T`, in balanced factors, A A^T = B^T B.

    `A = R S^{1/2} V^T` and `B = U S^{1/2} R^T` with R a random frame, `(h, k)`, k = min(h, out, in): the balanced start
    of Xu et al. 2023 (AISTATS, section 4.1), whose zero imbalance guarantees no rate.

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for a bad rank (that of a `LinearNetwork` may be any) or alpha.
    """
    check(key, problem, rank, alpha, any_width=True)

    def split(layer_key: Array, adapter: Adapter) -> Adapter:
        k = min(rank, adapter.b.shape[0], adapter.a.shape[1])
        u, s, vt = jnp.linalg.svd(adapter.b @ adapter.a, full_matrices=False)
        frame = _frame(layer_key, rank, k)
        size = root(s[:k])
        return Adapter(frame @ (size[:, None] * vt[:k]), (u[:, :k] * size[None]) @ frame.T)

    drawn = _both(key, problem.layers, rank, alpha, alpha)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(drawn))
    return tuple(map(split, keys, drawn))


def tied_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    r"""Factors of one draw, B = A^T on a square layer, with entries N(0, alpha^2).

    The start of a symmetric factorisation: of a `SymmetricFactorization`, whose X is then sqrt(2) B, and of a
    `SingleLayer` with a symmetric shift. On a layer that is not square A^T and B are the first rows of one draw.

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for a bad rank (that of a `LinearNetwork` or `SymmetricFactorization` may be any) or alpha.
    """
    check(key, problem, rank, alpha, any_width=True)

    def draw(layer_key: Array, n_out: int, n_in: int) -> Adapter:
        rows = alpha * jax.random.normal(layer_key, (rank, max(n_out, n_in)))
        return Adapter(rows[:, :n_in], rows[:, :n_out].T)

    keys = jax.random.split(key, len(problem.layers))
    return tuple(draw(k, *shape) for k, shape in zip(keys, problem.layers, strict=True))


def spectral_both_init(
    key: Array, problem: Problem, *, rank: int, alpha: float | Array, ratio: float | Array = 1.0
) -> Adapters:
    r"""Both factors along the singular vectors of the task; in a network with X = I the modes do not meet.

    With `-dL/dW = U S V^T`, `A = alpha sqrt(ratio) R V^T` and `B = alpha/sqrt(ratio) U R^T`, R a random frame,
    `(h, k)`, k = min(h, out, in). Where X = I, each mode is `lora_flow.oracles.scalar` from u0 = alpha/sqrt(ratio) and
    v0 = alpha sqrt(ratio). In a sweep: "spectral-both:25".

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for a bad rank (that of a `LinearNetwork` may be any), alpha or ratio.
    """
    check(key, problem, rank, alpha, any_width=True)
    require_number("ratio", ratio, "be positive and finite", lambda known: known > 0)

    def along(layer_key: Array, task: Matrix) -> Adapter:
        k = min(rank, *task.shape)
        u, _, vt = triplets(task, k)
        frame = _frame(layer_key, rank, k)
        return Adapter(alpha * jnp.sqrt(ratio) * frame @ vt, alpha / jnp.sqrt(ratio) * u @ frame.T)

    keys = jax.random.split(key, len(problem.layers))
    return tuple(map(along, keys, linearised_task(problem)))


def invariant_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    r"""Random factors from which gradient flow goes to the solution of least norm, exactly.

    The entries are N(0, alpha^2), as in `gaussian_both_init`. The loss does not depend on the part of A outside the row
    space of the inputs X; this part is made orthogonal to the rest: `V U_2^T = 0` and `U_1 U_2^T = 0` (Min et al. 2021,
    arXiv 2105.06351, Proposition 1). Wide random starts come near to this start.

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for a problem that does not know its inputs, or has white ones, for a bad rank (that of a
    `LinearNetwork` may be any) or alpha.
    """
    check(key, problem, rank, alpha, any_width=True)

    def bend(inputs: Array, adapter: Adapter) -> Adapter:
        _, s, vt = jnp.linalg.svd(inputs, full_matrices=False)
        rows = vt * (s > 10 * max(inputs.shape) * jnp.finfo(s.dtype).eps * s[0])[:, None]
        inside = (adapter.a @ rows.T) @ rows
        spanned = jnp.concatenate([adapter.b, rows @ adapter.a.T])  # V and U_1, a row each of their directions
        outside = adapter.a - inside
        _, size, basis = jnp.linalg.svd(spanned, full_matrices=False)
        basis = basis * (size > 10 * max(spanned.shape) * jnp.finfo(size.dtype).eps * size[0])[:, None]
        for _ in range(2):
            outside = outside - basis.T @ (basis @ outside)
        return Adapter(inside + outside, adapter.b)

    inputs = layer_inputs(problem, "invariant")
    return tuple(map(bend, inputs, _both(key, problem.layers, rank, alpha, alpha)))


def _both(key: Array, layers: Layers, rank: int, size_a: float | Array, size_b: float | Array) -> Adapters:
    """Standard normal factors times their sizes; a draw of smaller rank is the first part of a larger one."""

    def draw(layer_key: Array, n_out: int, n_in: int) -> Adapter:
        of_a, of_b = jax.random.split(layer_key)
        a, b = jax.random.normal(of_a, (rank, n_in)), jax.random.normal(of_b, (rank, n_out)).T
        return Adapter(size_a * a, size_b * b)

    keys = jax.random.split(key, len(layers))
    return tuple(draw(k, *shape) for k, shape in zip(keys, layers, strict=True))


def _frame(key: Array, rows: int, columns: int) -> Array:
    return jnp.linalg.qr(jax.random.normal(key, (rows, columns)))[0]

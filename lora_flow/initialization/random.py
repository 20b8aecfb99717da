"""Random initialisations, which use nothing of the task."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters, as_adapters
from lora_flow.algebra.subspaces import as_basis, without
from lora_flow.arrays import AnyArray
from lora_flow.checks import require, require_choice
from lora_flow.initialization.checks import check
from lora_flow.problems.base import Problem

SIDES = ("A", "B")


def gaussian_init(
    key: Array,
    problem: Problem,
    *,
    rank: int,
    alpha: float | Array,
    side: str = "A",
    away_from: AnyArray | None = None,
) -> Adapters:
    r"""One random factor with entries iid N(0, alpha^2), the other zero (arXiv 2503.06982, section 2).

    `side="A"` draws A and leaves B = 0, LoRA's convention and the paper's text. `side="B"` draws B and leaves A = 0,
    which reproduces the paper's figures. The draws are nested: a draw of rank r is the first r rows (columns for "B")
    of a draw of any larger rank, and alpha only scales it. So a sweep compares ranks and scales on common random
    numbers. `away_from`, columns `(in, k)` that span inputs to protect, keeps A away from them, see `keep_away`.

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` unless 1 <= rank <= the smallest layer dimension (of a `LinearNetwork`, 1 <= rank),
    alpha > 0 and side is "A" or "B"; and for `away_from` as `keep_away` does.
    """
    require_choice("side", side, SIDES)
    check(key, problem, rank, alpha, any_width=True)

    def draw(layer_key: Array, n_out: int, n_in: int) -> Adapter:
        if side == "A":
            return Adapter(alpha * jax.random.normal(layer_key, (rank, n_in)), jnp.zeros((n_out, rank)))
        return Adapter(jnp.zeros((rank, n_in)), alpha * jax.random.normal(layer_key, (rank, n_out)).T)

    keys = jax.random.split(key, len(problem.layers))
    drawn = tuple(draw(k, *shape) for k, shape in zip(keys, problem.layers, strict=True))
    return drawn if away_from is None else _away("away_from", drawn, away_from)


def orthogonal_init(
    key: Array, problem: Problem, *, rank: int, alpha: float | Array, away_from: AnyArray | None = None
) -> Adapters:
    r"""Both factors random, in orthogonal halves of the rank, so that B A = 0 (PEFT's "orthogonal").

    `A = alpha/10 (N Q_odd)^T` and `B = alpha/10 M Q_even`, where Q is a random orthogonal r x r matrix, Q_odd its 1st,
    3rd, ... rows, Q_even the other rows, and N `(in, r/2)` and M `(out, r/2)` are standard normal. PEFT has alpha = 1.
    `away_from` is as for `gaussian_init`.

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for an odd rank, or a bad rank, alpha or `away_from`.
    """
    check(key, problem, rank, alpha, any_width=True)
    require(rank % 2 == 0, "rank", "be even for orthogonal", rank)

    def draw(layer_key: Array, n_out: int, n_in: int) -> Adapter:
        keys = jax.random.split(layer_key, 3)
        q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (rank, rank)))
        n, m = jax.random.normal(keys[1], (n_in, rank // 2)), jax.random.normal(keys[2], (n_out, rank // 2))
        return Adapter(alpha / 10 * (n @ q[0::2]).T, alpha / 10 * (m @ q[1::2]))

    keys = jax.random.split(key, len(problem.layers))
    drawn = tuple(draw(k, *shape) for k, shape in zip(keys, problem.layers, strict=True))
    return drawn if away_from is None else _away("away_from", drawn, away_from)


def keep_away(adapters: Adapters, basis: AnyArray) -> Adapters:
    r"""The start with A (I - V V^T) in place of A: adapters of one layer that do nothing at protected inputs.

    V `(in, k)` is an orthonormal basis of the span of the columns of `basis`. Then A V = 0, and under `Protected(V)` it
    stays so: the layer's outputs at inputs in the span of V never change, whatever B learns. This is InfLoRA's choice
    (arXiv 2404.00228, as cited; not read here). The rows of A share in - k dimensions.

    **Arguments:** `adapters`, of one layer, with any leading axes; `basis`, `(in, k)`.

    **Returns:** the adapters, of the same shapes.

    **Raises:** `InputError` for adapters of several layers, and for a basis with another number of rows or with columns
    that depend on each other.
    """
    return _away("basis", as_adapters("adapters", adapters), basis)


def _away(name: str, adapters: Adapters, basis: AnyArray) -> Adapters:
    columns = as_basis(name, basis)
    require(len(adapters) == 1, name, "be left out for several layers", f"a basis for {len(adapters)} layers")
    ((a, b),) = adapters
    n_in = a.shape[-1]
    require(len(columns) == n_in, name, f"have {n_in} rows, one for each input of the layer", f"shape {columns.shape}")
    return (Adapter(without(jnp.asarray(a), columns), b),)

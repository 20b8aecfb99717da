"""Random initialisations, which use nothing of the task."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters
from lora_flow.checks import require, require_choice
from lora_flow.initialization.checks import check
from lora_flow.problems.base import Problem

SIDES = ("A", "B")


def gaussian_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array, side: str = "A") -> Adapters:
    r"""One random factor with entries iid N(0, alpha^2), the other zero (arXiv 2503.06982, section 2).

    `side="A"` draws A and leaves B = 0, LoRA's convention and the paper's text. `side="B"` draws B and leaves A = 0,
    which reproduces the paper's figures. The draws are nested: a draw of rank r is the first r rows (columns for "B")
    of a draw of any larger rank, and alpha only scales it. So a sweep compares ranks and scales on common random
    numbers.

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` unless 1 <= rank <= the smallest layer dimension (of a `LinearNetwork`, 1 <= rank),
    alpha > 0 and side is "A" or "B".
    """
    require_choice("side", side, SIDES)
    check(key, problem, rank, alpha, any_width=True)

    def draw(layer_key: Array, n_out: int, n_in: int) -> Adapter:
        if side == "A":
            return Adapter(alpha * jax.random.normal(layer_key, (rank, n_in)), jnp.zeros((n_out, rank)))
        return Adapter(jnp.zeros((rank, n_in)), alpha * jax.random.normal(layer_key, (rank, n_out)).T)

    keys = jax.random.split(key, len(problem.layers))
    return tuple(draw(k, *shape) for k, shape in zip(keys, problem.layers, strict=True))


def orthogonal_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    r"""Both factors random, in orthogonal halves of the rank, so that B A = 0 (PEFT's "orthogonal").

    `A = alpha/10 (N Q_odd)^T` and `B = alpha/10 M Q_even`, where Q is a random orthogonal r x r matrix, Q_odd its 1st,
    3rd, ... rows, Q_even the other rows, and N `(in, r/2)` and M `(out, r/2)` are standard normal. PEFT has alpha = 1.

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for an odd rank, or a bad rank or alpha.
    """
    check(key, problem, rank, alpha, any_width=True)
    require(rank % 2 == 0, "rank", "be even for orthogonal", rank)

    def draw(layer_key: Array, n_out: int, n_in: int) -> Adapter:
        keys = jax.random.split(layer_key, 3)
        q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (rank, rank)))
        n, m = jax.random.normal(keys[1], (n_in, rank // 2)), jax.random.normal(keys[2], (n_out, rank // 2))
        return Adapter(alpha / 10 * (n @ q[0::2]).T, alpha / 10 * (m @ q[1::2]))

    keys = jax.random.split(key, len(problem.layers))
    return tuple(draw(k, *shape) for k, shape in zip(keys, problem.layers, strict=True))

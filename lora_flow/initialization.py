"""Adapters at t = 0: one function a scheme, and the table of their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters
from lora_flow.checks import concrete, require, require_choice
from lora_flow.matrices import Matrix, positive, singular_triplets
from lora_flow.problem import Layers, Problem, linearised_task, task_rank

SIDES = ("A", "B")


def gaussian_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array, side: str = "A") -> Adapters:
    r"""One random factor with entries iid N(0, alpha^2), the other zero (arXiv 2503.06982, section 2).

    `side="A"` draws A and leaves B = 0, LoRA's convention and the paper's text; `side="B"` draws B and leaves
    A = 0, which is what reproduces the paper's figures. The draws are nested: those of rank r are the first r
    rows (columns for "B") of those of any larger rank, and alpha only scales them, so that a sweep compares
    ranks and scales on common random numbers.

    **Raises:** `InputError` unless 1 <= rank <= the smallest layer dimension, alpha > 0 and side is "A" or "B".
    """
    require_choice("side", side, SIDES)
    check_rank(rank, problem.layers)
    check_alpha(alpha)

    def draw(layer_key: Array, n_out: int, n_in: int) -> Adapter:
        if side == "A":
            return Adapter(alpha * jax.random.normal(layer_key, (rank, n_in)), jnp.zeros((n_out, rank)))
        return Adapter(jnp.zeros((rank, n_in)), alpha * jax.random.normal(layer_key, (rank, n_out)).T)

    keys = jax.random.split(key, len(problem.layers))
    return tuple(draw(k, *shape) for k, shape in zip(keys, problem.layers, strict=True))


def spectral_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    r"""A_i along the right singular vectors of what layer i must learn, B_i = 0 (arXiv 2503.06982, section 4).

    Row j of A_i is `alpha z_ij` times the j-th right singular vector of layer i's linearised task, with z_ij iid
    standard normal: S_A and G12, G22 of the paper, with the arbitrary orthogonal G11 = G21 = I. On an
    aligned problem this is the paper's scheme; where the task is not aligned, its closest counterpart.

    **Raises:** `InputError` unless the rank is at least that of the shift, or for a bad rank or alpha.
    """
    check_rank(rank, problem.layers)
    check_alpha(alpha)
    if _is_concrete(problem):
        needed = task_rank(problem)
        require(rank >= needed, "rank", f"be at least {needed}, the rank of the shift, for spectral_init", rank)

    def draw(layer_key: Array, task: Matrix) -> Adapter:
        scale = alpha * jax.random.normal(layer_key, (rank, 1))
        return Adapter(scale * singular_triplets(task, rank)[2], jnp.zeros((task.shape[0], rank)))

    keys = jax.random.split(key, len(problem.layers))
    return tuple(map(draw, keys, linearised_task(problem)))


def lora_one_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    r"""Balanced factors of one step of full gradient descent (LoRA-One, arXiv 2502.01235v3, Algorithm 1).

    With `-dL/dW_i = U S V^T` at the start, `B_i = alpha U_r (S_r/S_1)^{1/2}` and `A_i = alpha (S_r/S_1)^{1/2} V_r^T`,
    so that `B_i A_i` is alpha^2 (the paper's gamma) times the best approximation of rank r, relative to its largest
    singular value. The frozen weights are not shifted: the function changes at t = 0. Nothing is drawn; `key` is there
    because every scheme takes one. Directions beyond the gradient's rank are zero in both factors and stay so.

    **Raises:** `InputError` for a bad rank or alpha.
    """
    check_rank(rank, problem.layers)
    check_alpha(alpha)

    def split(task: Matrix) -> Adapter:
        u, s, vt = singular_triplets(task, rank)
        rounding = 10 * max(task.shape) * jnp.finfo(s.dtype).eps
        size = alpha * jnp.sqrt(jnp.where(s > rounding * s[0], s, 0.0) / positive(s[0]))
        return Adapter(size[:, None] * vt, u * size[None])

    return tuple(map(split, linearised_task(problem)))


class Scheme(NamedTuple):
    """A named initialisation; `sided` where it takes `side`."""

    init: Callable[..., Adapters]
    sided: bool


INITIALIZATIONS = {
    "gaussian": Scheme(gaussian_init, sided=True),
    "spectral": Scheme(spectral_init, sided=False),
    "lora-one": Scheme(lora_one_init, sided=False),
}


def initialize(name: str, key: Array, problem: Problem, *, rank: int, alpha: float | Array, side: str) -> Adapters:
    """The scheme called `name`; `side` goes to the schemes that take one."""
    require_choice("init", name, INITIALIZATIONS)
    scheme = INITIALIZATIONS[name]
    return scheme.init(key, problem, rank=rank, alpha=alpha, **({"side": side} if scheme.sided else {}))


def check_rank(rank: Any, layers: Layers) -> None:
    largest = min(min(shape) for shape in layers)
    require(isinstance(rank, (int, np.integer)), "rank", "be an integer", rank)
    require(1 <= rank <= largest, "rank", f"lie between 1 and {largest}, the smallest layer dimension", rank)


def check_alpha(alpha: Any) -> None:
    value = concrete(alpha)
    require(value is None or (np.isfinite(value) and value > 0), "alpha", "be positive and finite", alpha)


def _is_concrete(problem: Problem) -> bool:
    leaves = jax.tree.leaves(eqx.filter(problem, eqx.is_array))
    return all(concrete(leaf) is not None for leaf in leaves)

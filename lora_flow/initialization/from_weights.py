"""Initialisations from the pretrained weights, which are then frozen at `W_0 - s B_0 A_0` (`Offset`)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters
from lora_flow.algebra.diagonal import Matrix
from lora_flow.algebra.spectra import norm, root
from lora_flow.checks import require
from lora_flow.initialization.checks import check, pretrained_weights
from lora_flow.initialization.directions import frame_of, triplets
from lora_flow.problems.base import Problem, as_problem


def pissa_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    r"""The weight's principal part (PiSSA, arXiv 2404.02948): with `W = U S V^T`, the largest r singular values in

        B = alpha U_r (S_r/s)^{1/2},   A = alpha (S_r/s)^{1/2} V_r^T.

    The source has alpha = 1. Meant for `Offset(problem, adapters)`, as all of this module. Nothing is drawn. Directions
    beyond the weight's rank are zero in both factors and stay zero.

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for a problem that does not know its weights, or a bad rank or alpha.
    """
    return _triplets(key, problem, rank, alpha, "pissa", smallest=False)


def milora_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    """As `pissa_init`, with the r smallest of the min(out, in) singular values (MiLoRA, arXiv 2406.09044).

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for a problem that does not know its weights, or a bad rank or alpha.
    """
    return _triplets(key, problem, rank, alpha, "milora", smallest=True)


def olora_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    r"""Orthonormal B (OLoRA, arXiv 2406.01775): with `W = Q R`, `B = alpha Q[:, :r]` and `A = alpha R[:r]`.

    The start depends on the order of the weight's columns. A column that depends on earlier ones leaves its column of Q
    open, which is then the part of an axis across the earlier ones (`lora_flow.initialization.directions`). The source
    has alpha = 1. Nothing is drawn.

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for a problem that does not know its weights, or a bad rank or alpha.
    """
    check(key, problem, rank, alpha)

    def split(weight: Array) -> Adapter:
        q = frame_of(weight, rank)
        return Adapter(alpha * jnp.triu(q.T @ weight), alpha * q)

    return tuple(map(split, pretrained_weights(problem, "olora")))


def loram_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    r"""Sines of a size that the weight sets (LoRAM, arXiv 2507.06558): with
    `Phi_m[i, j] = sqrt(2/(m + 1)) sin((i + 1)(j + 1) pi/(m + 1))` and its first r columns,

        B = alpha beta Phi_out,   A = alpha beta Phi_in^T,   beta^4 = Q nu[W]/nu[Phi_out Phi_in^T],

    nu the mean square of the entries and `Q = log r/log min(out, in)`. The source has alpha = 1. Nothing is drawn.

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for rank 1, where Q is 0, for a problem that does not know its weights, or a bad alpha.
    """
    check(key, problem, rank, alpha)
    require(rank >= 2, "rank", "be at least 2 for loram, whose size is log(rank)", rank)

    def split(weight: Array) -> Adapter:
        left, right = (_sines(size, rank) for size in weight.shape)
        share = np.log(rank) / np.log(min(weight.shape))
        beta = (share / np.mean((left @ right.T) ** 2)) ** 0.25 * root(norm(weight) / np.sqrt(weight.size))
        return Adapter(alpha * beta * right.T, alpha * beta * left)

    return tuple(map(split, pretrained_weights(problem, "loram")))


def _triplets(key: Array, problem: Problem, rank: int, alpha: float | Array, scheme: str, smallest: bool) -> Adapters:
    check(key, problem, rank, alpha)
    scaling = as_problem(problem).scaling

    def split(weight: Matrix) -> Adapter:
        u, s, vt = triplets(weight, rank, smallest)
        size = alpha * root(s / scaling)
        return Adapter(size[:, None] * vt, u * size[None])

    return tuple(map(split, pretrained_weights(problem, scheme)))


def _sines(size: int, count: int) -> np.ndarray:
    """The first columns of the discrete sine transform, which is orthogonal and symmetric."""
    places, waves = np.arange(1, size + 1), np.arange(1, count + 1)
    return np.sqrt(2 / (size + 1)) * np.sin(np.outer(places, waves) * np.pi / (size + 1))

"""Departures from an aligned problem: a shift turned away, and noise in the weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.algebra.diagonal import dense
from lora_flow.arrays import require_key
from lora_flow.checks import (
    concrete,
    require,
    require_number,
)
from lora_flow.problems.base import matrix_rank
from lora_flow.problems.factorization import Factorization, check_factorization
from lora_flow.recipes.aligned import require_angle


def misaligned(problem: Factorization, key: Array, *, angle: float | Array) -> Factorization:
    r"""The problem with each singular vector of the shift turned away by `angle` degrees.

    With `shift = U S V^T` of rank k, U becomes `cos(angle) U + sin(angle) U'`, where U' is a random orthonormal frame
    orthogonal to U, and V likewise: all principal angles between the old and the new singular subspaces are `angle`.
    The singular values stay. For any angle above 0, Assumption 2.2 of arXiv 2503.06982 fails.

    **Returns:** a `Factorization` of the same shapes; at angle 0 the problem itself.

    **Raises:** `InputError` unless 0 <= angle <= 90 and twice the shift's rank is at most min(m, n).
    """
    check_factorization(problem)
    require_key(key)
    require_angle(angle)
    if is_zero(angle):
        return problem
    require(concrete(problem.shift) is not None, "problem", "have a shift that is known, to be turned", "a traced one")
    u, sigma, vt = np.linalg.svd(np.asarray(problem.shift), full_matrices=False)
    k = matrix_rank(sigma, problem.shift.shape)
    room, told = min(problem.shift.shape) // 2, "it" if concrete(angle) is None else f"{angle:g}"
    require(k <= room, "angle", f"be 0 for a shift of rank above {room}, which fills its space", f"{told}, rank {k}")
    left, right = (turned(x, one, angle) for x, one in zip((u[:, :k], vt[:k].T), jax.random.split(key), strict=True))
    return Factorization(problem.w1, problem.w2, left * sigma[None, :k] @ right.T)


def turned(basis: np.ndarray, key: Array, angle: float | Array) -> Any:
    """An orthonormal frame at this angle, in degrees, to the given one: all principal angles are equal."""
    if is_zero(angle):
        return basis
    xp = np if concrete(angle) is not None else jnp
    drawn = np.asarray(jax.random.normal(key, basis.shape))
    across, _ = np.linalg.qr(drawn - basis @ (basis.T @ drawn))
    return xp.cos(xp.deg2rad(angle)) * basis + xp.sin(xp.deg2rad(angle)) * across


def is_zero(parameter: float | Array) -> bool:
    """Whether a parameter is known to be 0, which one that JAX traces is not."""
    known = concrete(parameter)
    return known is not None and bool(known == 0)


def noisy(problem: Factorization, key: Array, *, noise: float | Array) -> Factorization:
    r"""The problem with Gaussian noise in the pretrained weights, and with the same target.

    Each W_i becomes `W_i + N_i` with entries of N_i iid normal and `||N_i||_F = noise ||W_i||_F`. Fine-tuning aims at
    the same Yft, so the shift absorbs the change of W2 W1 and has full rank. For any noise above 0, Assumptions 2.1 and
    2.2 of arXiv 2503.06982 fail.

    **Returns:** a `Factorization` of the same shapes; at noise 0 the problem itself.

    **Raises:** `InputError` unless noise is finite and at least 0.
    """
    check_factorization(problem)
    require_key(key)
    require_number("noise", noise, "be at least 0", lambda known: known >= 0)
    if is_zero(noise):
        return problem
    keys = jax.random.split(key)

    def disturb(weight: Array, key: Array) -> Array:
        drawn = jax.random.normal(key, weight.shape)
        return weight + noise * jnp.linalg.norm(weight) / jnp.linalg.norm(drawn) * drawn

    before, shift = [dense(weight) for weight in (problem.w1, problem.w2)], dense(problem.shift)
    w1, w2 = map(disturb, before, keys)
    return Factorization(w1, w2, shift + (before[1] @ before[0] - w2 @ w1))

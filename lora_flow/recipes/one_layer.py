"""Draws of one adapted layer: a weight, a shift of low rank, and data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.arrays import require_key
from lora_flow.checks import concrete, require, require_choice, require_integer, require_number
from lora_flow.problems.one_layer import ACTIVATIONS, Regression, SingleLayer
from lora_flow.recipes.aligned import require_angle
from lora_flow.recipes.turned import is_zero, turned


def regression_problem(
    key: Array,
    *,
    m: int = 10,
    n: int = 10,
    target_rank: int = 2,
    kappa: float | Array = 1.0,
    angle: float | Array = 0.0,
    samples: int = 0,
    input_kappa: float = 1.0,
    activation: str = "linear",
) -> SingleLayer | Regression:
    r"""One layer with n inputs and m outputs that must learn a shift of low rank (the setting of arXiv 2502.01235).

    The weight has entries N(0, 1/n). The shift has `target_rank` singular values, equally spaced in their logarithm
    from 1 to 1/kappa, along the weight's top singular pairs, each turned away by `angle` degrees. Inputs are drawn from
    N(0, C), where C has the weight's right singular vectors and eigenvalues from 1 to 1/input_kappa, spaced likewise.

    **Arguments:**

    - `m`, `n`: outputs and inputs.
    - `samples`: N; 0 stands for infinitely many, `X^T X/N = C`. An activation needs samples.
    - `activation`: "linear" or "relu".

    **Returns:** with `C = I` and no samples a `SingleLayer`, otherwise a `Regression`; both with a weight and a shift
    of shape `(m, n)`, the latter with inputs `(samples, n)`, or `(n, n)` for `samples=0`.

    **Raises:** `InputError` where an argument is out of its range.
    """
    require_key(key)
    for name, size in (("m", m), ("n", n), ("target_rank", target_rank)):
        require_integer(name, size, "be at least 1", 1)
    require_angle(angle)
    room = min(m, n) // (1 if is_zero(angle) else 2)
    half = "" if is_zero(angle) else ", half the smallest dimension, for a shift that is turned"
    require(target_rank <= room, "target_rank", f"be at most {room}{half}", target_rank)
    for name, ratio in (("kappa", kappa), ("input_kappa", input_kappa)):
        require_number(name, ratio, "be at least 1", lambda known: known >= 1)
    require_integer("samples", samples, "be at least 0, for infinitely many", 0)
    require_choice("activation", activation, ACTIVATIONS)
    require(samples > 0 or activation == "linear", "samples", f"be at least 1 with activation {activation}", samples)

    keys = jax.random.split(key, 4)
    weight = np.asarray(jax.random.normal(keys[0], (m, n))) / np.sqrt(n)
    u, _, vt = np.linalg.svd(weight)
    left, right = turned(u[:, :target_rank], keys[1], angle), turned(vt[:target_rank].T, keys[2], angle)
    shift = left * _spaced(kappa, target_rank)[None] @ right.T
    root = np.sqrt(np.geomspace(1.0, 1 / input_kappa, n))[:, None] * vt  # C = root^T root
    if samples == 0 and input_kappa == 1:
        return SingleLayer(shift, weight=weight)
    drawn = np.sqrt(n) * np.eye(n) if samples == 0 else np.asarray(jax.random.normal(keys[3], (samples, n)))
    return Regression(drawn @ root, shift, weight, activation)


def _spaced(kappa: float | Array, count: int) -> np.ndarray | Array:
    """That many values from 1 to 1/kappa, equally spaced in their logarithm."""
    known = concrete(kappa)
    if known is not None:
        return np.geomspace(1.0, 1 / known, count)
    return jnp.asarray(kappa) ** -np.linspace(0.0, 1.0, count)

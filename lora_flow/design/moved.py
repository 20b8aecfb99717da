"""The parameters that a fit may find, and the problem at other values of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from lora_flow.algebra.spectra import singular_values
from lora_flow.problems.base import on_host
from lora_flow.problems.factorization import Factorization

ALPHA, RATE, SHIFT_SCALE, DELTA_W = "alpha", "rate", "shift_scale", "delta_w"

Values = Mapping[str, Any]  # by name


def own_values(problem: Any) -> dict[str, float]:
    """The parameters of a problem that may be moved, all positive: its shift's size, and the ratio of its weights.

    `shift_scale` is the shift's largest singular value, and `delta_w` that of a `Factorization`.
    """
    if isinstance(problem, Factorization):
        sigma, s1, s2 = problem.gains()
        ratio = {DELTA_W: float(s1[0] / s2[0])} if s1[0] > 0 and s2[0] > 0 else {}
        return {SHIFT_SCALE: float(sigma[0])} | ratio
    shift = getattr(problem, "shift", None)
    return {SHIFT_SCALE: float(singular_values(on_host(problem).shift)[0])} if getattr(shift, "ndim", 0) == 2 else {}


def moved(problem: Any, begun: Mapping[str, Array], values: Mapping[str, Array]) -> Any:
    """A problem of the `begun` values at other ones: its shift scaled, and its weights by inverse factors."""
    if SHIFT_SCALE in begun:
        problem = eqx.tree_at(lambda it: it.shift, problem, problem.shift / (begun[SHIFT_SCALE] / values[SHIFT_SCALE]))
    if DELTA_W in begun:
        root = jnp.sqrt(begun[DELTA_W] / values[DELTA_W])
        problem = eqx.tree_at(lambda it: (it.w1, it.w2), problem, (problem.w1 / root, problem.w2 / (1 / root)))
    return problem

r"""LoRA's scaling factor: "The Hidden Power of Scaling Factor in LoRA Optimization", arXiv 2606.12883.

LoRA computes `W + s B A` with `s = lora_alpha/r`. `std` is the standard deviation of A's entries at the start, where
B = 0. Formulas without a source were derived for this project. The coefficient of the paper's law is known from
reading notes of others only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_flow.arrays import numbers
from lora_flow.checks import require, require_choice

Value = Any  # a number or an array
POWER = {"gd": 1.0, "sign": 0.5, "adam": 0.5}  # of s, in the effective step size


def lora_alpha(rank: Value, coefficient: Value = 256.0) -> Value:
    r"""LoRA-alpha, `coefficient sqrt(rank)`: the `lora_alpha` that arXiv 2606.12883 says is best under Adam.

    With it `SingleLayer(shift, scaling=lora_alpha(rank) / rank)` is the paper's LoRA-alpha. The law is the paper's, its
    coefficient near 256 second hand.

    **Arguments:** `rank`, at least 1, and a positive `coefficient`; numbers, or arrays of shapes that go together.

    **Raises:** `InputError` for other numbers.
    """
    ranks = _positive("rank", rank, least=1.0)
    return _positive("coefficient", coefficient) * np.sqrt(ranks)


def effective(scaling: Value, std: Value, step: Value, optimizer: str) -> tuple[Value, Value]:
    r"""The size of A and the step size with which a scaling of 1 trains `s B A` in the same way, from B = 0.

    With `sqrt(s) A` and `sqrt(s) B` for A and B the scaling is gone: the start is `a = sqrt(s) std`, and the step size
    `e = s step` of gradient descent ("gd"), `e = sqrt(s) step` of "adam" and "sign", whose steps do not depend on the
    size of the gradient. So under Adam a run knows a and e alone: the learning rate moves e, `lora_alpha` both by the
    same factor. Exact for Adam with epsilon 0. Gradient flow has time `s t` in place of the step. Derived here.

    **Arguments:** `scaling` s, `std` and `step`, positive; numbers, or arrays of shapes that go together. `optimizer`:
    "gd", "sign" or "adam".

    **Returns:** (a, e).

    **Raises:** `InputError` for other numbers and names.
    """
    require_choice("optimizer", optimizer, POWER)
    s = _positive("scaling", scaling)
    return np.sqrt(s) * _positive("std", std), s ** POWER[optimizer] * _positive("step", step)


def first_step(step: Value, alpha: Value, std: Value, shape: tuple[int, int], rank: Value) -> tuple[Value, Value]:
    """The first step of Adam or sign descent for a gradient u v^T: the norms of the change of W along v and across.

    `alpha` is `lora_alpha`, and `shape` W's, (m, n). The signal does not depend on the rank, the noise falls like
    1/sqrt(r).
    """
    m, n = shape
    return step * alpha * std * np.sqrt(2 * m / np.pi), step * alpha * std * np.sqrt(m * n / rank)


def largest_alpha(step: Value, std: Value, inputs: int, rank: Value) -> Value:
    """The `lora_alpha` at the edge of stability of gradient descent: s^2 lam_max(A A^T) step = 2 at the start.

    A's entries are random, and lam_max near std^2 (sqrt(n) + sqrt(r))^2. So `lora_alpha` grows like r for r far below
    n, and like sqrt(r) far above: like r/(1 + sqrt(r/n)).
    """
    return rank * np.sqrt(2 / step) / (std * (np.sqrt(inputs) + np.sqrt(rank)))


def _positive(name: str, value: Value, least: float = 0.0) -> np.ndarray:
    must = f"be at least {least:g}" if least else "be positive and finite"
    array = np.asarray(numbers(name, value, must), float)
    known = np.isfinite(array) & (array >= least if least else array > 0)
    for wrong in array[~known].ravel()[:1]:
        require(False, name, must, wrong)
    return array

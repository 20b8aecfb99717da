"""The initial scale alpha: a number, or chosen by what the start does to the model.

Both factors are proportional to alpha, so that a start for alpha = 1 says what any other does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lora_flow.adapter import Adapter
from lora_flow.bridge.schemes import offsets
from lora_flow.checks import require

UPDATE = 1e-2  # s ||B A||/||W|| of a start that changes the model, in the layer where it is largest


class Measured(NamedTuple):
    """Of a layer's start for alpha = 1: s ||B A||_F/||W||_F, -<dL/dW, s B A>, and the layer's shape."""

    update: float
    gain: float | None
    shape: tuple[int, int]


def measure(adapter: Adapter, scaling: float, weight: np.ndarray, descent: np.ndarray | None) -> Measured:
    """What the start of a layer does; `descent` is -dL/dW where it is known."""
    a, b = (np.asarray(factor, np.float64) for factor in adapter)
    size = math.sqrt(max(float(np.sum((b.T @ b) * (a @ a.T))), 0.0))
    product = float(np.linalg.norm(b) * np.linalg.norm(a))
    size = size if size > 1e-7 * product else float(np.linalg.norm(b @ a))  # squares may be rounding
    size = size if size > 1e-12 * product else 0.0
    norm = float(np.linalg.norm(weight))
    gain = None if descent is None else scaling * float(np.sum((b.T @ descent) * a))
    return Measured(scaling * size / norm if norm > 0 else 0.0, gain, weight.shape)


def choose_sizes(
    init: str, side: str, measured: Mapping[str, Measured], *, size: float | None, update: float, gain: float | None
) -> dict[str, float]:
    """alpha of each layer.

    A `size` that is given is all layers'. Else, for a start that is taken off the weights, it is 1, the source's. For
    one that does not change the model, it is the size that LoRA has: entries with standard deviation 1/sqrt(3 in), or
    of `spectral` rows of the same length; of others 1, the source's. For one that changes the model, it is one number,
    with which the largest relative change of a weight is `update`; or with which the loss falls by `gain`, to first
    order.

    **Raises:** `InputError` for a gain that this start does not have.
    """
    if size is not None:
        return dict.fromkeys(measured, size)
    if offsets(init):
        return dict.fromkeys(measured, 1.0)
    largest = max(one.update for one in measured.values())
    if largest == 0:
        return {name: _of_lora(init, side, one.shape) for name, one in measured.items()}
    if gain is None:
        return dict.fromkeys(measured, math.sqrt(update / largest))
    gains = [one.gain for one in measured.values() if one.gain is not None]
    must = "be left out without gradients, which tell how the loss changes"
    require(len(gains) == len(measured), "loss_change", must, gain)
    total = sum(gains)
    require(total > 0, "loss_change", "be left out for a start along which the loss does not fall", gain)
    return dict.fromkeys(measured, math.sqrt(gain / total))


def _of_lora(init: str, side: str, shape: tuple[int, int]) -> float:
    n_out, n_in = shape
    if init == "gaussian":
        return 1 / math.sqrt(3 * (n_in if side == "A" else n_out))
    return 1 / math.sqrt(3) if init == "spectral" else 1.0

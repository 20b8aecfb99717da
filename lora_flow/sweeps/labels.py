"""The meaning of a result's variables, for its readers."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from lora_flow.checks import require
from lora_flow.dynamics.solve import STATUS

LANE_DIMS = ("init", "side", "alpha", "rank", "seed")  # after those of the problems, before time
PENDING = -1  # the status of a lane that has not run


def label(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset with a `long_name` on its variables, and the meaning of `status`."""
    for name, text in (_ABOUT | {name: text for layer in (1, 2) for name, text in _layer(layer).items()}).items():
        if name in dataset.variables:
            dataset[name].attrs["long_name"] = text
    dataset["status"].attrs |= {
        "flag_values": [PENDING, *range(len(STATUS))],
        "flag_meanings": " ".join(("pending", *STATUS)),
    }
    return dataset


def portable_attrs(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes as any file format holds them: text, numbers, and lists of numbers.

    NetCDF has no booleans, which become 0 and 1, no lists of lists, which are written one after the other, no lists of
    text, which are joined by commas, and in its older formats no integers above 32 bits, which become floats.
    """
    return {name: _portable(value) for name, value in attrs.items() if value is not None}


def _portable(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, numbers.Integral | np.bool_):
        return int(value) if abs(int(value)) < 2**31 else float(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if not isinstance(value, list | tuple | np.ndarray):
        return str(value)
    flat = [_portable(one) for part in value for one in (np.ravel(part) if np.ndim(part) else [part])]
    return flat if all(isinstance(one, int | float) for one in flat) else ", ".join(map(str, flat))


def check_labels(name: str, labels: Iterable[Any]) -> None:
    """Raises unless the values can label an axis in every format: all text, all numbers, or all true or false."""
    listed = list(labels)
    kinds: tuple[Any, ...] = (str, bool | np.bool_, numbers.Real)
    one_kind = any(all(isinstance(label, kind) for label in listed) for kind in kinds)
    must = "be labelled by text, or by numbers, all of them alike"
    require(one_kind, name, must, ", ".join(map(repr, listed[:4])) + (", ..." if len(listed) > 4 else ""))
    require(all(label == label for label in listed), name, "be labelled by numbers that are not NaN", "nan")


def layers_of(dataset: xr.Dataset) -> tuple[tuple[int, int], ...]:
    """The shapes (out, in) of the layers that a result is about, layer 1 first.

    In the attribute `layers` they follow one another; the first versions' were a list of pairs.
    """
    return tuple((int(out), int(into)) for out, into in np.reshape(dataset.attrs["layers"], (-1, 2)))


def _layer(i: int) -> dict[str, Any]:
    left, right = {1: ("g", "v"), 2: ("u", "g")}[i]
    return {
        "alignment_error" if i == 1 else f"alignment_error_{i}": (
            f"1 - |cos(gamma_{i}, top left singular vector of Z_{i})|"
        ),
        f"norm_z{i}": f"spectral norm of Z_{i} = [B_{i}; A_{i}^T]",
        f"norm_b{i}a{i}": f"spectral norm of B_{i} A_{i}",
        f"norm_along{i}": f"||gamma_{i}^T Z_{i}||",
        f"norm_across{i}": f"||Z_{i} - gamma_{i} gamma_{i}^T Z_{i}||_F",
        f"overlap_{i}": f"{left}^T B_{i} A_{i} {right}",
        f"growth_rate_{i}": f"d/dt log ||gamma_{i}^T Z_{i}||^2",
    }


_ABOUT = {
    "time": "gradient-flow time",
    "alpha": "initialisation scale",
    "offset": "1 where the start is taken off the frozen weights, W - s B(0) A(0)",
    "rank": "LoRA rank, or hidden width of a network",
    "delta_w": "sigma_W1 / sigma_W2",
    "angle": "angle between the shift's singular vectors and the pretrained ones, in degrees",
    "noise": "norm of the noise in each pretrained weight, relative to the weight's",
    "kappa": "condition number of the shift",
    "pretraining": "start that the pretrained weights were trained from",
    "least_loss": "L*, what the loss of a network is measured from",
    "distance": "||W1 W2 - X^+ Y||_F, distance from the solution of least norm",
    "sigma": "singular value of the shift's pair (u, v) that is learned first",
    "shift_rank": "rank of the shift",
    "aligned": "1 where the shift, W1 and W2 have their singular vectors in common",
    "sigma_w1": "||W1 v||, with that pair",
    "sigma_w2": "||W2^T u||, with that pair",
    "loss": "loss; 1/2 ||shift - update||_F^2 of a factorisation, L - L* of a network",
    "initial_loss": "loss at t = 0",
    "rounding_floor": "loss below which it is at rounding, not a number",
    "drift": "drift of what the flow conserves, A A^T - B^T B if plain, relative to ||Z||^2 (an integration error)",
    "gradient_norm": "norm of the gradient of the loss with respect to the adapters",
    "update_singular_values": "singular values of the update F",
    "update_alignment_error": "1 - cos of the top singular pair of F with that of the shift",
    "term_1": "||W2 B1 A1||_F",
    "term_2": "||B2 A2 W1||_F",
    "term_12": "||B2 A2 B1 A1||_F",
    "loss_signal": "part of the loss along the shift's singular vectors",
    "loss_rest": "part of the loss across the shift's singular vectors",
    "steps": "solver steps, rejected ones included",
    "dead_directions": "directions of the rank that are zero in both factors and never move, over all layers",
    "loss_floor": "least loss of any adapters of that rank from that start's frozen weights",
    "status": "how the lane ended",
}

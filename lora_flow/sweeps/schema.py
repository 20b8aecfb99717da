"""What a sweep's dataset holds: its dimensions and variables, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from lora_flow.dynamics.analysis import DETAILS
from lora_flow.dynamics.observables import OBSERVABLES
from lora_flow.dynamics.solve import STATUS
from lora_flow.storage.lanes import NOT_RUN

LANE_DIMS = ("init", "side", "alpha", "rank", "seed")  # after those of the problems, before time


class OfLane(NamedTuple):
    """A variable with one value for each lane: its meaning, and the value of a lane that has not run."""

    about: str
    pending: Any


OF_LANES = {
    "status": OfLane("how the lane ended", np.int8(NOT_RUN)),
    "initial_loss": OfLane("loss at t = 0", np.nan),
    "rounding_floor": OfLane("loss below which it is at rounding, not a number", np.nan),
    "steps": OfLane("solver steps, rejected ones included", np.int32(0)),
    "dead_directions": OfLane(
        "directions of the rank that are zero in both factors and never move, over all layers", np.int32(0)
    ),
    "loss_floor": OfLane("least loss of any adapters of that rank from that start's frozen weights", np.nan),
}
_ABOUT = {
    "time": "gradient-flow time",
    "init": "initialisation",
    "side": "factor that a one-sided initialisation draws",
    "alpha": "initialisation scale",
    "rank": "LoRA rank, or hidden width of a network",
    "seed": "seed of the initialisation's draw",
    "offset": "1 where the start is taken off the frozen weights, W - s B(0) A(0)",
    "problem": "label of the problem",
    "problem_seed": "seed of the problem's draw",
    "delta_w": "sigma_W1 / sigma_W2",
    "angle": "angle between the shift's singular vectors and the pretrained ones, in degrees",
    "noise": "norm of the noise in each pretrained weight, relative to the weight's",
    "kappa": "condition number of the shift",
    "pretraining": "start that the pretrained weights were trained from",
    "loss": "loss; 1/2 ||shift - update||_F^2 of a factorisation, L - L* of a network",
}


def label(dataset: xr.Dataset, own: Mapping[str, str] | None = None) -> xr.Dataset:
    """The dataset with a `long_name` on its variables, and the meaning of `status`; `own` are the problem's."""
    layers = len(layers_of(dataset))
    about = _ABOUT | {name: one.about for name, one in OF_LANES.items()}
    about |= OBSERVABLES.meanings(layers) | DETAILS.meanings(layers) | dict(own or {})
    for name in set(about) & set(map(str, dataset.variables)):
        dataset[name].attrs["long_name"] = about[name]
    dataset["status"].attrs |= {
        "flag_values": [NOT_RUN, *range(len(STATUS))],
        "flag_meanings": " ".join(("pending", *STATUS)),
    }
    return dataset


def layers_of(dataset: xr.Dataset) -> tuple[tuple[int, int], ...]:
    """The shapes (out, in) of the layers that a result is about, layer 1 first.

    In the attribute `layers` they follow one another; the first versions' were a list of pairs.
    """
    return tuple((int(out), int(into)) for out, into in np.reshape(dataset.attrs["layers"], (-1, 2)))

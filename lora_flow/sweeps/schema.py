"""What a sweep's dataset holds: its dimensions and variables, and what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from lora_flow.dynamics.analysis import DETAILS
from lora_flow.dynamics.observables import OBSERVABLES
from lora_flow.dynamics.solve import STATUS
from lora_flow.storage.lanes import NOT_RUN

LANE_DIMS = ("init", "side", "alpha", "rank", "seed")  # after those of the problems, before time
DESCENT_DIMS = ("optimizer", "step", "gradient_noise")  # of a descent, before alpha
OPTIONAL_DIMS = ("side", *DESCENT_DIMS)  # attributes where there is one value


class OfLane(NamedTuple):
    """A variable with one value for each lane: its meaning, and the value of a lane that has not run."""

    about: str
    pending: Any


OF_LANES = {
    "status": OfLane("how the lane ended", np.int8(NOT_RUN)),
    "initial_loss": OfLane("loss at t = 0", np.nan),
    "rounding_floor": OfLane("loss at rounding: what is computed below it is rounding, not a number", np.nan),
    "steps": OfLane("solver steps, rejected ones included", np.int32(0)),
    "dead_directions": OfLane("directions that never move: zero in both factors, over all layers", np.int32(0)),
    "loss_floor": OfLane("least loss within reach: of any adapters of that rank, from the start's weights", np.nan),
}
_ABOUT = {
    "time": "gradient-flow time",
    "iteration": "iteration: steps taken",
    "optimizer": "optimiser",
    "step": "step size: the optimiser's learning rate",
    "gradient_noise": "noise in the gradient: standard deviation of every entry of dL/dW, drawn anew at each step",
    "init": "initialisation",
    "side": "factor that is drawn: by a one-sided initialisation",
    "alpha": "initialisation scale",
    "rank": "LoRA rank, or hidden width of a network",
    "seed": "seed of the initialisation's draw",
    "offset": "whether the start changes the frozen weights: 1 where they are W - s B(0) A(0)",
    "problem": "label of the problem",
    "problem_seed": "seed of the problem's draw",
    "delta_w": "sigma_W1 / sigma_W2",
    "angle": "angle between the shift's singular vectors and the pretrained ones",
    "noise": "relative noise in each pretrained weight: its norm over the weight's",
    "kappa": "condition number of the shift",
    "pretraining": "start that the pretrained weights were trained from",
    "tokens": "tokens in a sequence, T",
    "sample_ratio": "sequences over their dimension, alpha'",
    "ridge": "ridge on the adapters, lambda'",
    "label_noise": "noise behind the labels, Delta: a variance",
    "pretraining_ratio": "sequences of pre-training over their dimension squared, alpha",
    "pretraining_ridge": "ridge of pre-training, lambda",
    "beta": "multiplier of the frozen map",
    "kept": "share of a pool of sequences that is kept",
    "loss": "loss: 1/2 ||shift - update||_F^2 of a factorisation, L - L* of a network",
}

_UNITS = {"angle": "degree"}  # all other numbers are pure


def explain(variable: xr.DataArray, about: str, units: str = "1") -> None:
    """Says what a variable is: up to ": " as its `long_name`, the rest as its `comment`. A number has `units` too."""
    short, _, more = about.partition(": ")
    variable.attrs |= {"long_name": short} | ({"comment": more} if more else {})
    variable.attrs |= {"units": units} if variable.dtype.kind in "biuf" else {}


def label(dataset: xr.Dataset, own: Mapping[str, str] | None = None) -> xr.Dataset:
    """The dataset with every variable explained, and the meanings of `status`; `own` are the problem's."""
    layers = len(layers_of(dataset))
    about = _ABOUT | {name: one.about for name, one in OF_LANES.items()}
    about |= OBSERVABLES.meanings(layers) | DETAILS.meanings(layers) | dict(own or {})
    for name in set(about) & set(map(str, dataset.variables)):
        explain(dataset[name], about[name], _UNITS.get(name, "1"))
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


def failed(datasets: Iterable[xr.Dataset]) -> Mapping[str, int]:
    """The number of lanes that ended with each status other than success; lanes that have not run are not counted."""
    counts: dict[str, int] = {}
    for dataset in datasets:
        attrs = dataset["status"].attrs
        for code, meaning in zip(attrs["flag_values"], attrs["flag_meanings"].split(), strict=True):
            count = int((dataset["status"] == code).sum())
            if code not in (0, NOT_RUN) and count:
                counts[meaning] = counts.get(meaning, 0) + count
    return counts

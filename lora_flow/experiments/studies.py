"""The studies by name: experiments that are not sweeps of the flow, each one dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import xarray as xr

from lora_flow.experiments import adaptive_step as adaptive
from lora_flow.experiments import growing_step as growing
from lora_flow.experiments import imbalance, pretraining, scaling, width
from lora_flow.experiments import lora_one as toys

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Study:
    """An experiment that runs as a whole, within about a minute, for a number of draws."""

    about: str
    seeds: int
    run: Callable[[int, Callable[[Any], Any]], xr.Dataset]
    draw: Callable[[xr.Dataset], Figure]
    notes: Callable[[xr.Dataset], str]


STUDIES = {
    "pretraining": Study(
        "how the imbalance of pretraining becomes delta_w, and which adapter then wins",
        5,
        pretraining.pretraining,
        pretraining.draw,
        pretraining.notes,
    ),
    "imbalance": Study(
        "how imbalance speeds up linear networks, and the bounds on their rate",
        5,
        imbalance.run,
        imbalance.draw,
        imbalance.notes,
    ),
    "width": Study(
        "how far wide linear networks end from the solution of least norm, and how well conditioned they begin",
        5,
        width.run,
        width.draw,
        width.notes,
    ),
    "lora-one": Study(
        "alignment of A with the gradient and risk, for several alpha",
        10,
        toys.alignment,
        toys.draw_alignment,
        toys.alignment_notes,
    ),
    "preconditioner": Study(
        "risk with and without the preconditioner, LoRA-One's start and LoRA-GA's",
        5,
        toys.preconditioning,
        toys.draw_preconditioning,
        toys.preconditioning_notes,
    ),
    "adaptive-step": Study(
        "constant and adaptive steps of linear networks, with their proven bounds",
        3,
        adaptive.run,
        adaptive.draw,
        adaptive.notes,
    ),
    "growing-step": Study(
        "steps of linear networks that grow as the loss falls, and local rates",
        5,
        growing.run,
        growing.draw,
        growing.notes,
    ),
    "scaling": Study(
        "the best lora_alpha against the rank, gradient descent and Adam",
        5,
        scaling.scaling,
        scaling.draw,
        scaling.notes,
    ),
}

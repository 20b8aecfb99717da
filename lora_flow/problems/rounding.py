"""The loss below which a computed loss is rounding."""

from __future__ import annotations

import numpy as np
import xarray as xr
from jaxtyping import Array, Float

from lora_flow.adapter import Adapters, as_start
from lora_flow.problems.base import ROUNDING, Problem, as_problem, require_problem
from lora_flow.storage.blocks import blockwise


def rounding_floor(problem: Problem, adapters: Adapters) -> Float[Array, ""]:
    r"""The loss below which a computed loss is "at rounding", for a run that starts from these adapters:

        (100 eps)^2 max(L(zero adapters), L(adapters)),

    with eps the spacing of the floating-point type: 4.9e-28 of the loss without adapters in double precision, 1.4e-10
    in single. A loss `1/2 ||shift - update||^2` is a difference: the state and its products are known to some eps, so
    their difference is known to some eps of the largest term. The largest terms are the shift and, as the loss only
    falls, the adapters' product at the start. For an `Offset` the start counts as adapters of the original problem: the
    matrix that it subtracts from the weights is a product too, and is added again.

    The step control limits the effect of rounding on the state to 50 eps of the state, and a product has two factors.
    Measured, converged runs wander at 1 to 20 eps (relative residual, the largest of many times and draws), in given
    and in canonical coordinates, and at up to 76 eps where steps are long and stabilised. Above 100 eps, losses by the
    default solver are within 0.02 decades of those in extended precision (`tests/test_accuracy.py`).

    For a loss that is no sum of squares the formula is only a guess. A problem that knows its floor has a method
    `rounding_floor(adapters)`.

    **Returns:** a scalar, in the loss's units; derivatives take it for a constant.

    **Raises:** `InputError` for what is no problem, and for what are no adapters of its layers.
    """
    require_problem(problem)
    return as_problem(problem).rounding_floor(as_start("adapters", adapters, problem.layers))


def resolved(ratio: float) -> float:
    """A loss in double precision relative to that without adapters; 0 where that is at rounding."""
    return 0.0 if ratio < (ROUNDING * np.finfo(np.float64).eps) ** 2 else ratio


def rounding_floors(dataset: xr.Dataset) -> xr.DataArray:
    """The rounding floor of a dataset's losses, over its dims without `time`.

    Results of older versions do not have the floor; it is then (100 eps)^2 of the largest stored loss.
    """
    if "rounding_floor" in dataset:
        return dataset["rounding_floor"]
    eps = np.finfo(dataset.attrs.get("dtype", "float64")).eps
    largest = blockwise(lambda one: one.max("time"), dataset[["loss"]])["loss"]
    return (ROUNDING * eps) ** 2 * largest

"""What a result is saved over: gradient-flow time, or the iterations of a descent. Readers call both `time`."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import xarray as xr

Result = TypeVar("Result", xr.Dataset, xr.DataArray)


class Clock(NamedTuple):
    """How people are told of it.

    - `axis`: the label of an axis. `at`: what comes before a value, as in "t = 5". `unit`: what a rate is of.
    - `longer`, `shorter`: the flag to change for such a run.
    """

    axis: str
    at: str
    unit: str
    longer: str
    shorter: str


FLOW = Clock("gradient-flow time t", "t = ", "unit of time", "a longer --t1", "a shorter --t1")
DESCENT = Clock("iteration", "iteration ", "iteration", "more --steps", "fewer --steps")


def is_descent(dataset: xr.Dataset) -> bool:
    """Whether a result is of gradient descent, of all optimisers or of one."""
    return "optimizer" in dataset.coords or "optimizer" in dataset.attrs


def over_time(result: Result) -> Result:
    """The result, with the iterations of a descent under the name `time`."""
    return result.rename(iteration="time") if "iteration" in result.dims and "time" not in result.dims else result


def clock(dataset: xr.Dataset) -> Clock:
    """The clock of a result."""
    return DESCENT if is_descent(dataset) else FLOW


def at_the_end(dataset: xr.Dataset) -> str:
    """The end of the runs, "t = 5" or "iteration 300"."""
    end = dataset.attrs["steps"] if is_descent(dataset) else dataset.attrs["t1"]
    return f"{clock(dataset).at}{end:g}"

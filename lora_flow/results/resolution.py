"""What the saved times resolve: an event among the first of them is told as a bound, and so is a needle between two."""

from __future__ import annotations

import numpy as np
import xarray as xr

from lora_flow.results.clock import clock, is_descent

SAVES = 3  # after the first: an event before so many of them is known only roughly
NEEDLE = 10.0  # the factor between neighbouring saves, from which on an extreme may lie between them,
LEVEL = 10**0.1  # unless the value on the other side is as good as the same


def bound(found: float, time: np.ndarray) -> float:
    """The saved time that an event came before, where it came among the first saves; NaN where it is resolved.

    What has happened at the first saved time itself is known.
    """
    early = time[0] < found < _early(time)
    return float(time[np.searchsorted(time, found * (1 - 1e-9))]) if early else np.nan


def hides_less(rows: np.ndarray, time: np.ndarray, rounding: float) -> np.ndarray:
    """Whether values `(lane, time)` may be much less between two saves than at any of them; `(lane,)`.

    So it is where the least comes among the first saves after the start, or is less by a decade than the value on one
    side and is not level with that on the other; unless it is rounding.
    """
    i = np.where(np.isfinite(rows), rows, np.inf).argmin(axis=-1)
    padded = np.pad(np.nan_to_num(rows, nan=0.0), ((0, 0), (1, 1)))
    left, least, right = (np.take_along_axis(padded, i[:, None] + shift, axis=1)[:, 0] for shift in range(3))
    jumps = (np.maximum(left, right) > NEEDLE * least) & (np.minimum(left, right) > LEVEL * least)
    return (least > rounding) & (i > 0) & (jumps | (time[i] < _early(time)))


def advice(dataset: xr.Dataset) -> str:
    """The ways to save more where little is saved."""
    steps = np.diff(dataset["time"].values)
    logarithmic = ["--spacing log"] if np.allclose(steps, steps[0]) and not is_descent(dataset) else []
    *first, last = [*logarithmic, f"more --saves than {dataset.sizes['time']}", clock(dataset).shorter]
    return f"{', '.join(first)} or {last}"


def _early(time: np.ndarray) -> float:
    """The time from which on the saves tell when something happened."""
    return float(time[min(SAVES, len(time) - 1)])

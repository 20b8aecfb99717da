"""The times at which a run passes from one phase of arXiv 2503.06982 to the next: align, grow, converge, stop."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from lora_flow.checks import as_real, kind, require, require_instance
from lora_flow.initialization import INITIALIZATIONS
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.given import require_dataset
from lora_flow.results.levels import initial_losses
from lora_flow.sweeps.schema import explain, layers_of
from lora_flow.theory import gradient_flow as theory

SLOW = 0.1  # of a drop's fastest rate: less is the slow tail after it, or a saddle between two
DROPPED = 0.99  # of the loss at the start: a saddle comes after a drop,
LEVEL = np.e  # has a loss that falls by less than this factor,
ABOVE_END = 10.0  # and ends at less than one part in this
NEAR = 1e-9  # relative: of gains that are nearer to each other none is the larger, and no layer is selected

OVER_TIME = ("norm_along", "norm_across", "overlap_")  # of either layer, which phases are read off

_ABOUT = {
    "t_align": "end of early alignment",
    "t1": "T1, end of growth: g^T B1 A1 v first reaches (1 - delta_w) sigma / (4 sigma_W2)",
    "t_plateau": "start of the slow tail: from here on log L falls at less than a tenth of its fastest rate",
    "saddles": "number of saddles: the loss is nearly constant between two drops",
    "t_saddle": "start of the longest saddle",
    "t_saddle_end": "end of the longest saddle",
    "t1_predicted": "log(1/alpha) / (sigma sigma_W)",
}


def phases(dataset: xr.Dataset) -> xr.Dataset:
    r"""The times at which each run's phases end.

    A time is infinite where the run ends earlier. A mean over runs is then infinite too, while a median is right as
    long as half of the runs reach the time. A time is NaN where it is unknown: for lanes that failed, where theory
    defines none, and where the phase ended before the first save.

    The times are those of the layer that aligns first and is selected: of layer 1, and of layer 2 where delta_w > 1,
    with the roles of the weights exchanged. With sigma the singular value of the shift's pair that is learned first and
    s the larger of the two weights' gains along this pair:

    - `t_align`, the end of early alignment: the first time at which ||gamma^T Z|| exceeds the norm of the rest of Z.
    - `t1`, the paper's T1, the end of growth: the first time with g^T B1 A1 v >= (1 - delta_w) sigma / (4 sigma_W2)
      (Theorem C.2). NaN, and `t_plateau` too, for initialisations that offset the frozen weights, whose B A is no
      update, and where delta_w = 1.
    - `t_plateau`, the end of local convergence and the start of the slow tail: the time after t1 from which on log L
      falls at less than a tenth of its fastest rate, though not necessarily to zero. Losses at rounding are left out;
      infinite for a loss that falls fast until rounding, or until the end.
    - `saddles`, the number of saddles, and `t_saddle` and `t_saddle_end` of the longest. On a saddle log L falls at
      less than a tenth of its fastest rate before and of its fastest rate after, and L falls by less than a factor e;
      at the end of the run the loss is less than a tenth of L there. The start is no saddle: no drop comes before it.
    - `t1_predicted`: log(1/alpha) / (sigma s), from the talk on the paper, for aligned problems with a shift of rank
      one; a guide for other problems, and NaN for flows that are not plain and where delta_w = 1.

    The first two are interpolated between saves, in the logarithm of the crossing quantity; the others are saved times.
    T1 too is a saved time, after the true one, where the overlap is not positive at the save before, as with B(0) = 0.

    **Returns:** an `xarray.Dataset` of these variables over the dataset's dims without `time`.

    **Raises:** `InputError` for what is no dataset over time, and for one without the singular values that the
    thresholds are made of.
    """
    _check_dataset(dataset)
    t1, gains = end_of_growth(dataset), _gains(dataset)
    predicted, plain = theory.t1_slides(gains, dataset["alpha"]), dataset.attrs.get("flow", "plain") == "plain"
    floor = rounding_floors(dataset)
    spans = xr.Dataset(
        {
            "t_align": alignment_time(dataset),
            "t1": t1,
            "t_plateau": _slow_tail(dataset["loss"], t1, floor),
            "t1_predicted": predicted.where((predicted > 0) & _selects(gains) if plain else False).broadcast_like(t1),
            **_saddles(dataset["loss"], initial_losses(dataset), floor),
        }
    )
    for name, about in _ABOUT.items():
        spans[name].attrs = {}
        explain(spans[name], about)
    return spans


def second_leads(dataset: xr.Dataset) -> xr.DataArray:
    """Whether layer 2 is the one that theory says is selected: where W1 has the larger gain, delta_w > 1."""
    return dataset["sigma_w1"] > (1 + NEAR) * dataset["sigma_w2"]


def leading(dataset: xr.Dataset, first: str, second: str) -> xr.DataArray:
    """The quantity of the layer that aligns first and is selected, given the names of layer 1's and of layer 2's."""
    if second not in dataset or "sigma_w1" not in dataset.coords:
        return dataset[first]
    return xr.where(second_leads(dataset), dataset[second], dataset[first])


def aligning(dataset: xr.Dataset) -> str:
    """The stacked factors whose alignment is told of and drawn, in words."""
    if len(layers_of(dataset)) == 1:
        return "Z = [B; A^T]"
    if "sigma_w1" not in dataset.coords:
        return "Z1 = [B1; A1^T], of the first layer"
    second = second_leads(dataset).values
    if not (second | (dataset["sigma_w2"] > (1 + NEAR) * dataset["sigma_w1"]).values).any():
        return "Z1 = [B1; A1^T], of the first layer (delta_w = 1: neither is selected)"
    if not second.any():
        return "Z1 = [B1; A1^T], of the layer that aligns first"
    both = "Z1, or Z2 where delta_w > 1"
    return f"{'Z2 = [B2; A2^T]' if second.all() else both}, of the layer that aligns first"


def alignment_time(dataset: xr.Dataset, before: float = np.nan) -> xr.DataArray:
    """`t_align` of `phases`, also of problems that have no other phases."""
    along, across = (leading(dataset, f"norm_{name}1", f"norm_{name}2") for name in ("along", "across"))
    return crossing(along / across, xr.ones_like(along.isel(time=0, drop=True)), before)


def end_of_growth(dataset: xr.Dataset, before: float = np.nan) -> xr.DataArray:
    """`t1` as `phases` has it, with `before` in place of NaN where it was over before the first save."""
    gains = _gains(dataset)
    threshold = theory.t1_threshold(gains).where(_selects(gains))
    t1 = crossing(leading(dataset, "overlap_1", "overlap_2"), threshold, before)
    return t1.where(~_offset(dataset["init"])) if "init" in dataset.coords else t1


def _selects(gains: theory.Gains) -> Any:
    """Whether the weights select one of the layers: not where delta_w = 1, for which there is no T1."""
    return 1 - gains.d > NEAR


def _gains(dataset: xr.Dataset) -> theory.Gains:
    gain, ratio = leading_gain(dataset)
    return theory.Gains(dataset["sigma"], ratio * gain, gain)


def _check_dataset(dataset: Any) -> None:
    require_dataset(dataset, "phases")
    over_time = "time" in dataset.dims and "time" in dataset.coords
    require(over_time, "dataset", "have its dimension time, for phases", f"dims {list(map(str, dataset.dims))}")
    require("sigma_w1" in dataset.coords, "dataset", "be of a factorisation, for phases", "another problem's")
    needed = {"loss", "sigma", "sigma_w2", "alpha", *(f"{name}{i}" for name in OVER_TIME for i in (1, 2))}
    missing = sorted(needed - set(map(str, dataset.variables)))
    require(not missing, "dataset", "have all of its variables, for phases", f"one without {', '.join(missing)}")


def _offset(init: xr.DataArray) -> xr.DataArray:
    """Whether these starts are subtracted from the frozen weights: as stored, or in older runs by name."""
    if "offset" in init.coords:
        return init["offset"].astype(bool)
    known = {name for name, scheme in INITIALIZATIONS.items() if scheme.offset}
    return init.copy(data=np.vectorize(lambda name: str(name).partition(":")[0] in known, otypes=[bool])(init.values))


def leading_gain(dataset: xr.Dataset) -> tuple[xr.DataArray, xr.DataArray]:
    """The larger of sigma_W1 and sigma_W2, and the smaller one over it: sigma_W2 and delta_w where delta_w < 1."""
    s1, s2 = dataset["sigma_w1"], dataset["sigma_w2"]
    gain = xr.where(s1 > s2, s1, s2)
    return gain, xr.where(s1 > s2, s2, s1) / gain


def at_times(values: xr.DataArray, times: xr.DataArray) -> xr.DataArray:
    """Positive values over `time` at one time for each lane, interpolated in their logarithm.

    NaN where the time is not between the first and the last that the lane reached.
    """
    saved = values["time"].values

    def interpolate(row: np.ndarray, time: float) -> float:
        reached = np.isfinite(row) & (row > 0)
        if not reached.any() or not saved[reached][0] <= time <= saved[reached][-1]:
            return np.nan
        return float(np.exp(np.interp(time, saved[reached], np.log(row[reached]))))

    return _for_each_lane(interpolate, values, times)


def time_to(loss: xr.DataArray, level: float | xr.DataArray) -> xr.DataArray:
    """The first time at which a loss over `time` is at most `level`, for each lane.

    The time is interpolated between saves, in the logarithm of the loss. It is infinite where the run ends before; a
    mean over runs is then infinite too. It is NaN where it is unknown: for lanes that failed before, and where the loss
    is below the level at a first save later than t = 0. A level below the dataset's `rounding_floor` may be reached by
    rounding alone. Starts without an offset change the loss at t = 0; to compare them, take levels relative to the loss
    of the pretrained weights, `problem.loss(zero_adapters(problem.layers, rank=1))`.

    **Returns:** an `xarray.DataArray` over the loss's dims without `time`.

    **Raises:** `InputError` for a loss that is not over `time`, and for a level that is negative or no number.
    """
    must = "be a number that is not negative, or an xarray.DataArray without time"
    if isinstance(level, xr.DataArray):
        require("time" not in level.dims, "level", must, f"dims {list(map(str, level.dims))}")
    else:
        known = as_real(level)
        number = known is not None and known.shape == () and known.dtype != object and not known < 0
        require(number, "level", must, kind(level))
    require_instance("loss", loss, xr.DataArray, "be an xarray.DataArray, as dataset['loss'] is")
    over_time = "time" in loss.dims and "time" in loss.coords
    require(over_time, "loss", "have its dimension time", f"dims {list(map(str, loss.dims))}")
    return fall_to(loss, level)


def fall_to(loss: xr.DataArray, level: float | xr.DataArray, before: float = np.nan) -> xr.DataArray:
    """`time_to`, with `before` in place of NaN where the loss was there before the first save."""
    least = np.finfo(float).tiny
    level = xr.zeros_like(loss.isel(time=0, drop=True)) + level
    return crossing(1 / loss.clip(min=least), 1 / level.clip(min=least), before)


def crossing(values: xr.DataArray, threshold: xr.DataArray, before: float = np.nan) -> xr.DataArray:
    """The first time at which the values reach the threshold; infinite or NaN as in `phases`.

    `before` where that was before the first save. A saved time where the values are not positive at the save before.
    """
    saved = values["time"].values

    def first(row: np.ndarray, level: float) -> float:
        above = np.flatnonzero(row >= level)
        if above.size == 0:
            return np.nan if np.isnan(level) or np.isnan(row[-1]) else np.inf
        i = above[0]
        if i == 0:
            return 0.0 if saved[0] == 0 else before
        low, high = row[i - 1], row[i]
        if not (low > 0 and np.isfinite(high)):  # the growth between the two saves is not known
            return float(saved[i])
        share = np.log(level / low) / np.log(high / low)
        return float(saved[i - 1] + share * (saved[i] - saved[i - 1]))

    return _for_each_lane(first, values, threshold)


def _slow_tail(loss: xr.DataArray, t1: xr.DataArray, floor: xr.DataArray) -> xr.DataArray:
    saved = loss["time"].values
    midpoints = 0.5 * (saved[1:] + saved[:-1])

    def start(row: np.ndarray, begin: float, floor: float) -> float:
        if np.isnan(begin) or np.isnan(row[-1]):
            return np.nan
        rates = rates_of_fall(row, saved, floor)
        looked_at = (midpoints > begin) & np.isfinite(rates)
        if not np.any(rates[looked_at] > 0):
            return np.inf
        fast = np.flatnonzero(looked_at & (rates > SLOW * np.max(rates[looked_at])))
        return float(saved[fast[-1] + 1]) if fast[-1] < np.flatnonzero(looked_at)[-1] else np.inf

    return _for_each_lane(start, loss, t1, floor)


def _saddles(loss: xr.DataArray, initial: xr.DataArray, floor: xr.DataArray) -> dict[str, xr.DataArray]:
    saved = loss["time"].values

    def longest(row: np.ndarray, initial: float, floor: float) -> tuple[float, float, float]:
        if np.isnan(row).any() or np.isnan(initial):
            return np.nan, np.nan, np.nan
        found = saddles(row, saved, initial, floor)
        return float(len(found)), *max(found, key=lambda span: span[1] - span[0], default=(np.inf, np.inf))

    told = xr.apply_ufunc(
        longest, loss, initial, floor, input_core_dims=[["time"], [], []], output_core_dims=[[]] * 3, vectorize=True
    )
    return dict(zip(("saddles", "t_saddle", "t_saddle_end"), told, strict=True))


def saddles(loss: np.ndarray, times: np.ndarray, initial: float, floor: float) -> list[tuple[float, float]]:
    """The intervals in which one run's loss, `initial` at t = 0, is on a saddle, as defined in `phases`."""
    rates = np.nan_to_num(rates_of_fall(loss, times, floor), nan=0.0)
    before, after = np.maximum.accumulate(rates), np.maximum.accumulate(rates[::-1])[::-1]
    slow = np.concatenate([[False], rates < SLOW * np.minimum(before, after), [False]])
    edges = np.flatnonzero(np.diff(slow.astype(int)))
    spans = zip(edges[::2], edges[1::2], strict=True)  # of saves: the first and the last of each
    left = max(float(loss[-1]), floor) * ABOVE_END
    return [
        (float(times[first]), float(times[last]))
        for first, last in spans
        if loss[first] < DROPPED * initial and loss[first] < LEVEL * loss[last] and loss[last] > left
    ]


def rates_of_fall(loss: np.ndarray, times: np.ndarray, floor: float) -> np.ndarray:
    """-d log L/dt between saves; NaN where the loss comes to rounding."""
    resolved = np.where(loss >= max(floor, np.finfo(float).tiny), loss, np.nan)
    return -np.diff(np.log(resolved)) / np.diff(times)


def _for_each_lane(function: Any, values: xr.DataArray, *numbers: xr.DataArray) -> xr.DataArray:
    """Applies a function of one lane's values over time and numbers of that lane."""
    core: Any = [["time"], *([] for _ in numbers)]
    return xr.apply_ufunc(function, values, *numbers, input_core_dims=core, vectorize=True, output_dtypes=[float])

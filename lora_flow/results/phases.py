"""The times at which a run passes from one phase of arXiv 2503.06982 to the next: align, grow, converge, stop."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from lora_flow.checks import as_real, kind, require, require_instance
from lora_flow.initialization import INITIALIZATIONS
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.clock import is_descent, over_time
from lora_flow.results.given import require_dataset
from lora_flow.results.levels import initial_losses
from lora_flow.storage.blocks import blockwise
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
    "t1_predicted": "log(1/alpha) / (sigma sigma_W): for aligned shifts of rank one, and a guide elsewhere",
}


def phases(dataset: xr.Dataset) -> xr.Dataset:
    r"""The times at which each run's phases end.

    Of a descent all times are iterations.

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
      one. For other problems it is a guide, which reports do not call a prediction. NaN for flows that are not plain,
      for descents and where delta_w = 1.

    The first two are interpolated between saves, in the logarithm of the crossing quantity; the others are saved times.
    T1 too is a saved time, after the true one, where the overlap is not positive at the save before, as with B(0) = 0.
    A time among the first saves is known only roughly; reports tell those before the third save after the first as
    bounds. Save more often there, with `saves=save_times(t1, 101, "log")` for instance.

    **Returns:** an `xarray.Dataset` of these variables over the dataset's dims without `time`.

    **Raises:** `InputError` for what is no dataset over time, and for one without the singular values that the
    thresholds are made of.
    """
    _check_dataset(dataset)
    dataset = over_time(dataset)
    spans = blockwise(_phases, dataset[_needed(dataset)])
    for name, about in _ABOUT.items():
        spans[name].attrs = {}
        explain(spans[name], about)
    return spans


def _needed(dataset: xr.Dataset) -> list[str]:
    """The variables that phases are read off."""
    stored = [name for name in ("rounding_floor", "initial_loss") if name in dataset]
    return ["loss", *stored, *of_alignment_time(dataset), *of_end_of_growth(dataset)]


def _phases(dataset: xr.Dataset) -> xr.Dataset:
    t1, floor = end_of_growth(dataset), rounding_floors(dataset)
    return xr.Dataset(
        {
            "t_align": alignment_time(dataset),
            "t1": t1,
            "t_plateau": _slow_tail(dataset["loss"], t1, floor),
            "t1_predicted": predicted_end_of_growth(dataset).broadcast_like(t1),
            **_saddles(dataset["loss"], initial_losses(dataset), floor),
        }
    )


def second_leads(dataset: xr.Dataset) -> xr.DataArray:
    """Whether layer 2 is the one that theory says is selected: where W1 has the larger gain, delta_w > 1."""
    return dataset["sigma_w1"] > (1 + NEAR) * dataset["sigma_w2"]


def leading(dataset: xr.Dataset, first: str, second: str) -> xr.DataArray:
    """The quantity of the layer that aligns first and is selected, given the names of layer 1's and of layer 2's."""
    names = of_leading(dataset, first, second)
    if len(names) == 1:
        return dataset[names[0]]
    return xr.where(second_leads(dataset), dataset[second], dataset[first])


def of_leading(dataset: xr.Dataset, first: str, second: str) -> list[str]:
    """The variables that `leading` takes its values from: both where it depends on the problem."""
    if second not in dataset or "sigma_w1" not in dataset.coords:
        return [first]
    leads = second_leads(dataset).values
    return [name for name, some in ((first, not leads.all()), (second, leads.any())) if some]


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


def of_alignment_time(dataset: xr.Dataset) -> list[str]:
    """The variables that it is read off."""
    return [one for name in ("along", "across") for one in of_leading(dataset, f"norm_{name}1", f"norm_{name}2")]


def end_of_growth(dataset: xr.Dataset, before: float = np.nan) -> xr.DataArray:
    """`t1` as `phases` has it, with `before` in place of NaN where it was over before the first save."""
    gains = _gains(dataset)
    threshold = theory.t1_threshold(gains).where(_selects(gains))
    t1 = crossing(leading(dataset, "overlap_1", "overlap_2"), threshold, before)
    return t1.where(~_offset(dataset["init"])) if "init" in dataset.coords else t1


def of_end_of_growth(dataset: xr.Dataset) -> list[str]:
    """The variables that it is read off."""
    return of_leading(dataset, "overlap_1", "overlap_2")


def predicted_end_of_growth(dataset: xr.Dataset) -> xr.DataArray:
    """`t1_predicted` of `phases`, over the problems and alpha."""
    gains = _gains(dataset)
    plain = dataset.attrs.get("flow", "plain") == "plain" and not is_descent(dataset)
    predicted = theory.t1_slides(gains, dataset["alpha"])
    return predicted.where((predicted > 0) & _selects(gains) if plain else False)


def _selects(gains: theory.Gains) -> Any:
    """Whether the weights select one of the layers: not where delta_w = 1, for which there is no T1."""
    return 1 - gains.d > NEAR


def _gains(dataset: xr.Dataset) -> theory.Gains:
    gain, ratio = leading_gain(dataset)
    return theory.Gains(dataset["sigma"], ratio * gain, gain)


def _check_dataset(dataset: Any) -> None:
    require_dataset(dataset, "phases")
    dataset = over_time(dataset)
    known = "time" in dataset.dims and "time" in dataset.coords
    require(known, "dataset", "have its dimension time, for phases", f"dims {list(map(str, dataset.dims))}")
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

    core: Any = [["time"], []]
    return xr.apply_ufunc(interpolate, values, times, input_core_dims=core, vectorize=True, output_dtypes=[float])


def time_to(loss: xr.DataArray, level: float | xr.DataArray) -> xr.DataArray:
    """The first time, or iteration of a descent, at which a loss over `time` is at most `level`, for each lane.

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
        given = as_real(level)
        number = given is not None and given.shape == () and given.dtype != object and not given < 0
        require(number, "level", must, kind(level))
    require_instance("loss", loss, xr.DataArray, "be an xarray.DataArray, as dataset['loss'] is")
    loss = over_time(loss)
    known = "time" in loss.dims and "time" in loss.coords
    require(known, "loss", "have its dimension time", f"dims {list(map(str, loss.dims))}")
    start = loss.isel(time=0, drop=True)
    levels = start.copy(data=np.zeros(start.shape)) + level
    xr.align(loss, levels, join="exact", copy=False)
    both = levels.to_dataset(name="_level").assign(_loss=loss)
    found = blockwise(lambda one: fall_to(one["_loss"], one["_level"]).to_dataset(name="_time"), both)
    return found["_time"].rename(levels.name)


def fall_to(loss: xr.DataArray, level: xr.DataArray, before: float = np.nan) -> xr.DataArray:
    """`time_to`, with `before` in place of NaN where the loss was there before the first save."""
    least = np.finfo(float).tiny
    return crossing(1 / loss.clip(min=least), 1 / level.clip(min=least), before)


def crossing(values: xr.DataArray, threshold: xr.DataArray, before: float = np.nan) -> xr.DataArray:
    """The first time at which the values reach the threshold; infinite or NaN as in `phases`.

    `before` where that was before the first save. A saved time where the values are not positive at the save before.
    """
    saved = values["time"].values

    def first(rows: np.ndarray, level: np.ndarray) -> np.ndarray:
        above = rows >= level[:, None]
        place, reached = np.argmax(above, axis=1), above.any(axis=1)
        times = np.where(np.isnan(level) | np.isnan(rows[:, -1]), np.nan, np.inf)
        times[reached] = 0.0 if saved[0] == 0 else before
        later = np.flatnonzero(place > 0)
        i = place[later]
        low, high = rows[later, i - 1], rows[later, i]
        known = (low > 0) & np.isfinite(high)  # else the growth between the two saves is not
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.log(level[later] / low) / np.log(high / low)
        times[later] = np.where(known, saved[i - 1] + share * (saved[i] - saved[i - 1]), saved[i])
        return times

    return of_lanes(first, values, threshold)


def _slow_tail(loss: xr.DataArray, t1: xr.DataArray, floor: xr.DataArray) -> xr.DataArray:
    saved = loss["time"].values
    midpoints = 0.5 * (saved[1:] + saved[:-1])

    def start(rows: np.ndarray, begin: np.ndarray, floor: np.ndarray) -> np.ndarray:
        rates = rates_of_fall(rows, saved, floor)
        looked_at = (midpoints > begin[:, None]) & np.isfinite(rates)
        fastest = np.max(rates, axis=1, where=looked_at, initial=-np.inf)
        last_fast = last_place(looked_at & (rates > SLOW * fastest[:, None]))
        slow = (fastest > 0) & (last_fast < last_place(looked_at))
        times = np.full(len(rows), np.inf)
        times[slow] = saved[last_fast[slow] + 1]
        times[np.isnan(begin) | np.isnan(rows[:, -1])] = np.nan
        return times

    return of_lanes(start, loss, t1, floor)


def last_place(there: np.ndarray) -> np.ndarray:
    """The last place of each row, `(lane, place)`, at which something is there; -1 where it is nowhere."""
    return np.max(np.broadcast_to(np.arange(there.shape[1]), there.shape), axis=1, where=there, initial=-1)


def _saddles(loss: xr.DataArray, initial: xr.DataArray, floor: xr.DataArray) -> dict[str, xr.DataArray]:
    saved = loss["time"].values

    def longest(rows: np.ndarray, initial: np.ndarray, floor: np.ndarray) -> tuple[np.ndarray, ...]:
        lanes, first, last = _on_saddles(rows, saved, initial, floor)
        count = np.bincount(lanes, minlength=len(rows)).astype(float)
        begin, end = np.full((2, len(rows)), np.inf)
        in_order = np.lexsort((-first, saved[last] - saved[first]))  # the longest last, of those the earliest
        lanes, first, last = lanes[in_order], first[in_order], last[in_order]
        begin[lanes], end[lanes] = saved[first], saved[last]
        unknown = np.isnan(rows).any(axis=1) | np.isnan(initial)
        return tuple(np.where(unknown, np.nan, told) for told in (count, begin, end))

    told = of_lanes(longest, loss, initial, floor, results=3)
    return dict(zip(("saddles", "t_saddle", "t_saddle_end"), told, strict=True))


def saddles(loss: np.ndarray, times: np.ndarray, initial: float, floor: float) -> list[tuple[float, float]]:
    """The intervals in which one run's loss, `initial` at t = 0, is on a saddle, as defined in `phases`."""
    _, first, last = _on_saddles(loss[None], times, np.array([initial]), np.array([floor]))
    return list(zip(times[first].tolist(), times[last].tolist(), strict=True))


def _on_saddles(
    rows: np.ndarray, times: np.ndarray, initial: np.ndarray, floor: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each saddle of the losses `(lane, time)` its lane, and the places of its first and its last save."""
    rates = np.nan_to_num(rates_of_fall(rows, times, floor), nan=0.0)
    before = np.maximum.accumulate(rates, axis=1)
    after = np.maximum.accumulate(rates[:, ::-1], axis=1)[:, ::-1]
    slow = np.pad(rates < SLOW * np.minimum(before, after), ((0, 0), (1, 1)))
    edges = np.diff(slow.astype(np.int8), axis=1)
    (lanes, first), (_, last) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    left = np.maximum(rows[:, -1], floor) * ABOVE_END
    begin, end = rows[lanes, first], rows[lanes, last]
    found = (begin < DROPPED * initial[lanes]) & (begin < LEVEL * end) & (end > left[lanes])
    return lanes[found], first[found], last[found]


def rates_of_fall(loss: np.ndarray, times: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """-d log L/dt between saves of losses `(lane, time)`; NaN where a loss comes to rounding."""
    resolved = np.where(loss >= np.maximum(floor, np.finfo(float).tiny)[:, None], loss, np.nan)
    return -np.diff(np.log(resolved), axis=1) / np.diff(times)


def of_lanes(function: Any, values: xr.DataArray, *numbers: xr.DataArray, results: int = 1) -> Any:
    """Applies a function of values `(lane, time)`, and of numbers `(lane,)`, that gives results `(lane,)`."""

    def of_arrays(values: np.ndarray, *numbers: Any) -> Any:
        shape = np.broadcast_shapes(values.shape[:-1], *map(np.shape, numbers))
        rows = np.broadcast_to(values, (*shape, values.shape[-1])).reshape(-1, values.shape[-1])
        found = function(rows, *(np.broadcast_to(one, shape).ravel() for one in numbers))
        return found.reshape(shape) if results == 1 else tuple(one.reshape(shape) for one in found)

    core: Any = [["time"], *([] for _ in numbers)]
    return xr.apply_ufunc(of_arrays, values, *numbers, input_core_dims=core, output_core_dims=[[]] * results)

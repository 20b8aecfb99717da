"""Whether a stored run is the one that a plan describes; only then may the run be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from lora_flow.checks import require

_HOW = ("t1", "flow", "solver", "rtol", "max_steps", "devices", "batch_size")
_WHERE = ("lora_flow_version", "jax_version", "diffrax_version", "platform", "dtype")
_DIGEST = "problem_digest"
_ASKED = {"seed": "seeds", "time": "saves"}  # what the settings call the axes that they do not list


def check_settings(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises, with one line that names the setting, unless the run at `path` was asked for with these."""
    for name in now:
        if name != "devices":  # which is how many there are
            _same(path, name, then.get(name), now[name])


def check_attrs(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises unless the run has the same plan and problem, by the same versions on the same platform."""
    for name in (*_WHERE, *_HOW):
        _same(path, name, then.get(name), now[name])
    must = f"be the one that '{path}' was started with, to resume it"
    require(then.get(_DIGEST) == now[_DIGEST], "problem", must, "other weights or another shift")


def check_arrays(path: Path, stored: xr.Dataset, planned: xr.Dataset) -> None:
    """Raises unless every value of every axis and coordinate is what the plan has, and the variables are the plan's."""
    for dim in dict.fromkeys((*map(str, planned.dims), *map(str, stored.dims))):
        _same(path, _ASKED.get(dim, dim), _coordinate(stored, dim), _coordinate(planned, dim))
    for name in dict.fromkeys((*map(str, planned.coords), *map(str, stored.coords))):
        _same(path, name, _coordinate(stored, name), _coordinate(planned, name))
    _same(path, "the variables", sorted(map(str, stored.data_vars)), sorted(map(str, planned.data_vars)))


def _same(path: Path, name: str, then: Any, now: Any) -> None:
    require(_equal(then, now), name, f"be {_told(then)}, as '{path}' was started, to resume it", _told(now))


def _coordinate(dataset: xr.Dataset, name: str) -> np.ndarray:
    return dataset[name].values if name in dataset.coords else np.arange(dataset.sizes.get(name, 0))


def _equal(then: Any, now: Any) -> bool:
    one, other = np.asarray(then), np.asarray(now)
    both = one.dtype.kind == other.dtype.kind == "f"
    return one.shape == other.shape and bool(np.array_equal(one, other, equal_nan=both))


def _told(value: Any) -> str:
    """A value, or the first and last of many."""
    if np.ndim(value) == 0:
        return str(value)
    texts = list(map(str, np.ravel(np.asarray(value)).tolist()))
    if len(texts) > 6:
        texts = [*texts[:3], "...", f"{texts[-1]}: {len(texts)} values"]
    return f"({', '.join(texts)})"

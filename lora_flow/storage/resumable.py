"""Whether a stored run is the one that is asked for; only then may the run be resumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from lora_flow.checks import require
from lora_flow.storage.remote import RunPath


def check_same(path: RunPath, then: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises, with a line on the first of these names that differs, unless the run at `path` was started with `now`."""
    for name in names:
        _same(path, name, then.get(name), now[name])


def check_arrays(path: RunPath, stored: xr.Dataset, planned: xr.Dataset) -> None:
    """Raises unless every value of every axis and coordinate is the planned one, and the variables are the same."""
    for name in dict.fromkeys(map(str, (*planned.dims, *stored.dims, *planned.coords, *stored.coords))):
        _same(path, name, _coordinate(stored, name), _coordinate(planned, name))
    _same(path, "the variables", sorted(map(str, stored.data_vars)), sorted(map(str, planned.data_vars)))


def _same(path: RunPath, name: str, then: Any, now: Any) -> None:
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

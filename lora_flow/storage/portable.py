"""What any file format holds: the attributes of a dataset, and the labels of its axes."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_flow.checks import require


def portable_attrs(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes as any file format holds them: text, numbers, and lists of numbers.

    NetCDF has no booleans, which become 0 and 1, no lists of lists, which are written one after the other, no lists of
    text, which are joined by commas, and in its older formats no integers above 32 bits, which become floats.
    """
    return {name: _portable(value) for name, value in attrs.items() if value is not None}


def _portable(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, numbers.Integral | np.bool_):
        return int(value) if abs(int(value)) < 2**31 else float(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if not isinstance(value, list | tuple | np.ndarray):
        return str(value)
    flat = [_portable(one) for part in value for one in (np.ravel(part) if np.ndim(part) else [part])]
    return flat if all(isinstance(one, int | float) for one in flat) else ", ".join(map(str, flat))


def check_labels(name: str, labels: Iterable[Any]) -> None:
    """Raises unless the values can label an axis in every format: all text, all numbers, or all true or false."""
    listed = list(labels)
    kinds: tuple[Any, ...] = (str, bool | np.bool_, numbers.Real)
    one_kind = any(all(isinstance(label, kind) for label in listed) for kind in kinds)
    must = "be labelled by text, or by numbers, all of them alike"
    require(one_kind, name, must, ", ".join(map(repr, listed[:4])) + (", ..." if len(listed) > 4 else ""))
    require(all(label == label for label in listed), name, "be labelled by numbers that are not NaN", "nan")

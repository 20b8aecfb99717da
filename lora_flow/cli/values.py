"""The values of flags: numbers and names, several of them separated by spaces or commas, and ranges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from lora_flow.sweeps.axes import in_equal_ratios

MOST = 1_000_000  # values that a range may have

Several = Callable[[list[str]], Any]


def registry() -> ConstructorRegistry:
    """tyro's rules for the kinds of values that settings have, in the place of its own."""
    rules = ConstructorRegistry()
    rules.primitive_rule(_rule)
    return rules


def integer(text: str) -> int:
    """12, -3, 1_000 or 1e5."""
    try:
        return int(text)
    except ValueError:
        pass
    value = number(text, "an integer")
    if not value.is_integer():  # nor infinite, nor NaN
        raise ValueError(f"must be an integer, got {text!r}")
    return int(value)


def number(text: str, what: str = "a number") -> float:
    """Anything that Python reads as a float; others check that it is positive or finite."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"must be {what}, got {text!r}") from None


def numbers(words: list[str]) -> tuple[float, ...]:
    """`1e-3 1e-4`, `1e-3,1e-4`, and `1e-6:1e-2:9` for nine values in equal ratios, both ends included.

    From 0, as in `0:90:7`, where no ratio leads anywhere, they are in equal steps.
    """
    return tuple(value for word in _split(words) for value in (_between(word) if ":" in word else [number(word)]))


def integers(words: list[str]) -> tuple[int, ...]:
    """`1 2`, `1,2`, and `0:60` or `0:60:10`, as in Python without the end."""
    return tuple(value for word in _split(words) for value in (_steps(word) if ":" in word else [integer(word)]))


def seeds(words: list[str]) -> int | tuple[int, ...]:
    """One number says how many, from 0; several, or a range, say which."""
    listed = integers(words)
    if len(words) == 1 and not set(words[0]) & set(",:"):
        return listed[0]
    return len(listed) if listed == tuple(range(len(listed))) else listed


def names(words: list[str]) -> tuple[str, ...]:
    """`gaussian spectral` or `gaussian,spectral`."""
    return tuple(_split(words))


def _split(words: list[str]) -> list[str]:
    parts = [part for word in words for part in word.split(",")]
    if not parts or not all(part.strip() for part in parts):
        raise ValueError(f"must be one value or several, got {' '.join(words)!r}")
    return [part.strip() for part in parts]


def _between(word: str) -> list[float]:
    ends = word.split(":")
    must = f"must be FROM:TO:COUNT, from 0 or a positive number to a positive one, and at least 2 values, got {word!r}"
    if len(ends) != 3:
        raise ValueError(must)
    first, last, count = number(ends[0]), number(ends[1]), integer(ends[2])
    if not (0 <= first < math.inf and 0 < last < math.inf and 2 <= count <= MOST):
        raise ValueError(must)
    if first == 0:
        return [first, *(float(f"{last * (i / (count - 1)):.15g}") for i in range(1, count - 1)), last]
    return in_equal_ratios(first, last, count)


def _steps(word: str) -> list[int]:
    ends = word.split(":")
    must = f"must be FROM:TO or FROM:TO:STEP, integers, TO above FROM and left out itself, got {word!r}"
    if len(ends) not in (2, 3) or not all(ends):
        raise ValueError(must)
    first, end, step = (*map(integer, ends), 1)[:3]
    if step < 1 or end <= first or (end - first) // step > MOST:
        raise ValueError(must)
    return list(range(first, end, step))


def _rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    several: dict[Any, tuple[str, Several]] = {
        tuple[float, ...]: ("NUMBER ...", numbers),
        tuple[int, ...]: ("INT ...", integers),
        tuple[str, ...]: ("NAME ...", names),
        int | tuple[int, ...]: ("INT ...", seeds),
    }
    one: dict[Any, tuple[str, Callable[[str], Any]]] = {
        int: ("INT", integer),
        int | None: ("INT", integer),
        float: ("NUMBER", number),
    }
    if info.type in several:
        metavar, read = several[info.type]
        return PrimitiveConstructorSpec("*", metavar, read, _is_any, _words)
    if info.type in one:
        metavar, single = one[info.type]
        return PrimitiveConstructorSpec(1, metavar, lambda words: single(words[0]), _is_any, _words)
    return None


def _is_any(value: object) -> bool:
    return True


def _words(value: Any) -> list[str]:
    if value == ():
        return ["none"]
    listed = value if isinstance(value, tuple) else () if value is None else (value,)
    return [f"{one:.6g}" if isinstance(one, float) else str(one) for one in listed]

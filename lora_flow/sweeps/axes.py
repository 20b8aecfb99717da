"""The values of an axis that grows or is a range, and the seeds that are told as their number. Imports no JAX."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


def union(old: Iterable[Any], new: Iterable[Any]) -> tuple[Any, ...]:
    """What there is, and behind it what is new."""
    held = dict.fromkeys(old)
    return (*held, *(value for value in new if value not in held))


def in_equal_ratios(first: float, last: float, count: int) -> list[float]:
    """So many numbers from `first` to `last`, both positive and as they are, to 15 digits in equal ratios."""
    low, high = math.log10(first), math.log10(last)
    return [first, *(float(f"{10 ** (low + (high - low) * i / (count - 1)):.15g}") for i in range(1, count - 1)), last]


def listed(seeds: int | Sequence[int]) -> Sequence[int]:
    """All seeds, where a number stands for those from 0."""
    return range(seeds) if isinstance(seeds, int) else seeds


def counted(seeds: tuple[int, ...]) -> int | tuple[int, ...]:
    """Their number where they are those from 0."""
    return len(seeds) if seeds == tuple(range(len(seeds))) else seeds

"""The values of an axis that grows, and the seeds that are told as their number. Imports no JAX by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def union(old: Iterable[Any], new: Iterable[Any]) -> tuple[Any, ...]:
    """What there is, and behind it what is new."""
    held = dict.fromkeys(old)
    return (*held, *(value for value in new if value not in held))


def listed(seeds: int | Sequence[int]) -> Sequence[int]:
    """All seeds, where a number stands for those from 0."""
    return range(seeds) if isinstance(seeds, int) else seeds


def counted(seeds: tuple[int, ...]) -> int | tuple[int, ...]:
    """Their number where they are those from 0."""
    return len(seeds) if seeds == tuple(range(len(seeds))) else seeds

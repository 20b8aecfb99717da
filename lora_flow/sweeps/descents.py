"""The optimisers of a swept descent with their step sizes, as text: "adam:1e-3". Imports no JAX by itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

from lora_flow.checks import kind, require
from lora_flow.sweeps.axes import in_equal_ratios

MOST = 10_000  # step sizes of a range
MUST = "be optimisers with positive step sizes, such as adam:1e-3, or FROM:TO:COUNT for several, adam:1e-4:1e-2:9"


def parse_descents(texts: Iterable[Any]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The names of optimisers, and the step sizes, whose product the texts are.

    **Raises:** `InputError` for what is no such text, and where optimisers have different step sizes.
    """
    pairs = [(name, step) for text in texts for name, steps in [_parsed(text)] for step in steps]
    steps: dict[str, list[float]] = {}
    for name, step in pairs:
        steps.setdefault(name, []).append(step)
    sizes = tuple(dict.fromkeys(step for _, step in pairs))
    twice = [f"{name}:{step:g}" for name, each in steps.items() for step in each if each.count(step) > 1]
    require(not twice, "descend", "name each value once", ", ".join(twice))
    alike = set(pairs) == set(itertools.product(steps, sizes))
    told = "; ".join(f"{name} with {', '.join(f'{step:g}' for step in each)}" for name, each in steps.items())
    require(alike, "descend", "give every optimiser the same step sizes, or be several sweeps", told)
    return tuple(steps), sizes


def _parsed(text: Any) -> tuple[str, list[float]]:
    require(isinstance(text, str), "descend", MUST, kind(text))
    name, *words = text.split(":")
    try:
        numbers = list(map(float, words))
    except ValueError:
        numbers = []
    several = len(numbers) == 3 and numbers[2].is_integer() and 2 <= numbers[2] <= MOST
    known = (several or len(numbers) == 1) and all(0 < one < math.inf for one in numbers)
    require(name and known, "descend", MUST, repr(text))
    return name, in_equal_ratios(numbers[0], numbers[1], int(numbers[2])) if several else numbers

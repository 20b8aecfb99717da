"""The coordinates of several problems that share a program."""

from __future__ import annotations

from collections.abc import Sequence

from lora_flow.checks import kind, require
from lora_flow.coordinates.base import Coordinates
from lora_flow.problems.base import Problem, as_problem


def coordinates_of(problems: Sequence[Problem], *, rank: int) -> tuple[Coordinates, ...]:
    """Each of several problems of one shape in the coordinates in which it costs least, all of one shape.

    The problems say in which (`AbstractProblem.coordinates`). Problems that do not say the same stay as they are.

    **Raises:** `InputError` where a problem names what is no kind of `Coordinates`.
    """
    kinds = {_kind_for(problem) for problem in problems}
    chosen = kinds.pop() if len(kinds) == 1 else Coordinates
    return chosen.of(problems, rank=rank)


def _kind_for(problem: Problem) -> type[Coordinates]:
    named = as_problem(problem).coordinates
    fits = isinstance(named, type) and issubclass(named, Coordinates)
    require(fits, "problem.coordinates", "be a class that derives from Coordinates", kind(named))
    return named

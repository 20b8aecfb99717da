"""An equal but cheaper problem, and the maps there and back: what all kinds of it have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx

from lora_flow.adapter import Adapters, pad


class Coordinates(eqx.Module):
    """A problem in other coordinates, and the maps there and back. These here change nothing.

    A kind of coordinates derives from this class, and overrides what it changes. Loss, flow and observables are the
    same in all of them, to rounding.

    - `problem`: the problem in these coordinates, a `Problem` like any other.
    - `rank`: of the adapters in these coordinates. Adapters of lower ranks are padded, and so share a program.
    - `changes_problem`: whether `problem` is another problem than the given one. If not, adapters in these coordinates
      are adapters of the given problem, too, but `Narrow`'s in another basis of the rank's directions.
    """

    problem: Any
    rank: int = eqx.field(static=True)

    changes_problem: ClassVar[bool] = False

    @classmethod
    def of(cls, problems: Sequence[Any], *, rank: int) -> tuple[Coordinates, ...]:
        """Each of several problems of one shape in coordinates of one shape, for adapters up to that rank."""
        return tuple(cls(problem, rank) for problem in problems)

    def enter(self, adapters: Adapters) -> tuple[Adapters, Any]:
        """A start in these coordinates, and what this start needs to leave them: nothing here."""
        return pad(adapters, self.rank), None

    def leave(self, adapters: Adapters, bases: Any) -> Adapters:
        """The adapters in the original coordinates, of the rank that the coordinates were made for."""
        return adapters

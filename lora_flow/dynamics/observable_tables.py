"""Tables of observables: each has its name, its meaning and its formula in one place, where the formula stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from lora_flow.checks import require
from lora_flow.runtime.compiling import forget

RESERVED = frozenset({"time", "mode", "loss", "initial_loss", "rounding_floor", "status", "steps", "step_size"})
MANY = 9  # layers, up to which names are compared
Formula = TypeVar("Formula", bound=Callable[..., Any])


class Observable(NamedTuple):
    """A number at each time, under one name, or under a name for each layer.

    - `name`, `about`: the name, and the meaning, which datasets have as `long_name`, and after ": " as `comment`. `{i}`
      in them stands for the layer, counted from 1. A name without it is layer 1's; layer 2 has "_2" after it, and so
      on.
    - `of`: the formula, from one layer to values over time; from the list of layers where not `each`.
    """

    name: str
    about: str
    of: Callable[[Any], Any]
    each: bool

    def told(self, layers: int) -> list[tuple[str, str]]:
        """The names with their meanings, for that many layers."""
        if not self.each:
            return [(self.name, self.about)]
        return [(self._name(i), self.about.replace("{i}", str(i))) for i in range(1, layers + 1)]

    def _name(self, i: int) -> str:
        has_place = i == 1 or "{i}" in self.name
        return self.name.replace("{i}", str(i)) if has_place else f"{self.name}_{i}"


class Observables:
    """A table of observables by name, whose formulas take the same of each layer."""

    def __init__(self) -> None:
        self.entries: dict[str, Observable] = {}
        self._is_in_use = False  # by programs, which then lack what is entered later

    def of_each_layer(self, name: str, about: str) -> Callable[[Formula], Formula]:
        """Enters a formula of one layer; see `Observable`."""
        return self._enter(name, about, each=True)

    def of_all_layers(self, name: str, about: str) -> Callable[[Formula], Formula]:
        """Enters a formula of the list of all layers."""
        return self._enter(name, about, each=False)

    def _enter(self, name: str, about: str, each: bool) -> Callable[[Formula], Formula]:
        def enter(formula: Formula) -> Formula:
            entry = Observable(name, about, formula, each)
            others = (one for key, one in self.entries.items() if key != name)
            taken = RESERVED.union(told for one in others for told, _ in one.told(MANY))
            doubled = sorted(taken & {told for told, _ in entry.told(MANY)})
            require(not doubled, "the name of an observable", "be its own", ", ".join(doubled))
            self.entries[name] = entry
            if self._is_in_use:
                forget()
            return formula

        return enter

    def meanings(self, layers: int) -> dict[str, str]:
        """Name -> meaning, for that many layers."""
        return {name: about for one in self.entries.values() for name, about in one.told(layers)}

    def values(self, layers: Sequence[Any]) -> dict[str, Any]:
        """Name -> value."""
        self._is_in_use = True
        named: dict[str, Any] = {}
        for one in self.entries.values():
            values = map(one.of, layers) if one.each else [one.of(layers)]
            named |= {name: value for (name, _), value in zip(one.told(len(layers)), values, strict=True)}
        return named

"""Which formulas of a problem may be used: those that are about the loss in force.

Beside its `loss` a class may offer formulas of it: the field, the linearised task. A subclass, or a single object, that
changes the loss still has them, and they are of another loss. One rule for all of them: a formula is used unless
something above it, on the way from the object to the class that defines it, changes what a class had already defined.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeGuard, TypeVar

Kind = TypeVar("Kind")

# what is about a loss, and what no loss depends on: to override these changes no loss
FORMULAS = frozenset(
    {
        "field",
        "linearised_task",
        "task_sizes",
        "growth_bound",
        "lowest_loss",
        "smoothness",
        "rounding_floor",
        "spectrum",
        "leading_gains",
        "descent_of",
        "product_descent",
        "of_products",
    }
)
BESIDE = frozenset({"observe", "_about"})  # what is recorded, and what is printed


def formula(problem: Any, name: str) -> Any:
    """The problem's own formula of that name, or None where it has none that is about its loss.

    What a class defines together with its loss, or below it, counts; what it only inherits while it changes the loss,
    or what the loss is made of, does not. To override a formula alone is the author's word that it is right.
    """
    levels = _levels(problem)
    for index, level in enumerate(levels):
        if name in level:
            return None if level[name] is None or _changes(levels, index) else getattr(problem, name)
    return None  # what `__getattr__` hands on from another object is about that one's loss


def keeps_loss(problem: Any, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether it is of that kind, with that class's loss and all that this is made of."""
    return isinstance(problem, kind) and not _changes(_levels(problem), _index(problem, kind))


def keeps_all(problem: Any, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether it is of that kind, with its loss, its formulas, and nothing more to observe: one may stand in for it."""
    if not isinstance(problem, kind):
        return False
    levels, index = _levels(problem), _index(problem, kind)
    own = set().union(*levels[:index])
    return not _changes(levels, index) and not own & (FORMULAS | {"observe"})


Levels = list[Mapping[str, Any]]


def _levels(problem: Any) -> Levels:
    """What the object itself defines, then each of its classes, the most derived first."""
    kinds = [vars(kind) for kind in type(problem).__mro__[:-1]]
    declared = getattr(type(problem), "__dataclass_fields__", {})

    def is_data(name: str) -> bool:
        """A declared field, which formulas read, and not a method's place."""
        found = inspect.getattr_static(type(problem), name, None)
        return name in declared and (found is None or found is declared[name].default)

    own = {name: value for name, value in getattr(problem, "__dict__", {}).items() if not is_data(name)}
    return [own, *kinds]


def _index(problem: Any, kind: type) -> int:
    return 1 + type(problem).__mro__.index(kind)


def _changes(levels: Levels, index: int) -> bool:
    """Whether a level above that one defines a loss, or redefines any behaviour but formulas."""
    for above, level in enumerate(levels[:index], start=1):
        for name in level:
            if name == "loss":
                return True
            aside = name in FORMULAS or name in BESIDE or (name.startswith("__") and name.endswith("__"))
            if not aside and any(name in below and _is_behaviour(below[name]) for below in levels[above:]):
                return True
    return False


def _is_behaviour(value: Any) -> bool:
    """A method or a property that is there already, and not one that was left open."""
    return (callable(value) or hasattr(type(value), "__get__")) and not getattr(value, "__isabstractmethod__", False)

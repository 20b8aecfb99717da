"""Which methods of a problem belong to the loss in force, and which to a loss that has been replaced.

Beside its `loss` a class has formulas for that loss: the field, the linearised task. A subclass, or a single object,
that changes the loss inherits these formulas, which belong to the old loss. One rule decides for all: a formula is used
unless something above it, on the way from the object to the class that defines the formula, redefines behaviour of a
class below. `AbstractProblem` puts its defaults in place of the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

Kind = TypeVar("Kind")

# the methods of `AbstractProblem` that are about a loss; to override these changes no loss
FORMULAS = frozenset(
    {
        "field",
        "linearised_task",
        "task_sizes",
        "task_rank",
        "fastest_rate",
        "growth_bound",
        "lowest_loss",
        "smoothness",
        "rounding_floor",
        "product_descent",
        "of_products",
        "coordinates",
        "pretrained",
        "details",
        "characteristics",
        "summary",
    }
)
TOLD = frozenset({"_about", "meanings"})  # to people
# what single classes have of this kind, what is recorded, and what is told
BESIDE = TOLD | {"descent_of", "spectrum", "leading_gains", "observe", "offset"}

Levels = Sequence[Mapping[str, Any]]

if TYPE_CHECKING:
    default = property
else:

    class default:
        """A property in whose place a subclass may have a field, a property or a plain value.

        The class itself has no such attribute, so that a dataclass takes it for no field's default.
        """

        def __init__(self, of: Callable[[Any], Any]):
            self.of, self.__doc__ = of, of.__doc__

        def __set_name__(self, kind: type, name: str) -> None:
            self.name = name

        def __get__(self, problem: Any, kind: type | None = None) -> Any:
            if problem is None:
                raise AttributeError(self.name)
            return self.of(problem)


def outdated(kind: type, base: type) -> list[str]:
    """The formulas that a class inherits and that are about another loss than its own; `base` has the defaults."""
    kinds = kind.__mro__[: kind.__mro__.index(base)]
    levels = [{**dict.fromkeys(inspect.get_annotations(one)), **vars(one)} for one in kinds]
    defined = {name: next((i for i, level in enumerate(levels) if name in level), 0) for name in FORMULAS}
    return sorted(name for name, index in defined.items() if _changes(levels, index))


def formula(problem: Any, name: str) -> Any:
    """The formula of that name of any object, or None where the object has none for its loss.

    A formula counts where a class defines it together with the loss, or a subclass defines it. A formula that is only
    inherited does not count where the class changes the loss or its parts. An author who overrides a formula alone
    vouches for it.
    """
    levels = _levels(problem)
    for index, level in enumerate(levels):
        if name in level:
            return None if level[name] is None or _changes(levels, index) else getattr(problem, name)
    return None  # what `__getattr__` hands on from another object is about that one's loss


def keeps_loss(problem: Any, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether the problem is of that class, with the class's loss and all parts of the loss."""
    return isinstance(problem, kind) and not _changes(_levels(problem), _index(problem, kind))


def keeps_all(problem: Any, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether the problem has that class's loss, formulas and observables: an instance may stand in for it."""
    if not isinstance(problem, kind):
        return False
    levels, index = _levels(problem), _index(problem, kind)
    own = set().union(*levels[:index])
    return not _changes(levels, index) and not own & (FORMULAS | BESIDE - TOLD)


def _levels(problem: Any) -> Levels:
    """The definitions of the object itself, then of each of its classes, the most derived first."""
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
    is_open = isinstance(value, default) or getattr(value, "__isabstractmethod__", False)
    return (callable(value) or hasattr(type(value), "__get__")) and not is_open

"""New fields of a subclass, where the parent makes its own fields from the arguments of an `__init__`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from lora_flow.checks import require

NO_FIELD = re.compile(r"\b(ClassVar|AbstractVar|AbstractClassVar)\b")


def take_new_fields(kind: type) -> None:
    """Gives a subclass an `__init__` that takes its new fields by name, and all else as its parent does.

    To be called from `__init_subclass__`. `class Mine(Factorization): decay: float` is then made by
    `Mine(w1, w2, shift, decay=0.1)`, with all of the parent's checks. A class with an `__init__` of its own is left as
    it is, and so is one whose parent's is a dataclass's, which takes all fields.
    """
    new = _new_fields(kind)
    if not new or "__init__" in vars(kind) or _takes_all_fields(kind):
        return
    inherited = inspect.signature(kind.__init__)  # type: ignore[misc]
    for name in new:
        must = f"have another name than the arguments of {kind.__mro__[1].__name__}"
        require(name not in inherited.parameters, f"the field '{name}' of {kind.__name__}", must, repr(name))
    own = [_parameter(name, field) for name, field in new.items()]
    signature = inherited.replace(parameters=sorted([*inherited.parameters.values(), *own], key=lambda one: one.kind))

    def __init__(self: Any, *arguments: Any, **named: Any) -> None:
        given = signature.bind(self, *arguments, **named)
        for name, field in new.items():
            setattr(self, name, given.arguments.pop(name) if name in given.arguments else _default(field))
        above: Any = super(kind, self)
        above.__init__(*given.args[1:], **given.kwargs)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    kind.__init__ = __init__  # type: ignore[misc]


def _new_fields(kind: type) -> dict[str, Any]:
    """The fields that a class adds, which are not yet known as a dataclass's, with their defaults."""
    inherited = {name for base in kind.__mro__[1:] for name in getattr(base, "__dataclass_fields__", {})}
    told = inspect.get_annotations(kind)
    names = [name for name, of in told.items() if name not in inherited and not NO_FIELD.search(str(of))]
    fields = {name: _field(vars(kind).get(name, dataclasses.MISSING)) for name in names}
    return {name: field for name, field in fields.items() if field.init}


def _field(value: Any) -> Any:
    return value if isinstance(value, dataclasses.Field) else dataclasses.field(default=value)


def _default(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _parameter(name: str, field: Any) -> inspect.Parameter:
    """Of a field with a factory the default is written as `...`."""
    has_factory = field.default_factory is not dataclasses.MISSING
    known = ... if has_factory else field.default
    default = inspect.Parameter.empty if known is dataclasses.MISSING else known
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)


def _takes_all_fields(kind: type) -> bool:
    """Whether the `__init__` that a class inherits was made by `dataclass`."""
    definer = next(base for base in kind.__mro__[1:] if "__init__" in vars(base))
    made = vars(definer).get("__dataclass_params__")
    return made is not None and made.init

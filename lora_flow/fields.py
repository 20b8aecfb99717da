"""New fields of a subclass, where the parent makes its own fields from the arguments of an `__init__`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from lora_flow.checks import require

NO_FIELD = re.compile(r"\b(ClassVar|AbstractVar|AbstractClassVar)\b")
MADE_HERE = "_takes_new_fields"  # marks an `__init__` that `take_new_fields` has made


def take_new_fields(kind: type) -> None:
    """Gives a subclass an `__init__` that takes its new fields by name, and all else as its parent does.

    To be called from `__init_subclass__`. `class Mine(Factorization): decay: float` is then made by
    `Mine(w1, w2, shift, decay=0.1)`, with all of the parent's checks. The new fields are those that the nearest
    `__init__` written by hand does not set: those of all parents, each with the default that was declared last. A class
    with an `__init__` of its own is left as it is, and so is one whose fields are all taken by a dataclass's.

    **Raises:** `InputError` where the arguments of that `__init__` have a field's name or are given a default, and for
    parents whose `__init__`s do not call each other.
    """
    above = [base for base in kind.__mro__[1:] if "__init__" in vars(base)]
    if "__init__" in vars(kind) or not (written := [base for base in above if _is_by_hand(base)]):
        return
    writer, inherited = written[0], inspect.signature(written[0].__init__)  # type: ignore[misc]
    for other in above:
        calls = other in writer.__mro__ or above.index(other) < above.index(writer) or _takes_all_fields(other)
        must = f"have an __init__ of its own, which calls those of {writer.__name__} and {other.__name__}"
        require(calls, kind.__name__, must, "none")
    new = _new_fields(kind, writer)
    if not new:
        return
    for name in new:
        must = f"have another name than the arguments of {writer.__name__}"
        require(name not in inherited.parameters, f"the field '{name}' of {kind.__name__}", must, repr(name))
    own = [_parameter(name, field) for name, field in new.items()]
    signature = inherited.replace(parameters=sorted([*inherited.parameters.values(), *own], key=lambda one: one.kind))

    def __init__(self: Any, *arguments: Any, **named: Any) -> None:
        given = signature.bind(self, *arguments, **named)
        for name, field in new.items():
            setattr(self, name, given.arguments.pop(name) if name in given.arguments else _default(field))
        writer.__init__(*given.args, **given.kwargs)  # type: ignore[misc]

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    setattr(__init__, MADE_HERE, True)
    kind.__init__ = __init__  # type: ignore[misc]


def _new_fields(kind: type, writer: type) -> dict[str, Any]:
    """The fields of a class that the `__init__` of the writer does not set, with their defaults."""
    fields: dict[str, Any] = {}
    for base in reversed(kind.__mro__[1:]):
        fields |= {name: of for name, of in _fields(base).items() if name in inspect.get_annotations(base)}
    for name, of in inspect.get_annotations(kind).items():
        if not NO_FIELD.search(str(of)) and (name in vars(kind) or name not in fields):
            fields[name] = _field(vars(kind).get(name, dataclasses.MISSING))
    set_there = _fields(writer)
    for name in set(set_there) & set(inspect.get_annotations(kind)) & set(vars(kind)):
        must = f"have no default, since the __init__ of {writer.__name__} sets it"
        require(not _has_default(fields[name]), f"the field '{name}' of {kind.__name__}", must, "one")
    return {name: field for name, field in fields.items() if field.init and name not in set_there}


def _fields(kind: type) -> dict[str, Any]:
    """Those of a class, its parents' among them; none of a class that is no dataclass."""
    known: Any = kind
    return {field.name: field for field in dataclasses.fields(known)} if dataclasses.is_dataclass(kind) else {}


def _field(value: Any) -> Any:
    return value if isinstance(value, dataclasses.Field) else dataclasses.field(default=value)


def _has_default(field: Any) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _default(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _parameter(name: str, field: Any) -> inspect.Parameter:
    """Of a field with a factory the default is written as `...`."""
    has_factory = field.default_factory is not dataclasses.MISSING
    known = ... if has_factory else field.default
    default = inspect.Parameter.empty if known is dataclasses.MISSING else known
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)


def _takes_all_fields(kind: type) -> bool:
    """Whether the `__init__` of a class was made by `dataclass`."""
    made = vars(kind).get("__dataclass_params__")
    return made is not None and made.init


def _is_by_hand(kind: type) -> bool:
    """Whether somebody has written the `__init__` of a class, rather than `dataclass` or `take_new_fields`."""
    made = _takes_all_fields(kind) or hasattr(vars(kind)["__init__"], MADE_HERE)
    return not made and kind is not object and not getattr(kind, "_is_protocol", False)

"""Plans as bytes for other processes: with cloudpickle where it is installed, also what is defined in a script."""

from __future__ import annotations

import dataclasses
import inspect
import io
import pickle
from typing import Any

import equinox as eqx

from lora_flow.checks import InputError


def pickled(name: str, value: Any) -> bytes:
    """The bytes that `pickle.loads` makes the same of in another process.

    **Raises:** `InputError` where a part of what is called `name` cannot be pickled.
    """
    try:
        return _dumps(value)
    except Exception as error:  # whatever the parts of a user's problem raise
        told = f"{type(error).__name__}: {error}"
        raise InputError(f"{name} must be such that pickle takes it, got {' '.join(told.split())}") from error


def _dumps(value: Any) -> bytes:
    try:
        import cloudpickle
    except ImportError:
        return pickle.dumps(value)

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, part: Any) -> Any:
            how = super().reducer_override(part)
            if isinstance(part, type) and issubclass(part, eqx.Module) and isinstance(how, tuple):
                make, (*made, namespace, tracker, extra), *rest = how
                return make, (*made, namespace | _outline(part), tracker, extra), *rest
            return how

    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def _outline(kind: type) -> dict[str, Any]:
    """What equinox must know of a class when it is made: its own fields, and whether they are arrays of a PyTree.

    cloudpickle makes a class empty, so that its parts may refer to it, and fills it later.
    """
    known: Any = kind
    own = [field for field in dataclasses.fields(known) if field.name in inspect.get_annotations(kind)]
    fields = {field.name: _field(field) for field in own}
    writes = {"__init__": _nothing} if "__init__" in vars(kind) else {}
    return fields | writes | {"__annotations__": dict.fromkeys(fields, object)}


def _field(field: dataclasses.Field[Any]) -> Any:
    return eqx.field(static=bool(field.metadata.get("static")), kw_only=True)


def _nothing(self: Any, *arguments: Any, **named: Any) -> None:
    """Stands for an `__init__` that follows."""

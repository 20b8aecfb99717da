"""One wording for every bad argument: which one, what it must be, what it was."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import numpy as np


class InputError(ValueError):
    """A bad argument. The command line prints its one line and exits with status 2."""


class PrecisionWarning(UserWarning):
    """The floating-point type in use cannot carry the tolerance that was asked for."""


def require(condition: object, name: str, must: str, got: Any) -> None:
    """Raise `InputError("<name> must <must>, got <got>")` unless `condition` holds."""
    if not condition:
        raise InputError(f"{name} must {must}, got {got}")


def require_choice(name: str, value: Any, choices: Iterable[str], otherwise: str = "") -> None:
    """Raise unless `value` is one of `choices`; the message suggests the nearest one and what else there is."""
    choices = list(choices)
    if value in choices:
        return
    nearest = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    listed = " or ".join([", ".join(map(repr, choices[:-1])), repr(choices[-1])]) if choices[1:] else repr(choices[0])
    raise InputError(f"{name} must be {listed}{' ' if otherwise else ''}{otherwise}, got {value!r}{hint}")


def concrete(value: Any) -> np.ndarray | None:
    """The value as a NumPy array, for checks; None while JAX traces it, when there is no value to check."""
    from jax.core import Tracer

    return None if isinstance(value, Tracer) else np.asarray(value)

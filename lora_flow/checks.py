"""One wording for every bad argument: which one, what it must be, what it was."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

LONGEST = 300  # characters of what was got instead: one line of a terminal or two


class InputError(ValueError):
    """A bad argument. The command line prints its one line and exits with status 2."""


class PrecisionWarning(UserWarning):
    """The floating-point type in use cannot carry the tolerance that was asked for."""


class StartWarning(UserWarning):
    """A start from which a part of the flow that was asked for does nothing."""


def require(condition: object, name: str, must: str, got: Any) -> None:
    """Raise `InputError("<name> must <must>, got <got>")` unless `condition` holds."""
    if not condition:
        raise InputError(f"{name} must {must}, got {one_line(got)}")


def one_line(got: Any) -> str:
    """A value that was given, on one line of bounded length."""
    text = " ".join(str(got).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


def kind(value: Any) -> str:
    """The description of a wrong value, for the end of a message: numbers and text as they are written."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"shape {shape} of {getattr(value, 'dtype', type(value).__name__)}" if shape else f"{value}"
    return f"{value!r}" if isinstance(value, (list, tuple, range)) else f"a {type(value).__name__}"


def require_number(name: str, value: Any, must: str, where: Callable[[np.ndarray], Any] = lambda known: True) -> None:
    """Raise unless `value` is one finite real number, of Python, NumPy or JAX, at which `where` holds.

    In the floating-point type in use, where it must neither overflow nor, if not zero itself, become zero. Of what JAX
    traces only the shape is known.
    """
    known = as_real(value)
    if known is None:
        require(np.shape(value) == (), name, must, kind(value))
        return
    one = known.shape == () and known.dtype != object
    require(one and np.isfinite(known) and where(known), name, must, kind(value))


def require_integer(name: str, value: Any, must: str, least: int | float, most: int | float = np.inf) -> None:
    """Raise unless `value` is a whole number, no truth value, from `least` to `most`."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    require(whole, name, "be an integer", kind(value))
    require(least <= value <= most, name, must, value)


def require_flag(name: str, value: Any) -> None:
    """Raise unless `value` is a truth value: what only counts as one is another argument in its place."""
    require(isinstance(value, (bool, np.bool_)), name, "be True or False", kind(value))


def require_instance(name: str, value: Any, wanted: type, must: str) -> None:
    """Raise unless `value` is an object of that class, which the class itself is not."""
    require(isinstance(value, wanted), name, must, kind(value))


def as_path(name: str, value: Any) -> Path:
    """The path that text or a path-like object stands for; no bytes."""
    must = "be the path of a file or a folder"
    require(isinstance(value, (str, os.PathLike)) and isinstance(os.fspath(value), str), name, must, kind(value))
    return Path(value)


def require_increasing(name: str, values: np.ndarray, most: Any, end: str) -> None:
    """Raise unless these at least two numbers increase from 0 at the least to `most`, called `end`, at the most."""
    for value in values[~np.isfinite(values)][:1]:
        require(False, name, "be finite", value)
    for i in np.flatnonzero(np.diff(values) <= 0)[:1]:
        require(False, name, "increase", f"{values[i + 1]} after {values[i]}")
    require(values[0] >= 0, name, "be at least 0", values[0])
    require(values[-1] <= most, name, f"be at most {end} = {most}", values[-1])


def as_real(value: Any) -> np.ndarray | None:
    """Real numbers as an array of the floating-point type in use; None of what JAX traces, objects of anything else."""
    import jax.numpy as jnp

    nothing = np.empty((), object)
    try:
        if any(concrete(one) is None for one in listed(value)):
            return None
        known = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # ragged lists, and what other libraries raise
        return nothing
    if not (jnp.issubdtype(known.dtype, jnp.integer) or jnp.issubdtype(known.dtype, jnp.floating)):
        return nothing
    with np.errstate(over="ignore", under="ignore"):
        return known.astype(jnp.result_type(float))


def listed(value: Any) -> Iterator[Any]:
    """The items of nested lists and tuples, or the value itself."""
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from listed(one)
    else:
        yield value


def require_choice(name: str, value: Any, choices: Iterable[str], otherwise: str = "") -> None:
    """Raise unless `value` is one of `choices`; the message suggests the nearest one and what else there is."""
    choices = list(choices)
    if isinstance(value, str) and value in choices:
        return
    nearest = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    listed = " or ".join([", ".join(map(repr, choices[:-1])), repr(choices[-1])]) if choices[1:] else repr(choices[0])
    raise InputError(f"{name} must be {listed}{' ' if otherwise else ''}{otherwise}, got {one_line(kind(value))}{hint}")


def concrete(value: Any) -> np.ndarray | None:
    """The value as a NumPy array, for checks; None while JAX traces it, when there is no value to check."""
    from jax.core import Tracer

    return None if isinstance(value, Tracer) else np.asarray(value)

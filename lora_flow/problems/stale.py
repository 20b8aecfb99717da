"""Whether a compiled program can be kept for a problem, and whether the problem is unchanged since."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
import zlib
from collections.abc import Iterator, Mapping, MutableMapping, Set
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer

from lora_flow.checks import InputError, require
from lora_flow.problems.base import Problem, require_problem
from lora_flow.problems.derivatives import probe

PLAIN = (bool, int, float, complex, str, bytes, type(None))  # which are told apart by their value
AS_BEFORE = 1e-5  # of a loss, computed once more
DEEPEST, MOST = 12, 10_000  # what is farther from the problem, or beyond so many things, is not looked at
LIBRARIES = frozenset({"builtins", "abc", "typing", "functools", "jax", "jaxlib", "numpy", "equinox", "jaxtyping"})

Held = dict[str, Any]  # of everything that is held, by its path, what it was


def check_problem(problem: Problem) -> None:
    """Raises unless a compiled program can be kept for the problem and still fits the problem.

    Arrays of a PyTree are inputs of its program. Any other object, a problem or a part of one, is a constant there,
    known by its hash. If its arrays changed, or if another object equalled it, the program would return the old
    numbers. So the arrays and numbers that the object holds are compared with those that it, or an equal object, held
    at first. Later additions, a cache for instance, are no change. The loss is not called, but for a PyTree that holds
    functions of the user's, which may use what cannot be looked into: there it must have the value that it had.
    """
    require_problem(problem)
    leaves = jax.tree.leaves(problem)
    arrays = [leaf for leaf in leaves if eqx.is_array(leaf)]
    opaque = [leaf for leaf in leaves if not eqx.is_array(leaf)]
    try:
        hash(tuple(opaque))
    except TypeError:
        must = "be a PyTree, an equinox.Module for instance, or hashable, like a plain class or @dataclass(eq=False)"
        raise InputError(f"problem must {must}, got an unhashable {type(problem).__name__}") from None
    for part in opaque:
        if isinstance(part, PLAIN):
            continue
        now, seen = held(part), _seen(part)
        if part not in seen:  # by equality, as programs are found
            seen[part] = {path: value for path, value in now.items() if not _yet_to_come(path, value)}
            continue
        changed = next((path for path, was in seen[part].items() if not _same(was, now.get(path))), None)
        must = "not change once it has been solved, nor equal another: make it anew"
        require(changed is None, "problem", must, f"another {(changed or '').lstrip('.') or type(part).__name__}")
    traced = any(isinstance(array, Tracer) for array in arrays)
    for part in opaque:
        if part is not problem and callable(part) and not traced and not _is_known(part):
            _check_loss(problem, arrays, part)


def _check_loss(problem: Problem, arrays: list[Any], function: Any) -> None:
    """Raises where the loss of the same arrays is another than at first, at adapters at which nothing vanishes."""
    told = problem.loss(probe(problem.layers, 1))
    if isinstance(told, Tracer):  # within a program of the user's
        return
    value = float(told)
    which = tuple(map(id, arrays))
    known = {ids: seen for ids, seen in _values.get(function, {}).items() if all(ref() is not None for ref in seen[0])}
    _, was = known.setdefault(which, ([*map(weakref.ref, arrays)], value))
    _values[function] = known
    must = "not change once it has been solved, nor its data: make it anew"
    same = np.isclose(value, was, rtol=AS_BEFORE, atol=0, equal_nan=True)
    require(same, "problem", must, f"a loss of {value:.6g} where it was {was:.6g}")


def _is_known(function: Any) -> bool:
    """Whether a function, or what it is partially applied of, is a library's."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", "")).partition(".")[0] in LIBRARIES


def held(root: Any) -> Held:
    """Everything that an object holds by attributes, containers and closures of functions, by its path.

    Numbers and text stand for themselves, NumPy arrays as shape, type and checksum, JAX arrays, which do not change, as
    they are, and other things as their type. The shortest path to each is found first.
    """
    found: Held = {}
    queue, visited = [("", root, 0)], {id(root)}
    for path, value, depth in queue:  # which grows meanwhile
        found[path] = _token(value)
        if depth == DEEPEST:
            continue
        for name, part in _parts(value):
            if not isinstance(part, (*PLAIN, np.ndarray, np.generic, jax.Array)):
                if id(part) in visited:
                    continue
                visited.add(id(part))
            if len(queue) < MOST:
                queue.append((path + name, part, depth + 1))
    return found


def _token(value: Any) -> Any:
    if isinstance(value, (*PLAIN, np.generic)):
        return type(value), repr(value)  # which NaN equals, too
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return value.shape, repr(value.tolist())
        bits = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data if value.size else b""
        return value.shape, value.dtype.str, zlib.crc32(bits)
    return value if isinstance(value, (jax.Array, Tracer)) else type(value)


def _yet_to_come(path: str, value: Any) -> bool:
    """Whether the value is traced, or the empty place of a cache, `self._x = None`, that a loss may fill."""
    return isinstance(value, Tracer) or (
        path.rpartition(".")[2].startswith("_") and isinstance(value, tuple) and value == _token(None)
    )


def _same(was: Any, now: Any) -> bool:
    """Whether they are the same; of what is traced by now nothing is known."""
    if was is now or isinstance(now, Tracer):
        return True
    if isinstance(was, jax.Array) and isinstance(now, jax.Array):
        if was.shape != now.shape or was.dtype != now.dtype or was.is_deleted() or now.is_deleted():
            return False
        if jax.dtypes.issubdtype(was.dtype, jax.dtypes.prng_key):
            was, now = jax.random.key_data(was), jax.random.key_data(now)
        return np.asarray(was).tobytes() == np.asarray(now).tobytes()
    return not isinstance(was, jax.Array) and not isinstance(now, jax.Array) and bool(was == now)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a thing, each with the end of its path."""
    if isinstance(value, (*PLAIN, np.ndarray, np.generic, jax.Array, Tracer, type, types.ModuleType)):
        return
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in list(value.items()) if isinstance(key, PLAIN))
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif isinstance(value, Set):
        return  # in no order
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
        yield "", value.__func__
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    else:
        yield from _of_object(value)


def _of_object(value: Any) -> Iterator[tuple[str, Any]]:
    if callable(value) and hasattr(value, "__wrapped__"):  # a jitted function, for instance
        yield ".__wrapped__", value.__wrapped__
    kinds = [kind for kind in type(value).__mro__ if kind.__module__.partition(".")[0] not in LIBRARIES]
    if not kinds and type(value).__module__.partition(".")[0] != "equinox":
        return
    yield from ((f".{name}", part) for name, part in list(getattr(value, "__dict__", {}).items()))
    for kind in kinds:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield f".{name}", getattr(value, name)
        for name, part in list(vars(kind).items()):  # what all of a class share, and what its methods use
            part = part.__func__ if isinstance(part, (staticmethod, classmethod)) else part
            part = part.fget if isinstance(part, property) else part
            if isinstance(part, types.FunctionType) or (not name.startswith("__") and _is_data(part)):
                yield f".{kind.__name__}.{name}", part


def _of_function(value: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Its closure, its defaults, and of its module the arrays, numbers and functions that it names."""
    if value.__module__ and value.__module__.partition(".")[0] in LIBRARIES and not value.__closure__:
        return
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        try:
            yield f".{name}", cell.cell_contents
        except ValueError:  # not yet filled
            continue
    yield ".__defaults__", value.__defaults__
    yield ".__kwdefaults__", value.__kwdefaults__
    for name in _names(value.__code__):
        part = value.__globals__.get(name)
        own = isinstance(part, types.FunctionType) and part.__globals__ is value.__globals__
        if own or (name in value.__globals__ and _is_data(part)):
            yield f".{name}", part
    if hasattr(value, "__wrapped__"):
        yield ".__wrapped__", value.__wrapped__


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    inner = (_names(const) for const in code.co_consts if inspect.iscode(const))
    return tuple(dict.fromkeys([*code.co_names, *(name for names in inner for name in names)]))


def _is_data(value: Any) -> bool:
    return isinstance(value, (*PLAIN, np.ndarray, np.generic, jax.Array, list, tuple, dict))


_weak: MutableMapping[Any, Held] = weakref.WeakKeyDictionary()  # as long as a program, which holds them, may be there
_strong: MutableMapping[Any, Held] = {}  # of what takes no weak references

Values = dict[tuple[int, ...], tuple[list[Any], float]]
_values: MutableMapping[Any, Values] = weakref.WeakKeyDictionary()  # of a function with arrays that are still there


def _seen(part: Any) -> MutableMapping[Any, Held]:
    try:
        weakref.ref(part)
    except TypeError:
        return _strong
    return _weak

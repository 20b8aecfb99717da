"""Programs compiled for one shape after another, and forgotten again before they are too many.

On a CPU each takes three of the process's memory maps for every loop that XLA makes, one that solves thousands. Linux
grants 65,530, and ends a process that asks for more. JAX keeps a program for as long as the function that it was made
from: so each is made from a function of its own here, and goes with it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax

from lora_flow.runtime import kept_programs

FEWEST, MOST = 16, 256  # programs that are kept however many maps there are, and at most
SHARE = 0.5  # of the maps that a process may have, beyond which programs are forgotten


class _Program(NamedTuple):
    run: Callable[[list[Any]], Any]
    traced: list[bool]  # holds something where it was traced or read, and so compiled, since it was last looked at


_programs: OrderedDict[Hashable, _Program] = OrderedDict()  # the one last used at the end
_lock = threading.RLock()  # for a destructor, or the equality of a user's object, may solve


def compiled(*, quickly: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`jax.jit` that takes everything but arrays for static, and forgets what was not used for longest.

    Programs of all functions together are at most `MOST`; and no more than `FEWEST` once the process has more than
    `SHARE` of the memory maps that it may have. One that is called again later is compiled again.

    `quickly`: for a program that runs once or twice, on CPU with little optimisation, in less time. `options` are
    XLA's. What has any of these becomes a part of a program that it is traced for, which has its own.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            leaves, structure = jax.tree.flatten(arguments)
            is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
            if is_traced and (quickly or options):
                return function(*arguments)
            arrays, rest = eqx.partition(leaves, eqx.is_array)
            kinds = map(_kind, arrays, rest)
            program = _find((call, is_traced, structure, *kinds), made, is_traced, structure, arrays, rest)
            results = program.run(arrays)
            if program.traced:
                program.traced.clear()
                _make_room()
            return results if is_traced else jax.block_until_ready(results)  # errors come from here, and no later

        def made(is_traced: bool, structure: Any, arrays: list[Any], rest: list[Any]) -> _Program:
            traced: list[bool] = []

            def program(arrays: list[Any]) -> Any:
                traced.append(True)
                return function(*jax.tree.unflatten(structure, eqx.combine(arrays, rest)))

            program.__name__ = function.__name__  # by which JAX's logs and profiles call it
            if is_traced:  # a part of another program takes no options, and what is kept has no derivatives
                return _Program(jax.jit(program), traced)
            how: dict[str, Any] = {"compiler_options": _cheap(quickly) | options}
            file = kept_programs.place(function, structure, arrays, rest)
            if file is None:
                return _Program(jax.jit(program, **how), traced)
            traced.append(True)  # or read, at its first run
            return _Program(kept_programs.Program(file, program, how), traced)

        return call

    return decorate


def _cheap(quickly: bool) -> dict[str, Any]:
    """XLA's options by which programs of many small operations compile faster on a CPU."""
    if jax.default_backend() != "cpu":
        return {}
    return _without_emitters() | ({"xla_backend_optimization_level": 1} if quickly else {})


@functools.cache
def _without_emitters() -> dict[str, Any]:
    """XLA's older way to write fused operations, where this XLA has two: as fast to run, and faster to compile."""
    option = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=option).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return option


def _kind(array: Any, rest: Any) -> Hashable:
    """The part of an argument that its program depends on: an array's shape and type, anything else's value."""
    return (type(rest), rest) if array is None else jax.typeof(array)


def _find(key: Hashable, made: Callable[..., _Program], *how: Any) -> _Program:
    with _lock:
        program = _programs.pop(key, None) or made(*how)
        _programs[key] = program
        return program


def forget() -> None:
    """Forgets every program, and keeps no more: what they compute is another now."""
    kept_programs.stop()
    with _lock:
        _programs.clear()


def _make_room() -> None:
    """Forgets the programs that have been unused for longest, while the programs are too many."""
    with _lock:
        while len(_programs) > MOST or (len(_programs) > FEWEST and _maps() > SHARE * _most_maps()):
            _programs.popitem(last=False)


def _maps() -> int:
    """The memory maps of this process; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    return 0


@functools.cache
def _most_maps() -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    return 65_530

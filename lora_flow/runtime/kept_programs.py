"""Programs as JAX has traced and lowered them, kept from one process to the next.

To trace and lower a sweep's program takes longer than all else that a short command does. JAX keeps only what it makes
of the result, the compiled program. Here the result itself is kept too, as `jax.export` writes it.

A file belongs to a key of all that tracing depends on: this package's source, the versions below, JAX's settings, the
devices, and the static arguments with the shapes and types of the others. So a program that depends on anything that
cannot be told, a function of the user's for instance, is not kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import types
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.export
import numpy as np

from lora_flow.runtime import kept_files

_OURS_AND_JAX = ("lora_flow", "jax", "jaxlib", "jaxtyping", "numpy")
PACKAGES = (*_OURS_AND_JAX, "diffrax", "equinox", "lineax", "optax", "optimistix")
_UNTOLD = ("jax_log", "jax_explain", "jax_compilation_cache", "jax_persistent_cache")  # settings that change no program

_source: list[str] = []  # the digest of this package's source when that began

Arrays = list[Any]


class NotKeptError(Exception):
    """A program depends on something that no key can name."""


def start(folder: Path) -> None:
    """From now on programs are kept in this folder, which need not exist."""
    kept_files.start(folder)
    _source[:] = [_source_digest()]


def stop() -> None:
    """From now on nothing is read or written: what programs compute is no longer what the source says."""
    kept_files.stop()


def is_on() -> bool:
    """Whether programs are kept."""
    return kept_files.folder() is not None


def place(function: Callable[..., Any], structure: Any, arrays: Arrays, rest: list[Any]) -> Path | None:
    """The file of the program of a function of this package, for such arguments; None where it is not kept.

    The arguments are a PyTree's structure, its arrays, whose shapes and types count, and beside them its other leaves.
    """
    folder = kept_files.folder()
    if folder is None or not function.__module__.startswith("lora_flow."):
        return None
    inside = [cell.cell_contents for cell in function.__closure__ or ()]
    types_of = [None if array is None else jax.typeof(array) for array in arrays]
    try:
        told = _told([function.__module__, function.__qualname__, inside, structure, types_of, rest, _surroundings()])
    except NotKeptError:
        return None
    key = hashlib.sha256(f"{_packages()} {told}".encode()).hexdigest()
    return folder / f"{function.__name__}-{key}"


class Program:
    """The program of a file: what is written there, or else what is traced, then written. `how` is for `jax.jit`.

    A program that cannot be written, as one that calls Python, is what `jax.jit` makes of it.
    """

    def __init__(self, file: Path, program: Callable[[Arrays], Any], how: dict[str, Any]):
        self._file, self._program, self._how = file, program, how
        self._run: Callable[[Arrays], Any] | None = None

    def __call__(self, arrays: Arrays) -> Any:
        if self._run is None:
            self._run = self._ready(arrays)
        return self._run(arrays)

    def _ready(self, arrays: Arrays) -> Callable[[Arrays], Any]:
        known = _read(self._file)
        if known is None:
            try:
                known = _exported(self._program, arrays)
            except Exception:  # an error of the program's own comes again from `jax.jit`
                return jax.jit(self._program, **self._how)
            _keep(self._file, *known)
        structure, exported = known

        def run(arrays: Arrays) -> Any:
            return exported.call(arrays)

        run.__name__ = self._program.__name__
        compiled = jax.jit(run, **self._how)
        placed = _anywhere if exported.nr_devices == 1 < jax.device_count() else list
        return lambda arrays: jax.tree.unflatten(structure, placed(compiled(arrays)))


def _anywhere(leaves: Arrays) -> Arrays:
    """Results that go with those of several devices, as `jax.jit`'s do; an exported program's are bound to theirs."""
    return jax.device_put(jax.device_get(leaves))


def _exported(program: Callable[[Arrays], Any], arrays: Arrays) -> tuple[Any, jax.export.Exported]:
    """The structure of the results, and the program that returns their leaves."""
    structures = []

    def flat(arrays: Arrays) -> Arrays:
        leaves, structure = jax.tree.flatten(program(arrays))
        structures.append(structure)
        return leaves

    flat.__name__ = program.__name__
    exported = jax.export.export(jax.jit(flat))(arrays)
    return structures[0], exported


def _keep(file: Path, structure: Any, exported: jax.export.Exported) -> None:
    """Writes a program, if it can be written, and if the source is still that of the key."""
    with contextlib.suppress(NotKeptError, OSError, ImportError, NotImplementedError, ValueError):
        content = json.dumps(_outline(structure)).encode() + b"\n" + exported.serialize(vjp_order=0)
        if [_source_digest()] == _source:
            kept_files.write(file, content)


def _read(file: Path) -> tuple[Any, jax.export.Exported] | None:
    content = kept_files.read(file)
    if content is None:
        return None
    outline, _, program = content.partition(b"\n")
    try:
        _find_lapack()
        return jax.tree.structure(_filled(json.loads(outline))), jax.export.deserialize(bytearray(program))
    except Exception:  # whatever is wrong with it, the program can be made again
        return None


@functools.cache
def _find_lapack() -> None:
    """Older versions of JAX look for LAPACK when they lower a call of it, which a program that is read never does.

    Such a program then ends the process. `jax.export` has looked for LAPACK itself since some version before 0.10.
    """
    if jax.__version_info__ < (0, 10):
        jax.jit(jax.lax.linalg.cholesky).lower(jax.ShapeDtypeStruct((1, 1), np.float32))


def _outline(structure: Any) -> Any:
    """A PyTree's structure for JSON: 0 for a leaf, null for None, and lists that begin with the kind of node."""
    if structure.node_data() is None:
        return 0
    kind, about = structure.node_data()
    parts = [_outline(child) for child in structure.children()]
    if kind is types.NoneType:
        return None
    if kind is dict:
        return dict(zip(about, parts, strict=True))
    if kind in (tuple, list):
        return [kind.__name__, *parts]
    same: Any = jax.tree.structure(_instance(kind, parts))
    if same.node_data() != (kind, about):
        raise NotKeptError(kind)  # it holds more than its children
    return [_name(kind), *parts]


def _filled(outline: Any) -> Any:
    """A PyTree of that structure."""
    if isinstance(outline, dict):
        return {name: _filled(part) for name, part in outline.items()}
    if not isinstance(outline, list):
        return outline
    kind, *parts = outline[0], *map(_filled, outline[1:])
    if kind in ("tuple", "list"):
        return tuple(parts) if kind == "tuple" else parts
    module, _, name = kind.partition(":")
    found: Any = getattr(sys.modules[module], name)
    return _instance(found, parts)


def _instance(kind: Any, parts: list[Any]) -> Any:
    """An object of a class of this package from its children."""
    if issubclass(kind, tuple):
        return kind(*parts)
    made = object.__new__(kind)
    for name, part in zip(kind.__dataclass_fields__, parts, strict=True):
        object.__setattr__(made, name, part)
    return made


_Structure: Any = type(jax.tree.structure(0))


def _told(value: Any) -> Any:
    """The value as text that tells it from others, the same in every process."""
    if value is None or type(value) in (bool, int, float, str):
        return repr(value)
    if type(value) in (list, tuple):
        return [type(value).__name__, *map(_told, value)]
    if isinstance(value, _Structure):
        node: Any = value
        about = node.node_data()
        return "*" if about is None else [*map(_told, about), *map(_told, node.children())]
    if isinstance(value, jax.core.ShapedArray | jax.sharding.PartitionSpec):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, jax.sharding.Mesh):
        return _told([value.axis_names, value.devices.shape, *(device.id for device in value.devices.flat)])
    if isinstance(value, functools.partial):
        return _told(["partial", value.func, value.args, sorted(value.keywords.items())])
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return _name(value)
    leaves, structure = jax.tree.flatten(value)
    if leaves == [value] or any(map(eqx.is_array, leaves)):
        raise NotKeptError(value)
    return _told([structure, leaves])


def _name(value: Any) -> str:
    """The name of a class or function that one of the `PACKAGES`, or Python itself, defines at the top of a module."""
    module, name = value.__module__, value.__qualname__
    if value is types.NoneType:
        return "NoneType"
    known = module.split(".")[0] in (*PACKAGES, "builtins")
    if not known or getattr(sys.modules.get(module), name, None) is not value:
        raise NotKeptError(value)
    return f"{module}:{name}"


def _surroundings() -> list[Any]:
    """JAX's settings and devices, and what equinox reads of the environment."""
    devices = jax.local_devices()
    settings = [(name, str(value)) for name, value in jax.config.values.items() if not name.startswith(_UNTOLD)]
    of_equinox = [one for one in os.environ.items() if one[0].startswith("EQX_")]
    about = [devices[0].platform, devices[0].device_kind, devices[0].client.platform_version, len(devices)]
    return [sorted(settings), sorted(of_equinox), *about, jax.device_count(), sys.version]


def _packages() -> str:
    """The versions of `PACKAGES`, and a digest of this package's source."""
    return " ".join([*map(_version, PACKAGES[1:]), *_source])


def _source_digest() -> str:
    state = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        state.update(f"{file.relative_to(root)} ".encode() + file.read_bytes())
    return state.hexdigest()


@functools.cache
def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"

"""Arrays in `.npz` and `.safetensors` files: what a file declares is checked before anything of that size is read."""

from __future__ import annotations

import json
import math
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_flow.checks import require, require_choice
from lora_flow.runtime.memory import require_memory, size

HEADER = 1 << 16  # bytes of a header, of a handful of arrays
COPIES = 3  # of an array in double precision that making a problem of it takes


def read_arrays(path: Path, names: Sequence[str], otherwise: str = "") -> dict[str, Any]:
    """The arrays in an `.npz` or `.safetensors` file, which may hold these names, each of them once.

    Nothing is unpickled. What the headers declare must fit into the file and into memory, and no more is read.
    The refusal of another name adds `otherwise`.

    **Raises:** `InputError` for names and for too much of it; a `ValueError`, or what the libraries raise, for damage.
    """
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            _check_names(path, [info.filename.removesuffix(".npy") for info in archive.infolist()], names, otherwise)
            for info in members.values():
                with archive.open(info) as member:
                    _check_header(path, info, member)
            _require_memory(path, sum(info.file_size for info in members.values()))
            arrays = {}
            for name in members:
                with archive.open(name) as member:
                    arrays[name.removesuffix(".npy")] = np.lib.format.read_array(member, allow_pickle=False)
            return arrays
    from safetensors.flax import load_file

    whole = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        _sound(length <= min(HEADER, whole - 8), f"'{path}'", f"have a header of at most {HEADER} bytes", length)
        _check_names(path, [name for name, _ in _pairs(file.read(length)) if name != "__metadata__"], names, otherwise)
    _require_memory(path, whole)
    return load_file(path)


def _check_names(path: Path, found: Sequence[str], names: Iterable[str], otherwise: str) -> None:
    for name, count in Counter(found).items():
        require_choice(f"an array in '{path}'", name, names, otherwise)
        require(count == 1, f"'{path}'", f"hold {name} once", f"{count} of that name")


def _pairs(header: bytes) -> list[tuple[str, Any]]:
    """The header's names with what belongs to them, a name that is there twice among them."""
    found = json.loads(header, object_pairs_hook=list)
    return found if isinstance(found, list) else []


def _check_header(path: Path, info: zipfile.ZipInfo, member: Any) -> None:
    """Raises unless the array's shape and type make the size of the member, which the archive bounds."""
    name = f"{info.filename.removesuffix('.npy')} in '{path}'"
    version = np.lib.format.read_magic(member)
    length = int.from_bytes(member.read(2 if version == (1, 0) else 4), "little")
    _sound(length <= HEADER, name, f"have a header of at most {HEADER} bytes", length)
    start = member.tell() - (2 if version == (1, 0) else 4)
    member.seek(start)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    _sound(not dtype.hasobject, name, "hold real numbers", f"entries of type {dtype}")
    declared = math.prod(shape) * dtype.itemsize
    must = f"hold {declared} bytes, as its shape {shape} and its type {dtype} say"
    _sound(info.file_size == member.tell() + declared, name, must, info.file_size - member.tell())
    _require_memory(path, math.prod(shape) * 8)


def _sound(condition: bool, name: str, must: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name} must {must}, got {got}")


def _require_memory(path: Path, count: int) -> None:
    require_memory(f"'{path}'", f"arrays of {size(count)}", COPIES * count)

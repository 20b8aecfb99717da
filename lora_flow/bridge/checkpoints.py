"""The arrays that a checkpoint declares: one safetensors file, or several that an index names."""

from __future__ import annotations

from pathlib import Path

from lora_flow.checks import InputError, require
from lora_flow.storage.tensors import Tensor, open_tensors, read_json

ARRAYS, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_checkpoint(path: Path) -> dict[str, Tensor]:
    """All arrays of a `.safetensors` file, of a folder with `model.safetensors`, or of one with an index.

    Only headers are read; each array is read when its numbers are asked for.

    **Raises:** `InputError` for a file that is missing or not whole, and an index that does not fit its files.
    """
    require(path.exists(), "checkpoint", "exist", f"'{path}'")
    if path.is_dir():
        there = any((path / name).is_file() for name in (ARRAYS, INDEX))
        require(there, "checkpoint", f"be a folder with {ARRAYS} or {INDEX}", f"'{path}'")
        return declared(path)
    if path.name.endswith(".index.json"):
        return _of_index(path)
    require(path.suffix == ".safetensors", "checkpoint", "be a .safetensors file, or a folder of them", f"'{path}'")
    return open_tensors(path).tensors


def declared(folder: Path) -> dict[str, Tensor]:
    """All arrays of a folder's checkpoint, in one file or in those that its index names."""
    if (folder / ARRAYS).is_file():
        return open_tensors(folder / ARRAYS).tensors
    return _of_index(folder / INDEX)


def shards(folder: Path) -> list[str]:
    """The files that the index of a folder's checkpoint names, all of them in the folder."""
    return _shards(folder / INDEX)


def files_of(tensors: dict[str, Tensor]) -> list[Path]:
    """The files that arrays lie in, each of them once."""
    return list(dict.fromkeys(tensor.path for tensor in tensors.values()))


def _of_index(index: Path) -> dict[str, Tensor]:
    folder, found = index.parent, dict[str, Tensor]()
    for shard in _shards(index):
        require((folder / shard).is_file(), str(index), f"name files in '{folder}'", f"'{shard}'")
        found |= open_tensors(folder / shard).tensors
    for name, shard in _weight_map(index).items():
        there = name in found and found[name].path == folder / shard
        require(there, str(index), "name the file of each array", f"{shard} for {name}, which is not in it")
    return found


def _shards(index: Path) -> list[str]:
    named = list(dict.fromkeys(_weight_map(index).values()))
    for name in named:
        plain = Path(name).name == name and name.endswith(".safetensors")
        require(plain, str(index), f"name safetensors files in '{index.parent}'", f"'{name}'")
    return named


def _weight_map(index: Path) -> dict[str, str]:
    listed = read_json(index).get("weight_map")
    if not (isinstance(listed, dict) and listed and all(isinstance(name, str) for name in listed.values())):
        raise InputError(f"{index} must hold a weight_map from arrays to files, got {type(listed).__name__}")
    return listed

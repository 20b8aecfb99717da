"""Safetensors and JSON files of others: nothing is read or allocated beyond the declared and permitted size."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_flow.checks import InputError, require

MOST_JSON = 2**26  # bytes: the index of a checkpoint with hundreds of thousands of arrays
KINDS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
}
"""Safetensors' names of floating-point numbers; others are no weights by themselves."""


class Tensor(NamedTuple):
    """An array in a safetensors file, which is not read yet."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int

    def read(self, kind: Any = None, finite: bool = True) -> np.ndarray:
        """Its numbers, as they are stored or of another floating-point `kind`.

        **Raises:** `InputError` where they are integers or the like, or not `finite`, as they must be unless said.
        """
        where, must = f"{self.name} in {self.path}", "be floating-point, as weights are that were not quantised"
        require(self.kind in KINDS, where, must, self.kind)
        stored = np.dtype(KINDS[self.kind])
        array = np.fromfile(self.path, stored, math.prod(self.shape), offset=self.offset).reshape(self.shape)
        with np.errstate(over="ignore"):
            array = array if kind is None else array.astype(kind)
        lost = int(np.sum(~np.isfinite(array))) if finite else 0
        require(lost == 0, where, f"be finite as {array.dtype}", f"{lost} entries that are not")
        return array


class Contents(NamedTuple):
    """The tensors of a safetensors file, by name, and its metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def open_tensors(path: Path) -> Contents:
    """The tensors that a safetensors file declares; only the header is read, and the file's length must agree with it.

    **Raises:** `InputError` for a file that is not whole.
    """
    try:
        with safe_open(path, framework="numpy") as file:  # checks the header's length, every shape and every offset
            metadata = file.metadata() or {}
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_distinct)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} must be a whole safetensors file, got {error}") from error
    return Contents(
        {
            name: Tensor(path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        },
        metadata,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    **Raises:** `InputError` for anything else, for a name that is given twice, or for a file of more than 64 MiB.
    """
    size = path.stat().st_size
    require(size <= MOST_JSON, str(path), f"be at most {MOST_JSON} bytes long", size)
    try:
        read = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be a JSON file, got {error}") from error
    require(isinstance(read, dict), str(path), "hold a JSON object", type(read).__name__)
    return read


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number, and one that a double holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} twice")
        found[name] = value
    return found

"""IDX and CIFAR-10 files, read with every length checked."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from lora_flow.checks import InputError, require

_RECORD = 1 + 3 * 32 * 32  # bytes of one CIFAR-10 image with its label


def read_idx(path: Path, rank: int) -> np.ndarray:
    """The uint8 array of that many dimensions in an IDX file, plain or gzipped.

    **Raises:** `InputError` where the file is anything else, is empty, or is not exactly as long as its header says.
    """
    content, header = _content(path), 4 + 4 * rank
    magic, start = bytes([0, 0, 8, rank]), content[:4]
    require(start == magic, f"'{path}'", f"begin with the bytes {magic.hex(' ')}", start.hex(" ") or "an empty file")
    require(len(content) >= header, f"'{path}'", f"hold a header of {header} bytes", f"{len(content)} bytes in all")
    shape = struct.unpack(f">{rank}I", content[4:header])
    size = header + math.prod(shape)
    require(len(content) == size, f"'{path}'", f"hold {size} bytes for its shape {shape}", len(content))
    require(size > header, f"'{path}'", "hold at least one item", f"the shape {shape}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images `(count, 32, 32, 3)` and labels `(count,)`, both uint8, of a file of CIFAR-10's binary version.

    **Raises:** `InputError` where the file cannot be read, is empty, or does not end with a whole record.
    """
    content = _content(path)
    whole = len(content) > 0 and len(content) % _RECORD == 0
    require(whole, f"'{path}'", f"hold one or more records of {_RECORD} bytes", f"{len(content)} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def _content(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"'{path}' must be a readable file, got {error}") from error

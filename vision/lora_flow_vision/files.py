"""IDX and CIFAR-10 files, plain, gzipped or in an archive; of none is more read than it declares and may hold."""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import struct
import tarfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from lora_flow.checks import InputError, require
from lora_flow.runtime.memory import require_memory

_RECORD = 1 + 3 * 32 * 32  # bytes of one CIFAR-10 image with its label
_MOST_RECORDS = 60_000  # in one file: all of the data set
_DENSEST = 1032  # bytes that deflate can make of one


class Stored(NamedTuple):
    """A file: its path, and its content where that has been read already."""

    path: Path
    content: bytes | None = None

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.content is None else len(self.content)


def read_idx(stored: Stored, rank: int) -> np.ndarray:
    """The uint8 array of that many dimensions in an IDX file, plain or gzipped.

    **Raises:** `InputError` where the file is anything else, is empty, or is not exactly as long as its header says.
    """
    path, header = stored.path, 4 + 4 * rank
    with _opened(stored) as file:
        start = file.read(header)
        magic = bytes([0, 0, 8, rank])
        got = start[:4].hex(" ") or "an empty file"
        require(start[:4] == magic, f"'{path}'", f"begin with the bytes {magic.hex(' ')}", got)
        require(len(start) == header, f"'{path}'", f"hold a header of {header} bytes", f"{len(start)} bytes in all")
        shape = struct.unpack(f">{rank}I", start[4:])
        size = math.prod(shape)
        must = f"hold {header + size} bytes for its shape {shape}"
        gzipped = path.suffix == ".gz"
        most = stored.size * (_DENSEST if gzipped else 1)
        require(header + size <= most, f"'{path}'", must, f"at most {most}" if gzipped else most)
        require_memory(f"'{path}'", f"the shape {shape}", 4.0 * size)
        content = file.read(size + 1)
        require(len(content) == size, f"'{path}'", must, header + len(content) if gzipped else stored.size)
        require(size > 0, f"'{path}'", "hold at least one item", f"the shape {shape}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_cifar(stored: Stored) -> tuple[np.ndarray, np.ndarray]:
    """The images `(count, 32, 32, 3)` and labels `(count,)`, both uint8, of a file of CIFAR-10's binary version.

    **Raises:** `InputError` where the file cannot be read, is empty or too long, or does not end with a whole record.
    """
    with _opened(stored) as file:
        content = file.read(_MOST_RECORDS * _RECORD + 1)
    must = f"hold at most {_MOST_RECORDS} records of {_RECORD} bytes"
    require(len(content) <= _MOST_RECORDS * _RECORD, f"'{stored.path}'", must, "more")
    whole = len(content) > 0 and len(content) % _RECORD == 0
    require(whole, f"'{stored.path}'", f"hold one or more records of {_RECORD} bytes", f"{len(content)} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def unpack(archive: Stored, names: Collection[str]) -> dict[str, Stored]:
    """The archive's files of those names, wherever in the archive they lie, and nothing else.

    **Raises:** `InputError` where the archive cannot be read, lacks one, has one twice, or one is too long.
    """
    found: dict[str, Stored] = {}
    with _opened(archive, zipped=False) as file, tarfile.open(fileobj=file, mode="r|gz") as members:
        for member in members:
            name = Path(member.name).name
            if name in names and member.isfile():
                path = archive.path / name
                require(name not in found, f"'{archive.path}'", f"hold one file {name}", "two")
                most = _MOST_RECORDS * _RECORD
                require(member.size <= most, f"'{path}'", f"be at most {most} bytes long", member.size)
                content = members.extractfile(member)
                found[name] = Stored(path, b"" if content is None else content.read(most))
    missing = next((name for name in names if name not in found), "")
    require(not missing, f"'{archive.path}'", f"hold {', '.join(names)}", f"no {missing}")
    return found


@contextlib.contextmanager
def _opened(stored: Stored, zipped: bool = True) -> Iterator[IO[bytes]]:
    """The file's content, unzipped where its name says so; what reading it raises becomes one line."""
    try:
        with io.BytesIO(stored.content) if stored.content is not None else stored.path.open("rb") as file:
            gzipped = zipped and stored.path.suffix == ".gz"
            yield gzip.GzipFile(fileobj=file) if gzipped else file  # type: ignore[misc]
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise InputError(f"'{stored.path}' must be a readable file, got {error}") from error

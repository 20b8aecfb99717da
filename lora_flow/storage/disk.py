"""The free room on a disk, and one line for results that do not fit, before anything is written."""

from __future__ import annotations

import contextlib
import shutil

from lora_flow.checks import require
from lora_flow.runtime.memory import size
from lora_flow.storage.remote import RemotePath, RunPath


def used(path: RunPath) -> int:
    """The bytes on the disk of the files in a folder; 0 where there is none, and for one in an object store."""
    if isinstance(path, RemotePath):
        return 0
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(OSError):  # replaced meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total


def require_room(path: RunPath, needed: int | float, asked: str = "") -> None:
    """Raises unless the disk that `path` is or will be on has room for so many bytes of results, and some more.

    `asked` says what asks for most of them. An object store has room for anything.
    """
    if isinstance(path, RemotePath):
        return
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    of = f" ({asked})" if asked else ""
    require(free > 1.2 * needed + 2**20, "out", f"have room for {size(needed)} of results{of}", f"{size(free)} free")

"""Files of a cache folder, which one process makes and later ones read.

A file is read where it belongs to this user, nobody else may write it, and it has the digest that it begins with. Any
other file, and a folder that may not be written, makes no difference but that of time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from pathlib import Path

MOST = 256  # files that a folder keeps, the newest
_READING = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # waits at no pipe

_folder: list[Path] = []  # one, while files are kept


def start(folder: Path) -> None:
    """From now on files are kept in this folder, which need not exist."""
    _folder[:] = [folder]


def stop() -> None:
    """From now on nothing is read or written."""
    _folder.clear()


def folder() -> Path | None:
    """Where files are kept, or None."""
    return _folder[0] if _folder else None


def read(file: Path) -> bytes | None:
    """The content of a file, None where there is none that can be trusted."""
    try:
        with open(os.open(file, _READING), "rb") as opened:
            if not _is_own(os.fstat(opened.fileno())):
                return None
            digest, content = opened.read(32), opened.read()
    except OSError:
        return None
    if digest != _digest(file, content):
        return None
    with contextlib.suppress(OSError):  # in a folder that may only be read
        os.utime(file)  # the newest are kept
    return content


def write(file: Path, content: bytes) -> None:
    """In one step, so that other processes find a whole file or none. Raises `OSError` where that cannot be."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=file.parent)
    try:
        with open(number, "wb") as opened:
            opened.write(_digest(file, content) + content)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
    newest = sorted(file.parent.iterdir(), key=lambda one: one.stat().st_mtime, reverse=True)
    for old in newest[MOST:]:
        old.unlink()


def _digest(file: Path, content: bytes) -> bytes:
    return hashlib.sha256(file.name.encode() + content).digest()


def _is_own(status: os.stat_result) -> bool:
    """Whether it is a file, this user's, and no other can have written it."""
    if not stat.S_ISREG(status.st_mode):
        return False
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)

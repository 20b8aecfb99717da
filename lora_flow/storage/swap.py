"""Files and groups of entries that are replaced whole.

New entries are made beside the old ones, under a name that only this module gives, and take their place once they are
whole. If anything goes wrong before the very last step (an exception, a full disk, `kill -9`), the old entries are put
back, at once or when the folder is locked next. Other names are never touched. In an object store, which puts whole
objects and renames none, `staged` does the same.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from lora_flow.checks import InputError, require
from lora_flow.storage.remote import Place, RemotePath, RunPath, below
from lora_flow.storage.staged import finish, replacing_objects

LOCK = ".lora-flow.lock"
PARTIAL, OLD, GONE = "partial", "old", "gone"
_GENERATED = re.compile(rf".+\.[0-9a-f]{{32}}\.({PARTIAL}|{OLD}|{GONE})", re.DOTALL)
_NAMES = "names.json"  # in a folder of old entries: which there were, and which take their places


def is_generated(name: str) -> bool:
    """Whether this module gave an entry its name; `results.zarr.bak` is somebody's own."""
    return is_lock(name) or _GENERATED.fullmatch(name) is not None


def is_lock(name: str) -> bool:
    return name.startswith(LOCK)


def write_atomically(path: RunPath, content: str | bytes) -> None:
    """Writes a file in one step: the old content stays until the new is on the disk."""
    with appearing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def appearing(path: RunPath) -> Iterator[IO[bytes]]:
    """A file to write to, which takes its place at `path` when the block ends, and vanishes when the block fails."""
    if isinstance(path, RemotePath):
        content = io.BytesIO()
        yield content
        path.write_bytes(content.getvalue())
        return
    partial = _beside(path, PARTIAL)
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == str(partial):
            error.filename = str(path)  # a name that people know
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def copy_file(file: Path, to: RunPath) -> None:
    """Has a place hold what a file on this disk does."""
    if isinstance(to, RemotePath):
        to.write_bytes(file)
    else:
        shutil.copyfile(file, to)


def sync(files: Iterable[RunPath]) -> None:
    """Waits until these files, and that they are there, are on the disk. Objects are once they are put."""
    listed = [file for file in files if isinstance(file, Path)]
    for path in [*listed, *dict.fromkeys(file.parent for file in listed)]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def replacing(folder: Place, gone: Iterable[str] = (), within: Sequence[str] = ()) -> Iterator[Place]:
    """An empty folder beside `folder`, whose entries take their places there at the end; all of them, or none.

    `gone` names entries, paths below `folder`, that are removed with the old ones and not replaced. In the folders
    `within`, which exist, the entries are replaced, not the folders. Hold the folder's lock.
    """
    if isinstance(folder, RemotePath):
        journal = _beside(folder / "run", OLD)
        with replacing_objects(folder, journal, journal.with_suffix(f".{PARTIAL}"), gone, within) as staged:
            yield staged
        return
    old = _beside(folder / "run", OLD)
    new = old.with_suffix(f".{PARTIAL}")
    try:
        for name in ("", *within):
            (new / name).mkdir()
        yield new
        made = [below(new, entry) for name in ("", *within) for entry in (new / name).iterdir()]
        _swap(folder, old, new, sorted(set(made) - set(within)), gone)
    except BaseException:
        with contextlib.suppress(OSError):  # or else when the folder is locked next
            _put_back(folder, old)
        raise
    finally:
        _remove(new)
        _remove(old.with_suffix(f".{GONE}"))


def is_replaced(folder: RunPath) -> bool:
    """Whether entries of a folder are about to be replaced, by a process that is alive or was killed at it."""
    try:
        return bool(replaced_in(folder))
    except OSError:  # nobody can tell
        return False


def replaced_in(folder: RunPath) -> list[RunPath]:
    """The place where old entries are set aside: in the folder, or beside it for one of several that go together."""
    found: list[RunPath] = [folder] if _sets_aside(folder) else []
    with contextlib.suppress(OSError):  # one may be allowed into a folder, and not to list what lies beside it
        found += [folder.absolute().parent] if _sets_aside(folder.absolute().parent) else []
    return found


def _sets_aside(folder: RunPath) -> bool:
    entries = folder.iterdir() if folder.is_dir() else ()
    return any(is_generated(entry.name) and entry.suffix == f".{OLD}" for entry in entries)


def settle(folder: RunPath) -> None:
    """Puts back the entries that were about to be replaced, then removes the rest under names of this module.

    Of objects that were about to be replaced, the new ones take their places.
    """
    for entry in _generated(folder):
        if isinstance(entry, RemotePath):
            if entry.suffix == f".{OLD}":
                finish(entry.parent, entry, entry.with_suffix(f".{PARTIAL}"), _read_names(entry))
        elif entry.suffix == f".{OLD}" and entry.is_dir() and not entry.is_symlink():
            first = entry.with_suffix("").with_suffix("")
            if first.name != "run" and not os.path.lexists(first):  # earlier versions moved one entry at a time
                entry.rename(first)
            else:
                _put_back(entry.parent, entry)
    for entry in _generated(folder):
        if not is_lock(entry.name):
            _remove(entry)


def _generated(folder: RunPath) -> list[RunPath]:
    return [entry for entry in folder.iterdir() if is_generated(entry.name)]


def _beside(path: Place, kind: str) -> Place:
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.{kind}")


def _swap(folder: Path, old: Path, new: Path, names: Sequence[str], gone: Iterable[str]) -> None:
    there = [name for name in dict.fromkeys((*names, *gone)) if os.path.lexists(folder / name)]
    old.mkdir()
    write_atomically(old / _NAMES, json.dumps({"old": there, "new": names}))
    for number, name in enumerate(there):
        (folder / name).rename(old / str(number))
    for name in names:
        (new / name).rename(folder / name)
    old.rename(old.with_suffix(f".{GONE}"))  # the one step after which the new entries stay


def _put_back(folder: Path, old: Path) -> None:
    """Undoes an unfinished swap. May itself be cut short and be called again."""
    if not (old / _NAMES).is_file():  # nothing was moved yet
        _remove(old)
        return
    names = _read_names(old / _NAMES)
    for number, name in enumerate(names["new"]):
        stays = name in names["old"] and not os.path.lexists(old / str(names["old"].index(name)))
        if os.path.lexists(folder / name) and not stays:
            (folder / name).rename(old / f"new-{number}")
    for number, name in enumerate(names["old"]):
        if os.path.lexists(old / str(number)):
            (old / str(number)).rename(folder / name)
    gone = old.with_suffix(f".{GONE}")
    old.rename(gone)
    _remove(gone)


def _read_names(path: RunPath) -> dict[str, list[str]]:
    try:
        names = json.loads(path.read_bytes())
        listed = [*map(Path, names["old"]), *map(Path, names["new"])]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"'{path}' must name what stands beside it, got {error}; move it back by hand") from error
    inside = not any(one.is_absolute() or ".." in one.parts for one in listed)
    require(inside, f"'{path}'", "name entries of its own folder", ", ".join(map(str, listed)))
    return names


def _remove(path: RunPath) -> None:
    """Removes a file, a link itself, or a folder of ours; what cannot be removed is left for the next time."""
    with contextlib.suppress(OSError):
        if isinstance(path, RemotePath):
            path.remove()
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

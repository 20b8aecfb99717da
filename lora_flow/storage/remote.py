"""Paths in an object store, such as s3://bucket/runs/x, with what runs need of `pathlib`. Needs the extra `remote`.

A put makes an object appear whole, for every reader at once, and stays. There are no folders: one is there as long as
an object's name begins with it. Nothing can be renamed or locked; `staged` and `leases` do without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fnmatch
import functools
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias, TypeVar

from lora_flow.checks import InputError, as_path, require

SCHEMES = ("s3", "gs")
RETRY: Any = {"max_retries": 10, "retry_timeout": datetime.timedelta(seconds=60)}  # of a request that was not answered
AT_ONCE = 16  # requests
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<rest>.*)", re.DOTALL)  # C:/ is a drive


class Stat(NamedTuple):
    """An object's bytes, the time of its last write, and what another object in its place has otherwise."""

    st_size: int
    st_mtime: float
    st_ino: str


@dataclasses.dataclass(frozen=True, order=True)
class RemotePath:
    """An object, or a folder of objects, in a bucket such as s3://name; the methods are those of `pathlib.Path`.

    **Raises:** `OSError` where the store refuses or does not answer.
    """

    bucket: str
    key: PurePosixPath
    listed: Any = dataclasses.field(default=None, compare=False, repr=False)  # what a list has told of the object

    def __str__(self) -> str:
        return f"{self.bucket}/{self._key}".rstrip("/")

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.bucket, self.key / name)

    @property
    def _key(self) -> str:
        return "" if self.key == PurePosixPath() else str(self.key)

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def suffix(self) -> str:
        return self.key.suffix

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.bucket, self.key.parent)

    def with_name(self, name: str) -> RemotePath:
        return RemotePath(self.bucket, self.key.with_name(name))

    def with_suffix(self, suffix: str) -> RemotePath:
        return RemotePath(self.bucket, self.key.with_suffix(suffix))

    def absolute(self) -> RemotePath:
        return self

    def resolve(self) -> RemotePath:
        return self

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        try:
            return self.listed is not None or bool(self.stat())
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        return self.listed is None and any(True for _ in self.rglob("*"))

    def stat(self) -> Stat:
        import obstore

        with self._asked():
            found = self.listed or obstore.head(self.store, self._key or "/")
        return Stat(found["size"], found["last_modified"].timestamp(), f"{found['e_tag']} {found['last_modified']}")

    def iterdir(self) -> Iterator[RemotePath]:
        import obstore

        with self._asked():
            found = obstore.list_with_delimiter(self.store, self._key)
        for prefix in found["common_prefixes"]:
            yield RemotePath(self.bucket, PurePosixPath(prefix))
        for one in found["objects"]:
            yield RemotePath(self.bucket, PurePosixPath(one["path"]), one)

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """The objects below this folder."""
        import obstore

        with self._asked():
            for some in obstore.list(self.store, self._key, chunk_size=1000):
                for one in some:
                    path = RemotePath(self.bucket, PurePosixPath(one["path"]), one)
                    if fnmatch.fnmatchcase(path.name, pattern):
                        yield path

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        first, _, rest = pattern.partition("/")
        if not re.search(r"[*?[]", first):
            found = iter([self / first] if rest or (self / first).exists() else [])
        else:
            found = (one for one in self.iterdir() if fnmatch.fnmatchcase(one.name, first))
        for one in found:
            yield from one.glob(rest) if rest else [one]

    def read_bytes(self) -> bytes:
        import obstore

        with self._asked():
            return bytes(obstore.get(self.store, self._key).bytes())

    def open(self, mode: str = "rb") -> io.BytesIO:
        """The content, to be read."""
        return io.BytesIO(self.read_bytes())

    def write_bytes(self, content: bytes | Path) -> None:
        """Puts the content, or that of a file."""
        import obstore

        with self._asked():
            obstore.put(self.store, self._key, content)

    def write_text(self, content: str) -> None:
        self.write_bytes(content.encode())

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there with the first object in it."""

    def unlink(self, missing_ok: bool = False) -> None:
        import obstore

        with self._asked(), contextlib.suppress(*[FileNotFoundError] * missing_ok):
            obstore.delete(self.store, self._key)

    def remove(self, keep: Iterable[RemotePath] = ()) -> None:
        """Removes an object, or all objects of a folder but some."""
        import obstore

        kept = set(keep)
        gone = [one._key for one in self.objects() if one not in kept]
        with self._asked():
            obstore.delete(self.store, gone)

    def objects(self) -> list[RemotePath]:
        """All objects of a folder, or the object itself; none where nothing is there."""
        return list(self.rglob("*")) or ([self] if self.is_file() else [])

    @property
    def store(self) -> Any:
        """The bucket, as obstore has it."""
        return _store(self.bucket)

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        """Within, what the store refuses is an `OSError`, with the path."""
        from obstore import exceptions

        refused = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self)) from error
        except exceptions.BaseError as error:
            number = errno.EACCES if isinstance(error, refused) else errno.EIO
            raise OSError(number, first_line(error), str(self)) from error


RunPath: TypeAlias = Path | RemotePath
"""Where a run lies: on a disk or in an object store."""

Place = TypeVar("Place", Path, RemotePath, RunPath)
Asked = TypeVar("Asked")
Got = TypeVar("Got")


def run_path(name: str, path: str | os.PathLike[str] | RemotePath) -> RunPath:
    """The place of a run, or of anything in one, that a path or a URL names.

    **Raises:** `InputError` for a URL of another kind, and where the extra `remote` is not installed.
    """
    if isinstance(path, RemotePath):
        return path
    local = as_path(name, path)
    url = _URL.match(os.fspath(path))
    if url is None:
        return local
    scheme, (bucket, _, key) = url["scheme"].lower(), url["rest"].removeprefix("/").partition("/")
    known = scheme in SCHEMES and url["rest"].startswith("/") and bucket
    require(known, name, f"be a path or a URL such as s3://bucket/x ({', '.join(SCHEMES)})", repr(path))
    parts = PurePosixPath(key.strip("/"))
    require(".." not in parts.parts, name, "be a URL without ..", repr(path))
    try:
        import obstore  # noqa: F401
    except ImportError as error:
        require(False, name, f"be a path: {scheme}:// needs obstore (pip install 'lora-flow[remote]')", error)
    return RemotePath(f"{scheme}://{bucket}", parts)


def local_path(name: str, path: str) -> Path:
    """The path of a folder for what is stored on disks only.

    **Raises:** `InputError` for a URL.
    """
    found = run_path(name, path)
    if isinstance(found, RemotePath):
        raise InputError(f"{name} must be a folder on a disk for this command, got '{found}'")
    return found


def below(folder: RunPath, path: RunPath) -> str:
    """The name of what is in a folder, or further below, as it is from there."""
    return str(path).replace(os.sep, "/").removeprefix(f"{folder}/".replace(os.sep, "/"))


def zarr_store(path: RunPath) -> Any:
    """What Zarr and xarray take for a group at this place."""
    if isinstance(path, Path):
        return path
    from zarr.storage import ObjectStore

    return ObjectStore(_store(str(path)))


def contents(folder: RunPath, names: Iterable[str]) -> dict[str, bytes]:
    """The contents of the files of these names below a folder, of those that are there; of objects several at once."""

    def one(name: str) -> tuple[str, bytes | None]:
        try:
            return name, (folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return name, None

    found = map(one, names) if isinstance(folder, Path) else _several(one, names)
    return {name: content for name, content in found if content is not None}


def copy(pairs: Iterable[tuple[RemotePath, RemotePath]]) -> None:
    """Copies objects to other places of their bucket; the store does so itself, and nothing comes here."""
    import obstore

    def one(pair: tuple[RemotePath, RemotePath]) -> None:
        with pair[0]._asked():
            obstore.copy(pair[0].store, pair[0]._key, pair[1]._key)

    _several(one, pairs)


@contextlib.contextmanager
def made_here(path: RunPath) -> Iterator[Path]:
    """The path, or one on this disk whose files are put at `path` when the block ends, several at once."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder, path.name)
        yield here
        files = [file for file in here.rglob("*") if file.is_file()]
        _several(lambda file: (path / below(here, file)).write_bytes(file), files)


@contextlib.contextmanager
def as_file(path: RunPath) -> Iterator[Path]:
    """A file on this disk with the same name and content, within the context."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, path.name)
        file.write_bytes(path.read_bytes())
        yield file


def is_of_store(error: Exception) -> bool:
    """Whether an object store has refused, or has not answered, what Zarr asked of it."""
    return type(error).__module__.partition(".")[0] == "obstore"


def first_line(error: Exception) -> str:
    """What a store says; further lines are for the developers of its client."""
    return str(error).partition("\n")[0]


def _several(request: Callable[[Asked], Got], items: Iterable[Asked]) -> list[Got]:
    """What requests give, several of them at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(request, items))


@functools.lru_cache(maxsize=64)
def _store(url: str) -> Any:
    from obstore.store import from_url

    return from_url(url, retry_config=RETRY, client_options={"allow_http": True})  # of an endpoint that is asked for

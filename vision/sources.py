"""Where the datasets' files come from: a folder, a package of the system, or a download held to its checksum."""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO, NamedTuple
from urllib.error import HTTPError

from tqdm.auto import tqdm

from lora_flow.checks import InputError, require


class Source(NamedTuple):
    """A dataset's classes, the files of its two splits, and for each file the URL and MD5 of the download with it."""

    classes: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    downloads: dict[str, tuple[str, str]]


def _idx_source(base: str, classes: Sequence[str], checksums: Sequence[str]) -> Source:
    train, test = ((f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in ("train", "t10k"))
    downloads = {file: (f"{base}{file}.gz", md5) for file, md5 in zip(train + test, checksums, strict=True)}
    return Source(tuple(classes), train, test, downloads)


def _cifar_source(url: str, classes: Sequence[str], md5: str) -> Source:
    train, test = tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)
    return Source(tuple(classes), train, test, dict.fromkeys(train + test, (url, md5)))


SOURCES = {
    "mnist": _idx_source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "0123456789",
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion-mnist": _idx_source(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "cifar10": _cifar_source(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        "c32a1d4ab5d03f1284b67883e8d87530",
    ),
}
INSTALLED = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}  # by Debian's dataset-fashion-mnist
_CIFAR_FOLDER = "cifar-10-batches-bin"
_ADVICE = "try again, or give --data-dir with a folder that holds the files"


def locate(name: str, folder: str | Path | None = None) -> dict[str, Path]:
    """Where each file of the dataset is: in the folder, or without one in the usual places, downloaded if need be.

    **Raises:** `InputError` where the folder lacks a file, or a download fails.
    """
    if folder is None:
        return _locate_by_itself(name)
    place = Path(folder).expanduser()
    require(place.is_dir(), "data_dir", "be a folder that exists", f"'{place}'")
    found, missing = _search(name, place)
    hint = "put it there, plain or gzipped, or name no folder to have it downloaded"
    require(not missing, f"'{place}'", f"hold the files of {name}", f"no '{''.join(missing[:1])}'; {hint}")
    return found


def fetch(url: str, path: Path, md5: str) -> None:
    """Download `url` to `path`, which appears only once it is whole and its MD5 checksum is right.

    **Raises:** `InputError` where it cannot be downloaded or its checksum is another.
    """
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with _appearing(path) as file, urllib.request.urlopen(url, timeout=60) as reply:
            length = int(reply.headers.get("Content-Length", 0)) or None
            with tqdm(total=length, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while block := reply.read(2**20):
                    digest.update(block)
                    file.write(block)
                    bar.update(len(block))
            found = digest.hexdigest()
            require(found == md5, url, f"have the MD5 checksum {md5}", f"{found}; {_ADVICE}")
    except (OSError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection open
        raise InputError(f"'{path}' must be downloaded from {url}, got {error}; {_ADVICE}") from error


def unpack(archive: Path, names: Collection[str], folder: Path) -> None:
    """Write the archive's files of those names into the folder, wherever in the archive they lie, and nothing else.

    **Raises:** `InputError` where the archive cannot be read.
    """
    try:
        with tarfile.open(archive) as members:
            for member in members:
                name = Path(member.name).name
                content = members.extractfile(member) if name in names and member.isfile() else None
                if content is not None:
                    with _appearing(folder / name) as file:
                        file.write(content.read())
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise InputError(f"'{archive}' must be a readable archive, got {error}") from error


def _locate_by_itself(name: str) -> dict[str, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_flow" / "data" / name
    for place in (INSTALLED.get(name, cache), cache):
        found, missing = _search(name, place)
        if not missing:
            return found
    for url, md5 in dict.fromkeys(SOURCES[name].downloads[file] for file in missing):
        path = cache / url.rsplit("/", 1)[1]
        fetch(url, path, md5)
        if path.name.endswith(".tar.gz"):
            unpack(path, SOURCES[name].downloads, cache / _CIFAR_FOLDER)
            path.unlink()
    return locate(name, cache)


def _search(name: str, folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The dataset's files in the folder, under any of the names they go by, and those that are not there."""
    files, found = [*SOURCES[name].downloads], {}
    for file in files:
        names = [variant + end for variant in (file, file.replace("-idx", ".idx")) for end in ("", ".gz")]
        paths = [folder / inner / one for inner in ("", _CIFAR_FOLDER) for one in names]
        if path := next((path for path in paths if path.is_file()), None):
            found[file] = path
    return found, [file for file in files if file not in found]


@contextmanager
def _appearing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes its place at `path` when the block ends, and vanishes when the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as scratch:
        part = Path(scratch) / path.name
        with part.open("wb") as file:
            yield file
        part.replace(path)

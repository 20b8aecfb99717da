"""The sources of the datasets' files: a folder, a package of the system, or a download checked by its checksum."""

from __future__ import annotations

import hashlib
import os
import sys
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError

from lora_flow.checks import InputError, require
from lora_flow.runtime.progress import Progress
from lora_flow.storage.locks import locked
from lora_flow.storage.swap import appearing
from lora_flow_vision import looks
from lora_flow_vision.files import Stored, unpack


class Download(NamedTuple):
    """A file on the web: its address, its length in bytes, and its SHA-256 checksum."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


class Source(NamedTuple):
    """A dataset's classes, the files of its two splits, and for each file the download that holds it."""

    classes: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    downloads: dict[str, Download]


def _idx_source(base: str, classes: Sequence[str], files: Sequence[tuple[int, str]]) -> Source:
    train, test = ((f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in ("train", "t10k"))
    downloads = {name: Download(f"{base}{name}.gz", *file) for name, file in zip(train + test, files, strict=True)}
    return Source(tuple(classes), train, test, downloads)


def _cifar_source(classes: Sequence[str], archive: Download) -> Source:
    train, test = tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)
    return Source(tuple(classes), train, test, dict.fromkeys(train + test, archive))


# sizes and checksums as in TensorFlow Datasets' url_checksums
SOURCES = {
    "mnist": _idx_source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "0123456789",
        (
            (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        ),
    ),
    "fashion-mnist": _idx_source(
        "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        (
            (26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        ),
    ),
    "cifar10": _cifar_source(
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        Download(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            170052171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
}
INSTALLED = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}  # by Debian's dataset-fashion-mnist
INNER = {  # folders within the one that is given: those of archives, and torchvision's
    "mnist": ("", "MNIST/raw", "raw"),
    "fashion-mnist": ("", "FashionMNIST/raw", "raw"),
    "cifar10": ("", "cifar-10-batches-bin"),
}
SCHEMES = ("https://",)
_OTHERS = 3600.0  # seconds to wait for another process that downloads
_ADVICE = "try again, or give --data-dir with a folder that holds the files"


def locate(name: str, folder: str | Path | None = None) -> dict[str, Stored]:
    """Each file of the dataset: in the folder, or without one in the usual places, downloaded if need be.

    **Raises:** `InputError` where the folder lacks a file, or a download fails.
    """
    if folder is None:
        installed = _search(name, INSTALLED[name])[0] if name in INSTALLED else {}
        return installed or _cached(name)
    place = Path(folder).expanduser()
    require(place.is_dir(), "data_dir", "be a folder that exists", f"'{place}'")
    found, missing = _search(name, place)
    hint = "put it there, plain or gzipped, or name no folder to have it downloaded"
    if missing:
        got = looks.no_dataset(place) or f"no '{missing}'; {hint}"
        raise InputError(f"'{place}' must hold the files of {name}, got {got}")
    return found


def fetch(download: Download, path: Path) -> None:
    """Downloads to `path`, which appears only once it is whole, of the length and the SHA-256 checksum that are known.

    **Raises:** `InputError` where it cannot be downloaded by https or is another file.
    """
    url, digest, length = download.url, hashlib.sha256(), 0
    _require_secure(url)
    opener = urllib.request.build_opener(_SecureRedirects)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as file, opener.open(url, timeout=60) as reply:
            told = reply.headers.get("Content-Length") or str(download.size)
            require(told == str(download.size), url, f"be {download.size} bytes long", f"{told}; {_ADVICE}")
            with Progress(download.size, "bytes", what=path.name) as bar:
                while block := reply.read(min(2**20, download.size - length + 1)):
                    length += len(block)
                    require(length <= download.size, url, f"be {download.size} bytes long", f"more; {_ADVICE}")
                    digest.update(block)
                    file.write(block)
                    bar.update(len(block))
            _require_same(url, download, length, digest.hexdigest())
    except (OSError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection open
        raise InputError(f"'{path}' must be downloaded from {url}, got {error}; {_ADVICE}") from error


def _cached(name: str) -> dict[str, Stored]:
    """The files out of the cache, where the downloads are kept as they came; verified each time, fetched if need be.

    One process at a time fetches: another waits for the files, and then reads them.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_flow" / "data" / name
    found: dict[str, Stored] = {}
    for download in dict.fromkeys(SOURCES[name].downloads.values()):
        path = cache / download.name
        content, _ = _verified(path, download)
        if content is None:
            with locked(cache, patience=_OTHERS):  # which removes what is left of a download that was cut short
                content, damaged = _verified(path, download)
                if content is None:
                    if damaged:
                        print(f"lora-flow: {damaged}; it is downloaded again", file=sys.stderr)
                    fetch(download, path)
                    content, _ = _verified(path, download)
        names = [file for file, where in SOURCES[name].downloads.items() if where == download]
        if content is None:
            raise InputError(f"'{path}' must keep what was downloaded, got something else")
        if path.name.endswith(".tar.gz"):
            found |= unpack(Stored(path, content), names)
        else:
            found[names[0]] = Stored(path, content)
    return found


def _verified(path: Path, download: Download) -> tuple[bytes | None, str]:
    """The content of a file if it is that of the download; None where it is not there, or damaged, and then how."""
    if not path.is_file():
        return None, ""
    with path.open("rb") as file:
        content = file.read(download.size + 1)
    try:
        _require_same(f"'{path}'", download, len(content), hashlib.sha256(content).hexdigest())
    except InputError as error:
        return None, str(error)
    return content, ""


def _require_same(name: str, download: Download, length: int, sha256: str) -> None:
    got = f"{length} bytes" if length != download.size else f"{sha256}; {_ADVICE}"
    must = f"have {download.size} bytes with the SHA-256 checksum {download.sha256}"
    require((length, sha256) == (download.size, download.sha256), name, must, got)


def _require_secure(url: str) -> None:
    require(url.startswith(SCHEMES), "a download", f"be by {' or '.join(SCHEMES)}", url)


class _SecureRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a server's redirections only to addresses as safe as the one that was asked for."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        if not newurl.startswith(SCHEMES):
            fp.close()  # it holds the connection open
        _require_secure(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _search(name: str, folder: Path) -> tuple[dict[str, Stored], str]:
    """The dataset's files in the folder, all from one place under any of their names, or the first that is missing."""
    files, missing = [*SOURCES[name].downloads], ""
    for inner in INNER[name]:
        found = {}
        for file in files:
            names = [variant + end for variant in (file, file.replace("-idx", ".idx")) for end in ("", ".gz")]
            there = [path for one in names if (path := folder / inner / one).is_file()]
            if there:
                found[file] = Stored(there[0])
        if len(found) == len(files):
            return found, ""
        if found or not missing:
            missing = next(file for file in files if file not in found)
    archive = folder / SOURCES[name].downloads[files[0]].name
    if archive.name.endswith(".tar.gz") and archive.is_file():
        return unpack(Stored(archive), files), ""
    return {}, missing

"""Where the files of images are found, and how they are downloaded."""

import contextlib
import hashlib
import http.server
import io
import shutil
import subprocess
import sys
import tarfile
import textwrap
import threading
import time

import numpy as np
import pytest
from image_files import CIFAR, IDX, assert_is, cifar_records, drawn, idx, write_idx
from lora_flow_vision import sources
from lora_flow_vision.data import DATASETS, load_dataset
from lora_flow_vision.sources import Download, fetch

from lora_flow import InputError
from lora_flow.storage.locks import locked
from lora_flow.storage.swap import LOCK, is_generated


@pytest.mark.skipif(not sources.INSTALLED["fashion-mnist"].is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_the_installed_fashion_mnist_is_found_and_whole():
    """60000 and 10000 images of 28 x 28, each class equally often (Xiao et al. 2017)."""
    dataset = load_dataset("fashion-mnist")
    for split, each in ((dataset.train, 6000), (dataset.test, 1000)):
        assert split.images.shape == (10 * each, 28, 28, 1)
        np.testing.assert_array_equal(np.bincount(split.labels), each)


def test_a_given_folder_is_never_filled_by_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "fetch", lambda *_: pytest.fail("downloads"))
    write_idx(tmp_path)
    (tmp_path / IDX[3]).unlink()
    with pytest.raises(InputError, match=f"'{tmp_path}' must hold the files of mnist, got no '{IDX[3]}'; put it there"):
        load_dataset("mnist", tmp_path)
    with pytest.raises(InputError, match=f"data_dir must be a folder that exists, got '{tmp_path}/none'"):
        load_dataset("cifar10", tmp_path / "none")
    with pytest.raises(InputError, match=r"dataset must be 'digits', .*, got 'minst' \(did you mean 'mnist'"):
        load_dataset("minst", tmp_path)


def write_elsewhere(folder, name):
    """A small dataset where torchvision puts it."""
    return write_idx(folder / {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name] / "raw")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("above", [True, False])
def test_files_are_found_where_torchvision_puts_them(tmp_path, monkeypatch, name, above):
    images, labels, *_ = write_elsewhere(tmp_path, name)
    (inner,) = tmp_path.iterdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_is(load_dataset(name, "~" if above else inner).train, images[..., None], labels)
    other = {"mnist": "fashion-mnist", "fashion-mnist": "mnist"}[name]
    with pytest.raises(InputError, match=f"must hold the files of {other}, got no 'train-images-idx3-ubyte'"):
        load_dataset(other, tmp_path)


def test_files_of_one_dataset_come_from_one_place(tmp_path):
    images, labels, *_ = write_elsewhere(tmp_path, "mnist")
    (tmp_path / IDX[0]).write_bytes(idx(drawn(7, 5, 4, seed=9)[0]))  # of another, without its labels
    assert_is(load_dataset("mnist", tmp_path).train, images[..., None], labels)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist.NPZ", "'mnist.NPZ', arrays as Keras keeps them; write its images and labels as IDX files"),
        ("train_images.npy", "'train_images.npy', an array of NumPy's; write its images and labels as IDX files"),
        (
            "cifar-10-batches-py",
            "'cifar-10-batches-py', which is pickled; take the binary version, cifar",
        ),
        ("cifar-10-python.tar.gz", "'cifar-10-python.tar.gz', which is pickled; take the binary version"),
        ("train-00000-of-00001.parquet", "'train-00000-of-00001.parquet', a table as Hugging Face keeps data sets"),
        ("training.pt", "'training.pt', pickled tensors; write"),
        ("0001.PNG", "'0001.PNG', a picture by itself"),
        ("fashion-mnist_train.csv", "'fashion-mnist_train.csv', a table of text"),
    ],
)
def test_what_is_laid_out_otherwise_is_refused_by_what_it_looks_like(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"")
    for dataset in ("mnist", "cifar10"):
        with pytest.raises(InputError, match=f"'{tmp_path}' must hold the files of {dataset}, got {message}"):
            load_dataset(dataset, tmp_path)


@contextlib.contextmanager
def served(pages):
    """The address of a local server that gives these pages, bytes or an address that it redirects to."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            page = pages.get(self.path.lstrip("/"))
            self.send_response(404 if page is None else 302 if isinstance(page, str) else 200)
            if isinstance(page, str):
                self.send_header("Location", page)
            elif page is not None and not self.path.startswith("/untold"):
                self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            with contextlib.suppress(OSError):  # who has seen enough hangs up
                self.wfile.write(page if isinstance(page, bytes) else b"")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def sha(content):
    return hashlib.sha256(content).hexdigest()


def test_a_download_appears_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    content = np.random.default_rng(0).bytes(2**20 + 5)
    size, path, good = len(content), tmp_path / "new" / "file.gz", sha(content)
    half, long, other = content[: size // 2], content + b"x" * 2**20, content[:-1] + b"x"
    pages = {"whole": content, "half": half, "long": long, "untold-half": half, "untold-long": long, "other": other}
    monkeypatch.setattr(sources, "SCHEMES", ("https://", "http://"))
    with served(pages | {"moved": "/whole", "away": "ftp://127.0.0.1/whole"}) as address:
        for page, message in (
            (
                "other",
                f"/other must have {size} bytes with the SHA-256 checksum {good}, got {sha(other)}; ",
            ),
            ("half", f"/half must be {size} bytes long, got {size // 2}; .*--data-dir"),
            ("long", f"/long must be {size} bytes long, got {size + 2**20}; .*--data-dir"),
            ("untold-half", f"/untold-half must have {size} bytes with .*, got {size // 2} bytes"),
            ("untold-long", f"/untold-long must be {size} bytes long, got more; .*--data-dir"),
            ("none", f"file.gz' must be downloaded from {address}/none, got HTTP Error 404: .*--data-dir"),
            ("away", "a download must be by https:// or http://, got ftp://127.0.0.1/whole"),
        ):
            with pytest.raises(InputError, match=message) as caught:
                fetch(Download(f"{address}/{page}", size, good), path)
            assert "\n" not in str(caught.value)
            assert list(path.parent.iterdir()) == []
        fetch(Download(f"{address}/moved", size, good), path)
        assert path.read_bytes() == content
        assert list(path.parent.iterdir()) == [path]
        assert "\r" not in capsys.readouterr().err  # progress is told in lines where there is no terminal
        monkeypatch.undo()
        with pytest.raises(InputError, match=f"a download must be by https://, got {address}/whole"):
            fetch(Download(f"{address}/whole", size, good), tmp_path / "another")
    monkeypatch.setattr(sources, "SCHEMES", ("http://",))
    with pytest.raises(InputError, match=r"must be downloaded from .*refused.*--data-dir"):
        fetch(Download(f"{address}/whole", size, good), tmp_path / "another")  # the server is gone


def test_a_server_cannot_lead_from_https_to_http():
    request = sources.urllib.request.Request("https://host/file")
    follow = sources._SecureRedirects().redirect_request
    assert (
        follow(request, io.BytesIO(), 302, "Found", {}, "https://elsewhere/file").full_url == "https://elsewhere/file"
    )
    with pytest.raises(InputError, match="a download must be by https://, got http://elsewhere/file"):
        follow(request, io.BytesIO(), 302, "Found", {}, "http://elsewhere/file")


def offer(monkeypatch, tmp_path, name, downloads):
    """Have the dataset's files come from `downloads`, file by file, into a cache of the test's own."""
    contents = {file: path.read_bytes() for file, path in downloads.items()}
    offered = {
        file: Download(path.as_uri(), len(contents[file]), sha(contents[file])) for file, path in downloads.items()
    }
    monkeypatch.setitem(sources.SOURCES, name, sources.SOURCES[name]._replace(downloads=offered))
    monkeypatch.setattr(sources, "INSTALLED", {})
    monkeypatch.setattr(sources, "SCHEMES", ("file://",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lora_flow" / "data" / name


def offered(name):
    return sources.SOURCES[name].downloads.values()


def test_missing_idx_files_are_downloaded_once_and_verified_each_time(tmp_path, monkeypatch, capsys):
    images, labels, *_ = write_idx(tmp_path / "web")
    cache = offer(monkeypatch, tmp_path, "mnist", {file: tmp_path / "web" / file for file in IDX})
    cache.mkdir(parents=True)
    shutil.copy(tmp_path / "web" / IDX[0], cache / IDX[0])  # there already
    asked = []
    monkeypatch.setattr(sources, "fetch", lambda download, path: asked.append(download.name) or fetch(download, path))
    assert_is(load_dataset("mnist").train, images[..., None], labels)
    assert sorted(path.name for path in cache.iterdir()) == sorted(IDX)
    assert asked == list(IDX[1:])
    assert_is(load_dataset("mnist").train, images[..., None], labels)
    assert asked == list(IDX[1:])
    whole = (cache / IDX[0]).read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1], whole + b"x", b""):
        capsys.readouterr()
        (cache / IDX[0]).write_bytes(damaged)  # a wrong pixel, which nothing else would show
        assert_is(load_dataset("mnist").train, images[..., None], labels)
        assert (cache / IDX[0]).read_bytes() == whole
        assert f"{IDX[0]}' must have {len(whole)} bytes with the SHA-256 checksum" in capsys.readouterr().err
    (tmp_path / "web" / IDX[0]).unlink()
    (cache / IDX[0]).write_bytes(damaged)
    with pytest.raises(InputError, match=f"{IDX[0]}' must be downloaded from .*, got"):
        load_dataset("mnist")


def test_what_a_killed_download_left_goes_and_what_people_keep_there_stays(tmp_path, monkeypatch):
    write_idx(tmp_path / "web")
    cache = offer(monkeypatch, tmp_path, "mnist", {file: tmp_path / "web" / file for file in IDX})
    script = f"""
        import os
        from pathlib import Path
        from lora_flow.runtime.progress import Progress
        from lora_flow_vision import sources
        Progress.update = lambda *_: os._exit(1)
        sources.SCHEMES = ("file://",)
        sources.SOURCES["mnist"] = sources.SOURCES["mnist"]._replace(downloads=dict(zip(
            {IDX!r}, [sources.Download(*one) for one in {[tuple(one) for one in offered("mnist")]!r}])))
        sources.locate("mnist")
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, check=False)
    assert (killed.returncode, killed.stderr) == (1, b"")
    (left,) = [path.name for path in cache.iterdir() if path.name != LOCK]
    assert left.startswith(IDX[0])
    assert is_generated(left)
    (cache / f"{IDX[0]}.bak").write_bytes(b"mine")
    load_dataset("mnist")
    assert sorted(path.name for path in cache.iterdir()) == sorted([*IDX, f"{IDX[0]}.bak"])


def test_two_that_need_a_file_download_it_once(tmp_path, monkeypatch):
    """The second waits for the first, also longer than for a lock that is only looked at."""
    images, labels, *_ = write_idx(tmp_path / "web")
    offer(monkeypatch, tmp_path, "mnist", {file: tmp_path / "web" / file for file in IDX})
    asked, found = [], []

    def slowly(download, path):
        asked.append(download.name)
        time.sleep(0.15)
        fetch(download, path)

    monkeypatch.setattr(sources, "fetch", slowly)
    both = [threading.Thread(target=lambda: found.append(load_dataset("mnist").train)) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert sorted(asked) == sorted(IDX)
    for one in found:
        assert_is(one, images[..., None], labels)
    monkeypatch.setattr(sources, "_OTHERS", 0.1)
    (tmp_path / "cache" / "lora_flow" / "data" / "mnist" / IDX[0]).unlink()
    with (
        locked(tmp_path / "cache" / "lora_flow" / "data" / "mnist"),
        pytest.raises(InputError, match="one process at a time, got one that process"),
    ):
        load_dataset("mnist")


def write_archive(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_from_the_cifar_archive_only_the_batches_are_taken(tmp_path, monkeypatch):
    archive = tmp_path / "web" / "cifar-10-binary.tar.gz"
    archive.parent.mkdir()
    written = [cifar_records(2 + i, seed=i) for i in range(6)]
    batches = [(f"cifar-10-batches-bin/{name}", content) for name, (_, _, content) in zip(CIFAR, written, strict=True)]
    write_archive(archive, [("../outside.bin", b"x"), ("cifar-10-batches-bin/readme.html", b"x"), *batches])
    cache = offer(monkeypatch, tmp_path, "cifar10", dict.fromkeys(CIFAR, archive))
    assert_is(load_dataset("cifar10").test, *written[5][:2])
    assert_is(load_dataset("cifar10", archive.parent).test, *written[5][:2])
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == ["cifar-10-binary.tar.gz"] * 2
    assert [path.name for path in cache.iterdir()] == ["cifar-10-binary.tar.gz"]
    for members, message in (
        (batches[1:], "must hold data_batch_1.bin, .*, got no data_batch_1.bin$"),
        ([*batches, ("other/data_batch_1.bin", b"x")], "must hold one file data_batch_1.bin, got two$"),
        ([("data_batch_1.bin", bytes(10**6))], "data_batch_1.bin' must be at most 184380 bytes long, got 1000000"),
    ):
        monkeypatch.setattr("lora_flow_vision.files._MOST_RECORDS", 60)
        write_archive(archive, members)
        with pytest.raises(InputError, match=message):
            load_dataset("cifar10", archive.parent)
    write_archive(archive, batches)
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cifar-10-binary.tar.gz' must be a readable file, got "):
        load_dataset("cifar10", archive.parent)


def test_every_download_has_a_length_a_sha256_and_comes_by_https():
    assert DATASETS == ("digits", "mnist", "fashion-mnist", "cifar10")
    for source in sources.SOURCES.values():
        assert list(source.downloads) == [*source.train, *source.test]
        for url, size, sha256 in source.downloads.values():
            assert url.startswith("https://")
            assert len(bytes.fromhex(sha256)) == 32
            assert size > 4000

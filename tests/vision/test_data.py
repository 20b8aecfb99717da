"""Files that the tests write are read back exactly, each kind of damage is named, and batches use all samples alike."""

import contextlib
import gzip
import hashlib
import http.server
import io
import shutil
import struct
import subprocess
import sys
import tarfile
import textwrap
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_flow_vision import data, sources
from lora_flow_vision.data import DATASETS, epochs, load_dataset, prepare
from lora_flow_vision.sources import Download, fetch
from sklearn.datasets import load_digits

from lora_flow import InputError
from lora_flow.storage.locks import locked
from lora_flow.storage.swap import LOCK, is_generated

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")


def idx(array):
    """The format's own words: two zero bytes, the type, the number of dimensions, big-endian sizes, the bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def drawn(count, *shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), np.uint8), rng.integers(0, 10, count, np.uint8)


def write_idx(folder, **replaced):
    """A small dataset in four files; `replaced` gives other bytes to a file, by its name's first two words."""
    (images, labels), (test_images, test_labels) = drawn(7, 5, 4), drawn(3, 5, 4, seed=1)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(IDX, (images, labels, test_images, test_labels), strict=True):
        (folder / name).write_bytes(replaced.get("_".join(name.split("-")[:2]), idx(array)))
    return images, labels, test_images, test_labels


def cifar_records(count, seed):
    images, labels = drawn(count, 32, 32, 3, seed=seed)
    planes = [bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(images, labels, strict=True)]
    return images, labels, b"".join(planes)


def write_cifar(folder):
    folder.mkdir(parents=True, exist_ok=True)
    written = [cifar_records(2 + i, seed=i) for i in range(6)]
    for name, (_, _, content) in zip(CIFAR, written, strict=True):
        (folder / name).write_bytes(content)
    return written


def assert_is(split, images, labels):
    assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(split.images, images)
    np.testing.assert_array_equal(split.labels, labels)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_back_plain_or_gzipped_and_under_both_their_names(tmp_path, name, separator, zipped):
    images, labels, test_images, test_labels = write_idx(tmp_path)
    for file in IDX:
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).unlink()
        path = tmp_path / (file.replace("-idx", f"{separator}idx") + (".gz" if zipped else ""))
        path.write_bytes(gzip.compress(content) if zipped else content)
    dataset = load_dataset(name, tmp_path)
    assert dataset.name == name
    assert len(dataset.classes) == len(set(dataset.classes)) == 10
    assert_is(dataset.train, images[..., None], labels)
    assert_is(dataset.test, test_images[..., None], test_labels)


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_cifar_files_are_read_back_in_order_with_the_channels_last(tmp_path, inner):
    written = write_cifar(tmp_path / inner)
    dataset = load_dataset("cifar10", str(tmp_path))
    images, labels = (np.concatenate(parts) for parts in list(zip(*written[:5], strict=True))[:2])
    assert_is(dataset.train, images, labels)
    assert_is(dataset.test, *written[5][:2])
    assert dataset.classes[6] == "frog"


def test_the_digits_are_all_there_once_split_with_their_strata():
    dataset = load_dataset("digits")
    pixels, digit = load_digits(return_X_y=True)
    train, test = dataset.train, dataset.test
    assert train.images.shape == (1347, 8, 8, 1)
    assert test.images.shape == (450, 8, 8, 1)
    assert train.images.dtype == test.images.dtype == np.float32
    both, labels = np.concatenate([train.images, test.images]), np.concatenate([train.labels, test.labels])
    samples = {(*row, label) for row, label in zip(both.reshape(-1, 64) * 16, labels, strict=True)}
    assert samples == {(*row, label) for row, label in zip(pixels, digit, strict=True)}
    # each class has its share of the 450, to within one image
    share = np.bincount(digit) * 450 / len(digit)
    assert np.all(np.abs(np.bincount(test.labels) - share) < 1)
    np.testing.assert_array_equal(load_dataset("digits").test.labels, test.labels)


@pytest.mark.skipif(not sources.INSTALLED["fashion-mnist"].is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_the_installed_fashion_mnist_is_found_and_whole():
    """60000 and 10000 images of 28 x 28, each class equally often (Xiao et al. 2017)."""
    dataset = load_dataset("fashion-mnist")
    for split, each in ((dataset.train, 6000), (dataset.test, 1000)):
        assert split.images.shape == (10 * each, 28, 28, 1)
        np.testing.assert_array_equal(np.bincount(split.labels), each)


IMAGES, LABELS = drawn(7, 5, 4)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"train_images": idx(IMAGES)[:-1]}, r"train-images.* must hold 156 bytes for its shape \(7, 5, 4\), got 155$"),
        ({"train_images": idx(IMAGES) + b"x"}, r"train-images.* must hold 156 bytes .*, got 157$"),
        ({"train_images": idx(IMAGES)[:9]}, r"train-images.* must hold a header of 16 bytes, got 9 bytes in all$"),
        ({"train_images": idx(LABELS)}, "train-images.* must begin with the bytes 00 00 08 03, got 00 00 08 01$"),
        ({"t10k_labels": b"not IDX"}, "t10k-labels.* must begin with the bytes 00 00 08 01, got 6e 6f 74 20$"),
        ({"t10k_labels": b""}, "t10k-labels.* must begin with the bytes 00 00 08 01, got an empty file$"),
        ({"train_labels": idx(LABELS[:6])}, "train-labels.* must hold one label for each of the 7 images .*, got 6$"),
        ({"train_labels": idx(LABELS + 10)}, r"train-labels.* must hold labels below 10, got 1\d$"),
        ({"train_images": idx(IMAGES[:0])}, r"train-images.* must hold at least one item, got the shape \(0, 5, 4\)$"),
        (
            {"t10k_images": idx(drawn(3, 4, 4)[0])},
            r"t10k-images.* must hold images of shape \(5, 4, 1\), got \(4, 4, 1",
        ),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, replaced, message):
    write_idx(tmp_path, **replaced)
    with pytest.raises(InputError, match=message) as caught:
        load_dataset("mnist", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-9],
        lambda whole: whole[:30],
        lambda whole: whole + b"x",
        lambda whole: whole[:10] + b"\xff" * 9 + whole[19:],
        lambda whole: b"plain",
    ],
)
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    write_idx(tmp_path)
    path = tmp_path / IDX[0]
    (tmp_path / f"{IDX[0]}.gz").write_bytes(damage(gzip.compress(path.read_bytes())))
    path.unlink()
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz' must be a readable file, got "):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: whole[:-1], "data_batch_3.* must hold one or more records of 3073 bytes, got 12291 bytes$"),
        (lambda whole: b"", "data_batch_3.* must hold one or more records of 3073 bytes, got 0 bytes$"),
        (lambda whole: b"\x0a" + whole[1:], "data_batch_3.* must hold labels below 10, got 10$"),
    ],
)
def test_a_damaged_cifar_file_is_named(tmp_path, damage, message):
    write_cifar(tmp_path)
    path = tmp_path / CIFAR[2]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        load_dataset("cifar10", tmp_path)


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


def test_nothing_is_made_room_for_that_a_file_cannot_hold(tmp_path, monkeypatch):
    """A header of 12 GB in a file of 20 bytes, and zeros without end that were zipped to little."""
    said = struct.pack(">HBB3I", 0, 8, 3, 2**24, 28, 28)
    write_idx(tmp_path, train_images=said + bytes(4))
    with pytest.raises(InputError, match=r"must hold 13153337360 bytes for its shape \(16777216, 28, 28\), got 20$"):
        load_dataset("mnist", tmp_path)
    (tmp_path / IDX[0]).rename(tmp_path / f"{IDX[0]}.gz")
    (tmp_path / f"{IDX[0]}.gz").write_bytes(gzip.compress(said + bytes(10**6)))
    with pytest.raises(InputError, match=r"must hold 13153337360 bytes for its shape .*, got at most \d{7}$"):
        load_dataset("mnist", tmp_path)
    monkeypatch.setattr("lora_flow.runtime.memory.free", lambda: 100.0)
    (tmp_path / f"{IDX[0]}.gz").write_bytes(gzip.compress(idx(IMAGES)))
    with pytest.raises(
        InputError, match=r"train-images-idx3-ubyte.gz' must be small enough for the 100 bytes of memory"
    ):
        load_dataset("mnist", tmp_path)
    write_cifar(tmp_path)
    (tmp_path / CIFAR[0]).unlink()
    monkeypatch.setattr("lora_flow_vision.files._MOST_RECORDS", 60)
    (tmp_path / f"{CIFAR[0]}.gz").write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(InputError, match=r"data_batch_1.bin.gz' must hold at most 60 records of 3073 bytes, got more$"):
        load_dataset("cifar10", tmp_path)


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


@pytest.mark.parametrize("size", [3, 8, 13])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("given_channels", [1, 3])
def test_constant_images_stay_constant(size, channels, given_channels):
    images = np.broadcast_to(np.array([0, 51, 255], np.uint8)[:, None, None, None], (3, 8, 6, given_channels))
    prepared = prepare(images, size, channels, mean=0.2, std=0.5)
    assert prepared.dtype == np.float32
    expected = np.broadcast_to(np.array([-0.4, 0.0, 1.6])[:, None, None, None], (3, size, size, channels))
    np.testing.assert_allclose(prepared, expected, atol=2e-6)


def test_enlarging_by_a_whole_factor_keeps_each_images_mean():
    """Each old pixel's bilinear weights then add up to the factor squared, at the borders too."""
    images, _ = drawn(4, 6, 6, 3)
    prepared = prepare(images, 18, 3, mean=0.0, std=1.0)
    np.testing.assert_allclose(prepared.mean(axis=(1, 2)), images.mean(axis=(1, 2)) / 255, rtol=1e-5)


def test_resizing_is_linear_interpolation_between_the_centres_of_pixels():
    images = np.array([0, 51, 204], np.uint8).reshape(1, 1, 3, 1)
    row = prepare(images, 6, 1, mean=0.0, std=1.0)[0, 2, :, 0]
    np.testing.assert_allclose(row, np.interp((np.arange(6) + 0.5) / 2 - 0.5, np.arange(3), [0, 0.2, 0.8]), atol=1e-6)


def test_at_their_own_size_images_are_only_scaled_and_normalised_by_channel():
    images, _ = drawn(5, 4, 4, 3)
    mean, std = np.array([0.1, 0.5, 0.9]), np.array([0.5, 1.0, 2.0])
    np.testing.assert_allclose(prepare(images, 4, 3, mean, std), (images / 255 - mean) / std, atol=1e-6)
    np.testing.assert_array_equal(
        prepare((images / 255).astype(np.float32), 4, 3, mean, std), prepare(images, 4, 3, mean, std)
    )
    grey = prepare(images, 4, 1, mean=0.0, std=1.0)
    np.testing.assert_allclose(grey[..., 0], images @ [0.299, 0.587, 0.114] / 255, atol=1e-6)
    np.testing.assert_array_equal(
        prepare(images[..., :1], 4, 3, mean=0.0, std=1.0), np.repeat(images[..., :1] / np.float32(255), 3, axis=-1)
    )


@pytest.mark.parametrize("count", [1, 4, 5])
def test_images_are_prepared_alike_in_chunks_and_at_once(monkeypatch, count):
    images, _ = drawn(count, 5, 7, 3)
    at_once = prepare(images, 6, 3, mean=0.3, std=0.2)
    monkeypatch.setattr(data, "_CHUNK", 2 * 3 * 7**2)  # two images at a time
    np.testing.assert_allclose(prepare(images, 6, 3, mean=0.3, std=0.2), at_once, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": IMAGES}, r"images must have the shape \(count, height, width, 1 or 3\) .*, got \(7, 5, 4\)"),
        ({"images": IMAGES[:0, ..., None]}, r"images must .* not be empty, got \(0, 5, 4, 1\)"),
        ({"images": np.zeros((1, 2, 2, 2), np.uint8)}, r"images must have the shape .*, got \(1, 2, 2, 2\)"),
        ({"images": np.zeros((1, 2, 2, 1))}, "images must be uint8 or float32, got float64"),
        ({"images": np.full((1, 2, 2, 1), 16, np.float32)}, r"images must lie in 0\.\.1 where .*, got 16\.0\.\.16\.0"),
        ({"images": np.full((1, 2, 2, 1), np.nan, np.float32)}, r"images must lie in 0\.\.1 where .*, got nan"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"mean": (0.1, 0.2)}, r"mean must be a finite number, or 3 of them, got \(0\.1, 0\.2\)"),
        ({"mean": float("nan")}, "mean must be a finite number, or 3 of them, got nan"),
        ({"std": (1.0, 1.0, 0.0)}, r"std must be positive, got \(1\.0, 1\.0, 0\.0\)"),
    ],
)
def test_bad_arguments_of_prepare_are_named(changed, message):
    arguments = {"images": IMAGES[..., None], "size": 4, "channels": 3, "mean": 0.5, "std": 0.5}
    with pytest.raises(InputError, match=message):
        prepare(**(arguments | changed))


RUNS = {"seed": st.integers(0, 1000), "count": st.integers(1, 40), "batch_size": st.integers(1, 50)}


@settings(max_examples=50, deadline=None)
@given(**RUNS, steps=st.integers(0, 30))
def test_every_epoch_uses_every_index_once(seed, count, batch_size, steps):
    batches = epochs(seed, count, batch_size, steps)
    assert batches.shape == (steps, batch_size)
    assert batches.dtype == np.int32
    run = batches.ravel()
    whole = len(run) // count * count
    np.testing.assert_array_equal(
        np.sort(run[:whole].reshape(-1, count)), np.tile(np.arange(count), (whole // count, 1))
    )
    last = run[whole:]
    assert len(set(last)) == len(last)
    assert np.all((last >= 0) & (last < count))


@settings(max_examples=50, deadline=None)
@given(**RUNS, steps=st.integers(0, 15), more=st.integers(0, 15))
def test_a_longer_run_begins_with_a_shorter_one(seed, count, batch_size, steps, more):
    longer = epochs(seed, count, batch_size, steps + more)
    np.testing.assert_array_equal(longer[:steps], epochs(seed, count, batch_size, steps))


def test_epochs_and_seeds_have_orders_of_their_own():
    """Of 60! permutations, two drawn at random are never the same."""
    orders = [*epochs(0, 60, 60, 3), *epochs(1, 60, 60, 3), np.arange(60)]
    assert len({tuple(order) for order in orders}) == 7


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
    ],
)
def test_bad_arguments_of_epochs_are_named(changed, message):
    with pytest.raises(InputError, match=message):
        epochs(**({"seed": 0, "count": 5, "batch_size": 2, "steps": 3} | changed))

"""IDX and CIFAR-10 files: read back, and named where they are damaged."""

import gzip
import struct

import numpy as np
import pytest
from image_files import CIFAR, IDX, IMAGES, LABELS, assert_is, cifar_records, drawn, idx, write_idx
from lora_flow_vision.data import load_dataset

from lora_flow import InputError


def write_cifar(folder):
    folder.mkdir(parents=True, exist_ok=True)
    written = [cifar_records(2 + i, seed=i) for i in range(6)]
    for name, (_, _, content) in zip(CIFAR, written, strict=True):
        (folder / name).write_bytes(content)
    return written


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

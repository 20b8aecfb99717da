"""Small datasets of images, in files as MNIST and CIFAR-10 come."""

import struct

import numpy as np

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


def assert_is(split, images, labels):
    assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(split.images, images)
    np.testing.assert_array_equal(split.labels, labels)


IMAGES, LABELS = drawn(7, 5, 4)

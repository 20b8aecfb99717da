"""Labelled images: four small datasets, made ready for a network and cut into minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from lora_flow.arrays import numbers
from lora_flow.checks import require, require_choice
from lora_flow_vision.files import Stored, read_cifar, read_idx
from lora_flow_vision.settings import DATA as DATASETS
from lora_flow_vision.sources import SOURCES, locate

_CHUNK = 2**24  # numbers resized at a time: 64 MiB in, and as much out
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


class Split(NamedTuple):
    """`images`, uint8 in 0..255 or float32 in 0..1, `(count, height, width, channels)`; `labels`, int32 `(count,)`."""

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """Two splits of labelled images; the label i means `classes[i]`."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]


def load_dataset(name: str, folder: str | Path | None = None) -> Dataset:
    """One of `DATASETS`, from the files in `folder`, each of them plain or gzipped, or CIFAR-10's in their archive.

    The files lie in the folder itself or where torchvision puts them, as in `MNIST/raw`. Without a folder, they are
    those that Debian's dataset-fashion-mnist has installed, or those in `~/.cache/lora_flow/data/<name>`
    (`$XDG_CACHE_HOME` in place of `~/.cache` where it is set), downloaded if they are not there, and held to their
    SHA-256 checksums at each use. With a folder nothing is downloaded. The digits come with scikit-learn and need no
    folder: 1347 images to train with and 450 to test with, the classes in proportion.

    **Raises:** `InputError` where a file is missing, damaged or cannot be downloaded.
    """
    require_choice("dataset", name, DATASETS)
    if name == "digits":
        return _digits()
    source, files = SOURCES[name], locate(name, folder)
    read = _cifar_split if name == "cifar10" else _idx_split
    train, test = (read([files[one] for one in split], len(source.classes)) for split in (source.train, source.test))
    shape, first = train.images.shape[1:], files[source.test[0]].path
    require(test.images.shape[1:] == shape, f"'{first}'", f"hold images of shape {shape}", test.images.shape[1:])
    return Dataset(name, train, test, source.classes)


def prepare(
    images: np.ndarray, size: int, channels: int, mean: float | Sequence[float], std: float | Sequence[float]
) -> np.ndarray:
    """The images as a network takes them: `(x - mean) / std`, float32, `(count, size, size, channels)`.

    Here x are the images scaled to 0..1, grey repeated to three channels or colours weighted to their luma (ITU-R
    BT.601), and resized bilinearly. `mean` and `std` are one number or one for each channel.

    **Raises:** `InputError` where an argument is out of its range.
    """
    images = np.asarray(numbers("images", images))
    _require_images(images)
    require(size >= 1, "size", "be at least 1", size)
    require(channels in (1, 3), "channels", "be 1 or 3", channels)
    shift, scale = _per_channel("mean", mean, channels), _per_channel("std", std, channels)
    require(np.all(scale > 0), "std", "be positive", std)

    prepared = np.empty((len(images), size, size, channels), np.float32)
    step = max(1, _CHUNK // (3 * max(size, *images.shape[1:3]) ** 2))
    for start in range(0, len(images), step):
        x = images[start : start + step]
        x = x.astype(np.float32) / np.float32(255 if x.dtype == np.uint8 else 1)
        if channels < x.shape[-1]:
            x = x @ _LUMA[:, None]
        if x.shape[1:3] != (size, size):
            x = np.asarray(jax.image.resize(x, (len(x), size, size, x.shape[-1]), "bilinear"))
        prepared[start : start + step] = (x - shift) / scale
    return prepared


def epochs(seed: int, count: int, batch_size: int, steps: int) -> np.ndarray:
    """Indices below `count` for each step's minibatch, int32 `(steps, batch_size)`.

    Row after row they run through all the indices, in a fresh permutation each epoch. A batch that one epoch does not
    fill goes on into the next, so every sample is used equally often. A longer run begins with a shorter one.

    **Raises:** `InputError` where an argument is out of its range.
    """
    least = {"seed": (seed, 0), "count": (count, 1), "batch_size": (batch_size, 1), "steps": (steps, 0)}
    for name, (value, bound) in least.items():
        require(value >= bound, name, f"be at least {bound}", value)
    drawn = np.empty((-(-steps * batch_size // count), count), np.int32)
    for epoch, indices in enumerate(drawn):
        indices[:] = np.random.default_rng([seed, epoch]).permutation(count)
    return drawn.ravel()[: steps * batch_size].reshape(steps, batch_size)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, digit = load_digits(return_X_y=True)
    images, labels = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1), digit.astype(np.int32)
    cut = train_test_split(images, labels, test_size=450, random_state=0, stratify=labels)
    return Dataset("digits", Split(cut[0], cut[2]), Split(cut[1], cut[3]), tuple("0123456789"))


def _idx_split(files: Sequence[Stored], classes: int) -> Split:
    images, labels = read_idx(files[0], rank=3), read_idx(files[1], rank=1)
    one_each = f"hold one label for each of the {len(images)} images in '{files[0].path}'"
    require(len(images) == len(labels), f"'{files[1].path}'", one_each, len(labels))
    return Split(images[..., None], _checked_labels(files[1].path, labels, classes))


def _cifar_split(files: Sequence[Stored], classes: int) -> Split:
    batches = [read_cifar(file) for file in files]
    labels = [_checked_labels(file.path, labels, classes) for file, (_, labels) in zip(files, batches, strict=True)]
    return Split(np.concatenate([images for images, _ in batches]), np.concatenate(labels))


def _checked_labels(path: Path, labels: np.ndarray, classes: int) -> np.ndarray:
    require(labels.max() < classes, f"'{path}'", f"hold labels below {classes}", labels.max())
    return labels.astype(np.int32)


def _require_images(images: np.ndarray) -> None:
    fits = images.ndim == 4 and images.size > 0 and images.shape[-1] in (1, 3)
    require(fits, "images", "have the shape (count, height, width, 1 or 3) and not be empty", images.shape)
    require(images.dtype in (np.uint8, np.float32), "images", "be uint8 or float32", images.dtype)
    if images.dtype == np.float32:
        least, largest = images.min(), images.max()
        require(least >= 0 and largest <= 1, "images", "lie in 0..1 where they are float32", f"{least}..{largest}")


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> np.ndarray:
    values = np.asarray(numbers(name, value), np.float32)
    fits = values.shape in ((), (channels,)) and bool(np.all(np.isfinite(values)))
    require(fits, name, f"be a finite number, or {channels} of them", value)
    return values

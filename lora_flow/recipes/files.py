"""Problems of real images, and from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lora_flow.checks import (
    InputError,
    as_path,
    one_line,
    require,
    require_integer,
)
from lora_flow.problems.base import matrix_rank
from lora_flow.problems.factorization import Factorization
from lora_flow.storage.arrays import read_arrays

ARRAYS = ("w1", "w2", "shift", "target")  # in a file
ONE_LAYER = "(files of one layer are not read: SingleLayer(shift, weight=w) takes its arrays in Python)"


def digits_problem(h: int = 64) -> Factorization:
    """Fine-tuning a linear classifier of scikit-learn's digits from classes 0-4 to all ten classes.

    The pretrained map is the ridge regression from the images of the digits 0-4 to their classes. The target is the
    least-squares map from all images to all ten classes. Both are `(10, 64)`. All images are whitened, in pixel
    coordinates, so the loss is exactly half the excess mean squared error over the best linear classifier. The
    pretrained map has rank 4 and is split into balanced weights of hidden width `h`. The shift has rank 9 and is
    **not** aligned with the weights; more than half of its squared norm lies outside the column space of W2 and the row
    space of W1.

    **Returns:** a `Factorization` with W1 `(h, 64)`, W2 `(10, h)` and a shift `(10, 64)`.

    **Raises:** `InputError` for `h` below 4.
    """
    from sklearn.datasets import load_digits

    require_integer("h", h, "be at least 4, the rank of the pretrained map", 4)
    pixels, digit = load_digits(return_X_y=True)
    images = _whiten(pixels)
    classes = np.eye(10)[digit]
    target = _regress(images, classes, ridge=0.0)
    known = digit < 5
    pretrained = _regress(images[known], classes[known], ridge=1e-2)
    u, sigma, vt = np.linalg.svd(pretrained, full_matrices=False)
    k = matrix_rank(sigma, pretrained.shape)
    root = np.sqrt(sigma[:k])
    w1, w2 = np.zeros((h, 64)), np.zeros((10, h))
    w1[:k], w2[:, :k] = root[:, None] * vt[:k], u[:, :k] * root
    return Factorization(w1=w1, w2=w2, target=target)


def load_problem(path: str | Path) -> Factorization:
    """A problem from an `.npz` or `.safetensors` file with arrays `w1`, `w2` and `shift` or `target`.

    **Returns:** a `Factorization` with W1 `(h, n)`, W2 `(m, h)` and a shift `(m, n)`.

    **Raises:** `InputError` for a file that is missing, cannot be read, or lacks an array, and for arrays that
    `Factorization` refuses.
    """
    path = as_path("problem", path)
    require(path.suffix in (".npz", ".safetensors"), "problem", "be an .npz or .safetensors file", f"'{path}'")
    require(path.is_file(), "problem", "be a file that exists", f"'{path}'")
    try:
        arrays = read_arrays(path, ARRAYS, ONE_LAYER)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise InputError(f"problem must be a readable {path.suffix} file, got '{path}' ({one_line(error)})") from error
    missing = {"w1", "w2"} - set(arrays)
    require(not missing, f"'{path}'", f"hold an array {' and '.join(sorted(missing))}", f"only {sorted(arrays)}")
    return Factorization(**arrays)


def _whiten(pixels: np.ndarray) -> np.ndarray:
    """Zero mean and unit covariance on the pixels' span; pixels that never vary become zero."""
    centred = pixels - pixels.mean(axis=0)
    u, sigma, vt = np.linalg.svd(centred, full_matrices=False)
    k = matrix_rank(sigma, centred.shape)
    return np.sqrt(len(pixels)) * u[:, :k] @ vt[:k]


def _regress(inputs: np.ndarray, outputs: np.ndarray, ridge: float) -> np.ndarray:
    """The `(out, in)` matrix of a linear regression with intercept; the ridge is in units of the inputs' variance."""
    x, y = inputs - inputs.mean(axis=0), outputs - outputs.mean(axis=0)
    covariance = x.T @ x / len(x) + ridge * np.eye(x.shape[1])
    return (np.linalg.pinv(covariance, hermitian=True) @ (x.T @ y / len(x))).T

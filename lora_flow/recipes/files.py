"""Problems of real images, and from files: two layers, or one layer with its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_flow.algebra.diagonal import as_matrix, dense
from lora_flow.checks import (
    InputError,
    as_path,
    one_line,
    require,
    require_integer,
)
from lora_flow.problems.base import matrix_rank
from lora_flow.problems.factorization import Factorization
from lora_flow.problems.one_layer import AdaptedLayer, Regression, SingleLayer
from lora_flow.storage.arrays import read_arrays

TWO_LAYERS = ("w1", "w2", "shift", "target")  # in a file
ONE_LAYER = ("weight", "gradient", "shift", "inputs", "covariance", "scaling")
ARRAYS = tuple(dict.fromkeys((*TWO_LAYERS, *ONE_LAYER)))
KINDS = (".npz", ".safetensors", ".npy")


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


def load_problem(path: str | Path) -> Factorization | AdaptedLayer:
    """A problem from an `.npz` or `.safetensors` file, of two layers or of one; or from a pair of `.npy` files.

    With the arrays `w1`, `w2` and `shift` or `target` it is two layers. With `weight` it is one layer, of which the
    file also holds

    - `gradient`, dL/dW at the weight, as PyTorch's .grad has it. For white inputs the layer has to learn the shift
      -gradient, of the loss 1/2 ||shift - s B A||^2: the sign turns, the scale stays. With inputs X, N samples, or
      their `covariance` C = X^T X/N, it is the shift whose gradient this is: -gradient C^+, on the inputs' span;
    - or `shift` itself, what is missing in the weight, `(out, in)`;
    - `inputs`, `(samples, in)`, or `covariance`, `(in, in)`: then the loss is 1/(2 N) ||X (shift - s B A)^T||^2;
    - `scaling`, s, by default 1.

    Of a pair, "q_weight.npy,q_gradient.npy", the names end in weight, and in gradient or shift.

    **Returns:** a `Factorization` with W1 `(h, n)`, W2 `(m, h)` and a shift `(m, n)`; or a `SingleLayer` or
    `Regression` that knows its weight `(out, in)`.

    **Raises:** `InputError` for a file that is missing, cannot be read, or lacks an array, for arrays that the problem
    refuses, and for one that looks transposed.
    """
    arrays: dict[str, Any] = {}
    for part in parts_of(as_path("problem", path)):
        require(part.suffix in KINDS, "problem", "be an .npz or .safetensors file", f"'{part}'")
        require(part.is_file(), "problem", "be a file that exists", f"'{part}'")
        try:
            arrays |= _read_npy(part) if part.suffix == ".npy" else read_arrays(part, ARRAYS)
        except InputError:
            raise
        except Exception as error:  # whatever a damaged file makes the readers raise
            told = f"'{part}' ({one_line(error)})"
            raise InputError(f"problem must be a readable {part.suffix} file, got {told}") from error
    if "weight" in arrays or "gradient" in arrays:
        return _one_layer(f"'{path}'", arrays)
    missing = {"w1", "w2"} - set(arrays)
    require(not missing, f"'{path}'", f"hold an array {' and '.join(sorted(missing))}", f"only {sorted(arrays)}")
    others = sorted(set(arrays) - set(TWO_LAYERS))
    require(not others, f"'{path}'", "be of two layers, or of one with its weight", f"w1 beside {', '.join(others)}")
    return Factorization(**arrays)


def parts_of(path: Path) -> list[Path]:
    """The files that a problem's name stands for: itself, or two of `.npy` with a comma between."""
    text = str(path)
    return [Path(part) for part in text.split(",")] if text.endswith(".npy") else [path]


def _read_npy(path: Path) -> dict[str, Any]:
    """An array under the role that the file's name ends in."""
    role = next((one for one in ("weight", "gradient", "shift", "inputs") if path.stem.endswith(one)), None)
    require(role is not None, "problem", "have .npy files whose names end in weight, gradient or shift", f"'{path}'")
    return {str(role): np.load(path, allow_pickle=False, mmap_mode="r")}


def _one_layer(where: str, arrays: Mapping[str, Any]) -> AdaptedLayer:
    others = sorted({"w1", "w2", "target"} & set(arrays))
    require(not others, where, "be of two layers, or of one with its weight", f"weight beside {', '.join(others)}")
    for one, other in (("gradient", "shift"), ("inputs", "covariance")):
        both = one in arrays and other in arrays
        require(not both, where, f"hold {one} or {other}", "both")
    what = "gradient" if "gradient" in arrays else "shift"
    require(
        "weight" in arrays and what in arrays, where, "hold weight, and gradient or shift", f"only {sorted(arrays)}"
    )
    weight, given = (dense(as_matrix(name, arrays[name])) for name in ("weight", what))
    turned = weight.shape != given.shape and weight.shape == given.shape[::-1]
    got = f"{given.shape}{'; is it transposed? Then save its transpose' if turned else ''}"
    require(weight.shape == given.shape, what, f"have the weight's shape {weight.shape}, (out, in)", got)
    inputs, covariance = _inputs(arrays, weight.shape[1])
    shift = given if what == "shift" else -given if covariance is None else -_before(given, covariance)
    scaling = np.asarray(arrays.get("scaling", 1.0))
    scaling = scaling.reshape(()) if scaling.size == 1 else scaling  # some writers know no numbers, but vectors of one
    if inputs is None:
        return SingleLayer(shift, scaling, weight)
    return Regression(inputs, shift, weight, scaling=scaling)


def _inputs(arrays: Mapping[str, Any], width: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The inputs X `(samples, in)`, or as many that have the same covariance; and that, X^T X/N."""
    name = "inputs" if "inputs" in arrays else "covariance"
    if name not in arrays:
        return None, None
    given = np.asarray(dense(as_matrix(name, arrays[name])))
    if name == "inputs":
        turned = given.shape[1] != width and given.shape[0] == width
        got = f"{given.shape}{'; is it transposed? Then save its transpose' if turned else ''}"
        require(given.shape[1] == width, name, f"have shape (samples, {width}), a column for each of the weight's", got)
        return given, given.T @ given / len(given)
    require(given.shape == (width, width), name, f"have shape {(width, width)}, as the weight's columns", given.shape)
    size, rounding = float(np.abs(given).max()), np.sqrt(np.finfo(given.dtype).eps)
    symmetric = bool(np.abs(given - given.T).max() <= rounding * size)
    require(symmetric, name, "be symmetric", "a matrix that is not")
    values, vectors = np.linalg.eigh((given + given.T) / 2)
    require(values[0] >= -rounding * size, name, "have no negative eigenvalue", f"{values[0]:.3g}")
    return np.sqrt(width * np.maximum(values, 0.0))[:, None] * vectors.T, given


def _before(gradient: Any, covariance: np.ndarray) -> np.ndarray:
    """The D on the inputs' span with D C = gradient."""
    inverse = np.linalg.pinv(covariance, hermitian=True, rcond=1e-12)
    found = np.asarray(gradient) @ inverse
    left = np.linalg.norm(found @ covariance - gradient)
    must = "be one of these inputs: its rows combinations of theirs"
    share = left / max(np.linalg.norm(gradient), np.finfo(float).tiny)
    require(share < 1e-3, "gradient", must, f"one with {share:.0%} of its norm outside")
    return found


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

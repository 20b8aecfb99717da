"""Problems: an aligned draw as in the paper, departures from it, real images, or a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.algebra.matrices import WRITTEN_OUT, Diagonal, dense
from lora_flow.arrays import real_array, require_key
from lora_flow.checks import (
    InputError,
    as_path,
    as_real,
    kind,
    one_line,
    require,
    require_choice,
    require_integer,
    require_number,
)
from lora_flow.problems.base import Factorization, check_factorization, matrix_rank
from lora_flow.runtime.compiling import compiled
from lora_flow.storage.arrays import read_arrays

PAPER_SPECTRUM = (6.5, 0.099)  # largest and smallest singular value of the paper's 10 x 10 draw

ARRAYS = ("w1", "w2", "shift", "target")  # in a file

Component = int | str


def aligned_problem(
    key: Array,
    *,
    m: int = 10,
    n: int = 10,
    h: int = 100,
    delta_w: float = 1 / 1.05**2,
    shift_scale: float | Sequence[float] = 5.0,
    component: Component | Sequence[Component] = "top",
    spectrum: tuple[float, float] | None = PAPER_SPECTRUM,
) -> Factorization:
    r"""A problem that satisfies Assumptions 2.1 and 2.2 of arXiv 2503.06982.

    `Ypre` is an m x n matrix of standard normals, `Ypre = U S V^T`; the frozen weights are
    `W2 = c U S^{1/2} G^T` and `W1 = 1/c G S^{1/2} V^T` with G a random orthogonal frame, and the shift
    is `sum_i sigma_i u_i v_i^T` over the chosen singular pairs of `Ypre`.

    **Arguments:**

    - `m`, `n`, `h`: the shapes, W1 `(h, n)` and W2 `(m, h)`. With `h < min(m, n)` the weights carry
      the top h components of the draw.
    - `delta_w`: `sigma_W1 / sigma_W2 = 1/c^2`, the same for every component.
    - `shift_scale`: sigma, the shift's singular value; one number, or one for each component.
    - `component`: "top", "bottom", an index from 0 (negative ones count from the end), or a list of
      these for a shift of higher rank.
    - `spectrum`: the largest and the smallest singular value; the drawn values are moved linearly to this range, by
      default the range of the paper's figures. `None` keeps the drawn values.

    Where m, n or h is above 1024, the singular vectors are the coordinate axes, the chosen ones first, the matrices are
    `Diagonal`, and only the singular values are drawn: no matrix of that size is written out. The flow and the Gaussian
    initialisations are invariant under rotations, so nothing is lost.

    **Returns:** a `Factorization` with W1 `(h, n)`, W2 `(m, h)` and a shift `(m, n)` whose rank is the number of
    components.

    **Raises:** `InputError` where an argument is out of its range.
    """
    require_key(key)
    for name, size in (("m", m), ("n", n), ("h", h)):
        require_integer(name, size, "be at least 1", 1)
    require_number("delta_w", delta_w, "be positive", lambda ratio: ratio > 0)
    if spectrum is not None:
        must, bounds = "be (largest, smallest), both positive", as_real(spectrum)
        pair = bounds is not None and bounds.shape == (2,) and np.inf > bounds[0] >= bounds[1] > 0
        require(pair, "spectrum", must, kind(spectrum))
        largest, smallest = spectrum
    k = min(m, n, h)
    indices = _component_indices(component, k)
    scales = np.asarray(real_array("shift_scale", shift_scale, "be positive numbers")).reshape(-1)
    must = f"be one number or {len(indices)} of them"
    require(scales.size in (1, len(indices)), "shift_scale", must, f"{scales.size}")
    require(bool(np.all(np.isfinite(scales) & (scales > 0))), "shift_scale", "be positive", shift_scale)

    chosen, c = jnp.asarray(indices), delta_w**-0.5
    if max(m, n, h) > WRITTEN_OUT:
        sigma = _gaussian_spectrum(key, m, n)
        sigma = sigma if spectrum is None else _rescale(sigma, largest, smallest)
        root = jnp.sqrt(jnp.concatenate([sigma[chosen], jnp.delete(sigma[:k], chosen)]))
        shift = Diagonal(jnp.broadcast_to(jnp.asarray(scales, float), len(indices)), (m, n))
        return Factorization(Diagonal(root / c, (h, n)), Diagonal(c * root, (m, h)), shift)

    ends = None if spectrum is None else (largest, smallest)
    return Factorization(*_aligned_weights(key, (int(m), int(n), int(h)), c, scales, tuple(indices), ends))


@compiled(quickly=True)  # one compilation in place of one for every operation
def _aligned_weights(
    key: Array,
    sizes: tuple[int, int, int],
    c: Any,
    scales: Any,
    chosen: tuple[int, ...],
    spectrum: tuple[Any, Any] | None,
) -> tuple[Array, Array, Array]:
    """W1, W2 and the shift of `aligned_problem`."""
    m, n, h = sizes
    k, places = min(sizes), jnp.asarray(chosen)
    draw_key, frame_key = jax.random.split(key)
    u, sigma, vt = jnp.linalg.svd(jax.random.normal(draw_key, (m, n)), full_matrices=False)
    if spectrum is not None:
        sigma = _rescale(sigma, *spectrum)
    frame, _ = jnp.linalg.qr(jax.random.normal(frame_key, (h, k)))
    u, root, vt = u[:, :k], jnp.diag(jnp.sqrt(sigma[:k])), vt[:k]
    shift = u[:, places] @ jnp.diag(jnp.broadcast_to(jnp.asarray(scales), len(chosen))) @ vt[places]
    return frame @ root @ vt / c, c * u @ root @ frame.T, shift


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


def misaligned(problem: Factorization, key: Array, *, angle: float) -> Factorization:
    r"""The problem with each singular vector of the shift turned away by `angle` degrees.

    With `shift = U S V^T` of rank k, U becomes `cos(angle) U + sin(angle) U'`, where U' is a random orthonormal frame
    orthogonal to U, and V likewise: all principal angles between the old and the new singular subspaces are `angle`.
    The singular values stay. For any angle above 0, Assumption 2.2 of arXiv 2503.06982 fails.

    **Returns:** a `Factorization` of the same shapes; at angle 0 the problem itself.

    **Raises:** `InputError` unless 0 <= angle <= 90 and twice the shift's rank is at most min(m, n).
    """
    check_factorization(problem)
    require_key(key)
    require_angle(angle)
    if angle == 0:
        return problem
    u, sigma, vt = np.linalg.svd(np.asarray(problem.shift), full_matrices=False)
    k = matrix_rank(sigma, problem.shift.shape)
    room = min(problem.shift.shape) // 2
    require(k <= room, "angle", f"be 0 for a shift of rank above {room}, which fills its space", f"{angle:g}, rank {k}")
    left, right = (turned(x, one, angle) for x, one in zip((u[:, :k], vt[:k].T), jax.random.split(key), strict=True))
    return Factorization(problem.w1, problem.w2, left * sigma[:k] @ right.T)


def require_angle(angle: Any) -> None:
    require_number("angle", angle, "lie between 0 and 90 degrees", lambda known: 0 <= known <= 90)


def turned(basis: np.ndarray, key: Array, angle: float) -> np.ndarray:
    """An orthonormal frame at this angle, in degrees, to the given one: all principal angles are equal."""
    if angle == 0:
        return basis
    drawn = np.asarray(jax.random.normal(key, basis.shape))
    across, _ = np.linalg.qr(drawn - basis @ (basis.T @ drawn))
    return np.cos(np.deg2rad(angle)) * basis + np.sin(np.deg2rad(angle)) * across


def noisy(problem: Factorization, key: Array, *, noise: float) -> Factorization:
    r"""The problem with Gaussian noise in the pretrained weights, and with the same target.

    Each W_i becomes `W_i + N_i` with entries of N_i iid normal and `||N_i||_F = noise ||W_i||_F`. Fine-tuning aims at
    the same Yft, so the shift absorbs the change of W2 W1 and has full rank. For any noise above 0, Assumptions 2.1 and
    2.2 of arXiv 2503.06982 fail.

    **Returns:** a `Factorization` of the same shapes; at noise 0 the problem itself.

    **Raises:** `InputError` unless noise is finite and at least 0.
    """
    check_factorization(problem)
    require_key(key)
    require_number("noise", noise, "be at least 0", lambda known: known >= 0)
    if noise == 0:
        return problem
    keys = jax.random.split(key)

    def disturb(weight: Array, key: Array) -> Array:
        drawn = jax.random.normal(key, weight.shape)
        return weight + noise * jnp.linalg.norm(weight) / jnp.linalg.norm(drawn) * drawn

    before, shift = [dense(weight) for weight in (problem.w1, problem.w2)], dense(problem.shift)
    w1, w2 = map(disturb, before, keys)
    return Factorization(w1, w2, shift + (before[1] @ before[0] - w2 @ w1))


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
        arrays = read_arrays(path, ARRAYS)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise InputError(f"problem must be a readable {path.suffix} file, got '{path}' ({one_line(error)})") from error
    missing = {"w1", "w2"} - set(arrays)
    require(not missing, f"'{path}'", f"hold an array {' and '.join(sorted(missing))}", f"only {sorted(arrays)}")
    return Factorization(**arrays)


def _component_indices(component: Component | Sequence[Component], k: int) -> list[int]:
    arrays = (np.ndarray, np.generic, jax.Array)
    given: Any = np.asarray(component).tolist() if isinstance(component, arrays) else component
    listed = list(given) if isinstance(given, (list, tuple, range)) else [given]
    require(len(listed) > 0, "component", "name at least one component", component)

    def index(one: Any) -> int:
        if isinstance(one, str) and one.lstrip("-").isdigit():
            one = int(one)
        if not isinstance(one, (int, np.integer)) or isinstance(one, bool):
            require_choice("component", one, ("top", "bottom"), "or an index")
            return 0 if one == "top" else k - 1
        require(-k <= one < k, "component", f"be an index below {k}, the number of components", one)
        return int(one) % k

    indices = [index(one) for one in listed]
    require(len(set(indices)) == len(indices), "component", "name each component once", component)
    return indices


def _gaussian_spectrum(key: Array, m: int, n: int) -> Array:
    """The singular values of an m x n matrix of standard normals, in O(min(m, n)^2).

    They are those of a bidiagonal matrix B of chi variables (Dumitriu and Edelman 2002), whose B^T B is tridiagonal.
    """
    from scipy.linalg import eigvalsh_tridiagonal

    long, short = max(m, n), min(m, n)
    degrees = jnp.concatenate([jnp.arange(long, long - short, -1.0), jnp.arange(short - 1.0, 0, -1)])
    squares = np.asarray(jax.random.chisquare(key, degrees))
    diagonal, above = squares[:short], squares[short:]
    return jnp.sqrt(
        jnp.asarray(eigvalsh_tridiagonal(diagonal + np.append(0, above), np.sqrt(diagonal[:-1] * above))[::-1].clip(0))
    )


def _rescale(sigma: Array, largest: float, smallest: float) -> Array:
    if sigma.size == 1:
        return jnp.full_like(sigma, largest)
    return smallest + (sigma - sigma[-1]) * (largest - smallest) / (sigma[0] - sigma[-1])


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

"""Two layers whose weights are aligned with the task, as in the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.algebra.diagonal import WRITTEN_OUT, Diagonal
from lora_flow.arrays import real_array, require_key
from lora_flow.checks import (
    as_real,
    concrete,
    kind,
    require,
    require_choice,
    require_integer,
    require_number,
)
from lora_flow.problems.factorization import Factorization
from lora_flow.runtime.compiling import compiled

PAPER_SPECTRUM = (6.5, 0.099)  # largest and smallest singular value of the paper's 10 x 10 draw

Component = int | str


def aligned_problem(
    key: Array,
    *,
    m: int = 10,
    n: int = 10,
    h: int = 100,
    delta_w: float | Array = 1 / 1.05**2,
    shift_scale: float | Array | Sequence[float] = 5.0,
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
    given = real_array("shift_scale", shift_scale, "be positive numbers")
    must, known = f"be one number or {len(indices)} of them", concrete(given)
    scales: Any = (given if known is None else known).reshape(-1)
    require(scales.size in (1, len(indices)), "shift_scale", must, f"{scales.size}")
    if known is not None:
        require(bool(np.all(np.isfinite(scales) & (scales > 0))), "shift_scale", "be positive", shift_scale)

    chosen, c = np.asarray(indices), real_array("delta_w", delta_w**-0.5)
    if max(m, n, h) > WRITTEN_OUT:
        sigma = _gaussian_spectrum(key, m, n)
        sigma = sigma if spectrum is None else _rescale(sigma, largest, smallest)
        root = jnp.sqrt(jnp.concatenate([sigma[chosen], jnp.delete(sigma[:k], chosen)]))
        shift = Diagonal(jnp.broadcast_to(jnp.asarray(scales, float), len(indices)), (m, n))
        return Factorization(Diagonal(root / c, (h, n)), Diagonal(c * root, (m, h)), shift)

    ends = None if spectrum is None else (largest, smallest)
    sizes = int(m), int(n), int(h)
    if concrete(c) is not None:
        return Factorization(*_aligned_weights(key, sizes, c, scales, chosen, ends))
    w1, w2, shift = _aligned_weights(key, sizes, jnp.ones(()), scales, chosen, ends)
    return Factorization(w1 / c, c * w2, shift)  # a shift that is known although delta_w is traced


@compiled(quickly=True)  # one compilation in place of one for every operation
def _aligned_weights(
    key: Array,
    sizes: tuple[int, int, int],
    c: Any,
    scales: Any,
    chosen: Any,
    spectrum: tuple[Any, Any] | None,
) -> tuple[Array, Array, Array]:
    """W1, W2 and the shift of `aligned_problem`."""
    m, n, h = sizes
    k = min(sizes)
    draw_key, frame_key = jax.random.split(key)
    u, sigma, vt = jnp.linalg.svd(jax.random.normal(draw_key, (m, n)), full_matrices=False)
    if spectrum is not None:
        sigma = _rescale(sigma, *spectrum)
    frame, _ = jnp.linalg.qr(jax.random.normal(frame_key, (h, k)))
    u, root, vt = u[:, :k], jnp.diag(jnp.sqrt(sigma[:k])), vt[:k]
    shift = u[:, chosen] @ jnp.diag(jnp.broadcast_to(jnp.asarray(scales), len(chosen))) @ vt[chosen]
    return frame @ root @ vt / c, c * u @ root @ frame.T, shift


def require_angle(angle: Any) -> None:
    require_number("angle", angle, "lie between 0 and 90 degrees", lambda known: 0 <= known <= 90)


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

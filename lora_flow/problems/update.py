"""The update of a two-layer network: its singular values, its terms, its direction, and the parts of the loss."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_flow.algebra.angles import one_minus_cosine, ties
from lora_flow.algebra.spectra import norm_on_host
from lora_flow.problems.base import matrix_rank

OF_THE_UPDATE = {
    "update_singular_values": "singular values of the update F: the first min(m, n, 2 r)",
    "update_alignment_error": "alignment error of the update F: 1 - cos(its top pair (u_F; v_F), the shift's (u; v))",
    "term_1": "||W2 B1 A1||_F",
    "term_2": "||B2 A2 W1||_F",
    "term_12": "||B2 A2 B1 A1||_F",
    "loss_signal": "part of the loss along the shift's singular vectors: 1/2 ||U^T E V||_F^2",
    "loss_rest": "part of the loss across the shift's singular vectors",
}


def of_the_update(w1: np.ndarray, w2: np.ndarray, shift: np.ndarray, adapters: Any) -> dict[str, np.ndarray]:
    """All of `OF_THE_UPDATE`, `(state, ...)`, of adapters with one leading axis, NumPy's arrays.

    The split of the loss is equation 79 of arXiv 2503.06982. Singular values beyond the first are zero, except for an
    `Offset`.
    """
    (a1, b1), (a2, b2) = adapters
    factors = {"term_1": (w2 @ b1, a1), "term_2": (b2, a2 @ w1), "term_12": (b2, (a2 @ b1) @ a1)}
    terms = {name: x @ y for name, (x, y) in factors.items()}
    outer, x = _over_largest(np.concatenate([w2 @ b1 + b2 @ (a2 @ b1), b2], axis=-1))
    inner, y = _over_largest(np.concatenate([a1, a2 @ w1], axis=-2))
    left, sigma, right = _svd_of_product(x, y)  # of tiny factors the product itself would be 0
    u, scales, vt = np.linalg.svd(shift, full_matrices=False)
    pairs = np.concatenate([left, np.swapaxes(right, -1, -2)], axis=-2) / np.sqrt(2)
    goals = (np.concatenate([u, vt.T]) / np.sqrt(2))[:, ties(scales)]
    error = one_minus_cosine(pairs, sigma, goals.T)
    residual = shift - sum(terms.values())
    k = matrix_rank(scales, shift.shape)
    signal = u[:, :k] @ (u[:, :k].T @ residual @ vt[:k].T) @ vt[:k]
    norms = {name: norm_on_host(term, axis=(-2, -1)) for name, term in terms.items()}
    return norms | {
        "update_singular_values": sigma * outer * inner,
        "update_alignment_error": error,
        "loss_signal": 0.5 * np.sum(signal**2, axis=(-2, -1)),
        "loss_rest": 0.5 * np.sum((residual - signal) ** 2, axis=(-2, -1)),
    }


def _over_largest(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest entry's size, `(..., 1)`, and the matrices over it; 1 for matrices of zeros."""
    largest = np.max(np.abs(x), axis=(-2, -1), keepdims=True)
    unit = np.where(largest > 0, largest, 1.0)
    return unit[..., 0], x / unit


def _svd_of_product(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The thin singular value decomposition of x y, by way of QR factors where they are thinner."""
    if x.shape[-1] >= min(x.shape[-2], y.shape[-1]):
        return np.linalg.svd(x @ y, full_matrices=False)
    q, s = np.linalg.qr(x)
    p, t = np.linalg.qr(np.swapaxes(y, -1, -2))
    left, sigma, right = np.linalg.svd(s @ np.swapaxes(t, -1, -2))
    return q @ left, sigma, right @ np.swapaxes(p, -1, -2)

"""Angles between top singular vectors and spaces, of which several may tie."""

from __future__ import annotations

import numpy as np

from lora_flow.algebra.spectra import tie


def ties(sigma: np.ndarray) -> np.ndarray:
    """Which singular values tie for the largest."""
    return sigma >= (1 - tie(sigma.dtype)) * sigma[..., :1]


def one_minus_cosine(vectors: np.ndarray, sigma: np.ndarray, space: np.ndarray) -> np.ndarray:
    """1 - cos of the angle between the top singular vectors, columns, and a space, orthonormal rows and rows of zeros.

    Of tied vectors the nearest counts. The component across the space gives the angle, which keeps small angles. NaN
    where sigma is 0 or the space is empty.
    """
    kept = vectors * ties(sigma)[..., None, :]
    nearest = np.linalg.svd(np.swapaxes(kept, -1, -2) @ space.T, full_matrices=False)[0][..., :1]
    unit = (kept @ nearest)[..., 0]
    unit = unit / np.maximum(np.linalg.norm(unit, axis=-1, keepdims=True), np.finfo(unit.dtype).tiny)
    along = unit @ space.T
    across = unit - along @ space
    cosine, sine2 = np.linalg.norm(along, axis=-1), np.sum(across**2, axis=-1)
    defined = (sigma[..., 0] > 0) & np.any(space)
    return np.where(defined, sine2 / np.where(defined, 1 + cosine, 1.0), np.nan)

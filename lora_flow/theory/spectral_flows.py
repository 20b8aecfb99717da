"""The theory of spectral flows of one layer, `1/2 ||shift - B A||^2`, and of balanced factors.

Of three papers the statements were read, second hand: Kang et al., "Uniform Spectral Growth and Convergence of Muon in
LoRA-Style Matrix Factorization" (arXiv 2602.06385), its abstract; Cesista et al., LoRA-Muon (arXiv 2606.12921), its
abstract and the formula of its step; Castin et al., BaLoRA (arXiv 2605.31484), its abstract and the projection of its
code. The formulas here were derived for this project. Matrices are NumPy arrays, with any leading axes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Value = Any  # a number or an array


def msign(g: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    """g (g^T g + smoothing^2 I)^{-1/2}, by a singular value decomposition; without smoothing U V^T."""
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    rounding = 10 * max(g.shape[-2:]) * np.finfo(g.dtype).eps * s[..., :1]
    alive = s > (0 if smoothing else rounding)
    filtered = np.where(alive, s / np.where(alive, np.hypot(s, smoothing), 1.0), 0.0)
    return (u * filtered[..., None, :]) @ vt


# Singular values of B A over time


def muon_values(sigma: Value, t: Value, a: Value = 0.0, b: Value = 0.0) -> Value:
    """min{sigma, (a + t)(b + t)}: a mode whose factors have sizes a and b at first; both grow at the rate 1.

    Along the singular vectors of the shift the flow is exactly this. From small A and B = 0 it is the limit, for B is
    soon t U W and A is t W^T V^T beside A(0), with a W that has orthonormal rows (r >= r*).
    """
    return np.minimum(sigma, (a + t) * (b + t))


def muon_finish(sigma: Value, a: Value = 0.0, b: Value = 0.0) -> Value:
    """The time at which the mode reaches sigma: sqrt(sigma) from zero, the smallest ones first."""
    return np.sqrt(sigma + ((a - b) / 2) ** 2) - (a + b) / 2


def lora_muon_values(sigma: Value, t: Value, start: Value = 0.0) -> Value:
    """min{sigma, start + t}: along the shift's singular vectors W moves by 1 in every mode."""
    return np.minimum(sigma, start + t)


def lora_muon_finish(sigma: Value, start: Value = 0.0) -> Value:
    """The time at which the mode reaches sigma."""
    return sigma - start


def lora_muon_time(sigma: np.ndarray, share: float) -> float:
    """The time at which the loss, half the sum of (sigma - t)_+^2, has come to a share of its start."""
    times = np.linspace(0.0, sigma.max(), 100_001)
    loss = np.sum((sigma - lora_muon_values(sigma, times[:, None])) ** 2, axis=1)
    return float(times[np.argmax(loss <= share * loss[0])])


# How W moves


def lora_muon_movement(p_b: np.ndarray, g: np.ndarray, p_a: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    """dW/dt of LoRA-Muon, from W's negative gradient and the projections on the factors' column and row spaces."""
    return 0.5 * (msign(p_b @ g, smoothing) + msign(g @ p_a, smoothing))


# Rates near the solution, and imbalance


def squared_sizes(sigma: Value, imbalance: Value) -> tuple[Value, Value]:
    """a^2 and b^2 of a mode with a b = sigma and the conserved a^2 - b^2 = imbalance."""
    whole = np.hypot(imbalance, 2 * sigma)
    small = 2 * sigma**2 / (whole + np.abs(imbalance))  # without cancellation
    large = (whole + np.abs(imbalance)) / 2
    ahead = imbalance > 0
    return np.where(ahead, large, small), np.where(ahead, small, large)


def imbalanced_rate(sigma_i: Value, sigma_j: Value, imbalance: Value) -> Value:
    """The rate of component (i, j) of E under gradient flow: b_i^2 + a_j^2, from dE/dt = -(B B^T E + E A^T A).

    It is sigma_i + sigma_j for balanced factors.
    """
    return squared_sizes(sigma_i, imbalance)[1] + squared_sizes(sigma_j, imbalance)[0]


def one_sided_rate(sigma: Value, imbalance: Value) -> Value:
    """The rate of what lies beyond A's rows, b_i^2: sigma_i for balanced factors, sigma_i^2/imbalance for a large A."""
    return squared_sizes(sigma, imbalance)[1]


def condition_number(a: np.ndarray, b: np.ndarray) -> Value:
    """The largest over the least non-zero eigenvalue of the loss's Hessian at a solution, B A of full rank r.

    They are the b_i^2 + a_j^2 of all pairs of squared singular values of B and A, with the zeros that B B^T has for
    r < m and A^T A for r < n.
    """
    (m, r), n = b.shape[-2:], a.shape[-1]
    rows, columns = np.linalg.svd(b, compute_uv=False) ** 2, np.linalg.svd(a, compute_uv=False) ** 2
    least = [part for part, size in ((columns[..., -1], m), (rows[..., -1], n)) if r < size]
    return (rows[..., 0] + columns[..., 0]) / np.min(least or [rows[..., -1] + columns[..., -1]], axis=0)


def least_condition_number(sigma: np.ndarray) -> Value:
    """2 sigma_1/sigma_r, that of balanced factors; no others have less where r < min(m, n).

    For b_1^2 + a_1^2 >= 2 b_1 a_1 >= 2 sigma_1 and min(b_r^2, a_r^2) <= b_r a_r <= sigma_r. Where r is the number of
    rows or columns, unbalanced factors can have less.
    """
    return 2 * sigma[..., 0] / sigma[..., -1]

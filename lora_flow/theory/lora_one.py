r"""The theory of one adapted layer, `1/2 ||(shift - B A) X^T||^2`: LoRA-One (Zhang et al. 2025, arXiv 2502.01235v3).

The convention is `W + B A`: LoRA-One's W, A, B are the transposes of those here, and its Delta is `shift^T`. Formulas
without a number were derived for this project. Matrices are NumPy arrays, with any leading axes where a formula has
only products and norms.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_flow.theory.gradient_flow import Gains

Value = Any  # a number or an array

RELU_GAIN = 0.5  # -dL/dW = (shift - B A)/2 + Xi for a ReLU layer (section 4): half of the samples are active
RHO = 1 / 20  # the largest start that Theorem 4.2 is for, relative to the shift's smallest singular value
C = 0.5  # the constant of Theorem 3.3, which the theorem leaves open


# Subspaces


def top_rows(matrix: np.ndarray, count: int) -> np.ndarray:
    """The first right singular vectors, as rows."""
    return np.linalg.svd(matrix, full_matrices=False)[2][..., :count, :]


def sine(rows: np.ndarray, others: np.ndarray) -> Value:
    """The sine of the largest principal angle between the spans of two sets of orthonormal rows."""
    rest = rows - rows @ np.swapaxes(others, -1, -2) @ others
    return np.linalg.norm(rest, 2, axis=(-2, -1))


# Alignment from B = 0 (section 3), white inputs


def linear_phase(
    shift: np.ndarray, a: np.ndarray, times: np.ndarray, b: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A(t) and B(t) while they are small, over times, from A(0) and from B(0), which is 0 unless it is given.

    With shift = U S V^T, A V comes to A(0) V cosh(S t) + B(0)^T U sinh(S t), and B^T U to the same with the factors
    exchanged; the parts across V and U stay. From B(0) = 0 this is B(t) = U sinh(S t) V^T A(0)^T.
    """
    u, s, vt = np.linalg.svd(shift, full_matrices=False)
    b = np.zeros((len(shift), len(a))) if b is None else b
    along_a, along_b, growth = a @ vt.T, b.T @ u, np.outer(times, s)[:, None]
    more, turned = np.cosh(growth) - 1, np.sinh(growth)
    moved_a, moved_b = along_a * more + along_b * turned, along_b * more + along_a * turned
    return a + moved_a @ vt, b + u @ np.swapaxes(moved_b, -1, -2)


def misalignment(shift: np.ndarray, a: np.ndarray, rank: int) -> float:
    """c sqrt(d) of `alignment_time`: twice the part of A(0) across V, relative to the part along V's last direction."""
    vt = top_rows(shift, rank)
    across = a.T - vt.T @ (vt @ a.T)
    return 2 * float(np.linalg.norm((across @ np.linalg.pinv(vt @ a.T))[:, -1]))


def alignment_time(misaligned: Value, smallest: Value, theta: Value) -> Value:
    """T* = ln(c sqrt(d)/theta)/lam_r*, when the largest principal angle comes down to theta; it has no alpha in it.

    The flow's counterpart of Theorem 3.2's number of steps.
    """
    return np.log(misaligned / theta) / smallest


def sampling_angle(d: Value, samples: Value) -> Value:
    """The approximate angle between the row spaces of `shift` and of `shift X^T X/N`: sqrt(d/N)."""
    return np.sqrt(d / samples)


# The start from one gradient step


def lora_one_product(descent: np.ndarray, rank: int, gamma: float) -> np.ndarray:
    """B A at t = 0: gamma times the best approximation of the negative gradient, over S_1 (Algorithm 1)."""
    return _filtered(descent, rank, gamma, power=1)


def lora_one_product_as_printed(descent: np.ndarray, rank: int, gamma: float) -> np.ndarray:
    """With `Diag(S)` in both factors, as the README of the paper's code has it, in place of `Diag(S)^{1/2}`."""
    return _filtered(descent, rank, gamma, power=2)


def _filtered(descent: np.ndarray, rank: int, gamma: float, power: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(descent)
    return gamma * (u[:, :rank] * (s[:rank] / s[0]) ** power) @ vt[:rank]


def sampling_error_allowed(kappa: Value) -> Value:
    """eps = min{1/(2 kappa), c/kappa^3} of Theorem 3.3, with c = 1/2."""
    return np.minimum(1 / (2 * kappa), C / kappa**3)


def rank_floor(shift: np.ndarray, frozen: np.ndarray, rank: int) -> float:
    """Half the sum of the squares of the singular values of `shift + s B(0) A(0)` beyond the first r.

    The lowest loss of one white layer whose frozen weight is W - s B(0) A(0) (Eckart, Young).
    """
    return 0.5 * float(np.sum(np.linalg.svd(shift + frozen, compute_uv=False)[rank:] ** 2))


def two_layer_loss(c: Gains, gamma: Value) -> Value:
    """L/L(0) when both layers of an aligned problem start from gamma times their own gradient.

    Each layer adds its correction, and the product of the two corrections is the cross term.
    """
    return (1 - gamma * (c.s1**2 + c.s2**2) - gamma**2 * c.sigma * c.s1 * c.s2) ** 2


def two_layer_gamma(c: Gains) -> Value:
    """The gamma that is about right with two layers."""
    return 1 / (c.s1**2 + c.s2**2)


# Convergence (section 4)


def relu_bound(eta: Value, steps: Value) -> Value:
    """||B A - shift||_F after that many preconditioned steps, over its start: at most (1 - eta/4)^t (Theorem 4.2)."""
    return (1 - eta / 4) ** steps


def relu_factor(eta: Value) -> Value:
    """The factor by which each of these steps finally shrinks a one-sided component: the gradient has half of it."""
    return 1 - eta / 2


def preconditioned_rate(sides: int) -> float:
    """The decay rate of the components of E = shift - B A that lie in the factors' spaces on that many sides.

    From dE/dt = -(P_B E + E P_A), for any singular values of the shift.
    """
    return float(sides)


def plain_rate(sigma_i: Value, sigma_j: Value) -> Value:
    """The decay rate of component (i, j) of E near a balanced optimum: dE/dt = -(B B^T E + E A^T A)."""
    return sigma_i + sigma_j


# Other flows


def scaled_invariant(a: np.ndarray, b: np.ndarray) -> Value:
    """log det(B^T B) - log det(A A^T), which ScaledGD conserves."""
    return _log_det(np.swapaxes(b, -1, -2)) - _log_det(a)


def _log_det(rows: np.ndarray) -> Value:
    return np.linalg.slogdet(rows @ np.swapaxes(rows, -1, -2))[1]


def imbalance(a: np.ndarray, b: np.ndarray, ratio: float = 1.0) -> np.ndarray:
    """ratio A A^T - B^T B, which LoRA+ conserves with B `ratio` times as fast (arXiv 2402.12354)."""
    return ratio * a @ np.swapaxes(a, -1, -2) - np.swapaxes(b, -1, -2) @ b


def shrinking_imbalance(a: np.ndarray, rate: float) -> np.ndarray:
    """d/dt (A A^T - B^T B) = -2 k A A^T with Stable-LoRA's shrinking at rate k (arXiv 2603.05204)."""
    return -2 * rate * a @ np.swapaxes(a, -1, -2)


def scaled_movement(p_b: np.ndarray, g: np.ndarray, p_a: np.ndarray) -> np.ndarray:
    """dW/dt of ScaledGD, from W's negative gradient and the projections on the factors' column and row spaces."""
    return p_b @ g + g @ p_a


def tangent_projection(p_b: np.ndarray, g: np.ndarray, p_a: np.ndarray) -> np.ndarray:
    """dW/dt of LoRA-Pro (arXiv 2407.18242): g projected on the tangent space of the matrices of rank r at B A."""
    return p_b @ g + g @ p_a - p_b @ g @ p_a

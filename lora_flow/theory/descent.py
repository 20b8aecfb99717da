r"""Gradient descent on LoRA's factors: Mu & Klabjan, "On the Convergence Rate of LoRA Gradient Descent".

arXiv 2512.18248. J(V) = l(B A) with V = [B; A^T]; l has an L-Lipschitz gradient and is bounded below by l*. All norms
are Frobenius norms; `slope` is ||grad l(B A)|| and `gradient2` is ||grad J(V)||^2. Formulas without a number were
derived for this project.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Value = Any  # a number or an array


def step_size(smoothness: Value, norm: Value, slope: Value) -> Value:
    """min{1/(4 sqrt(2) L (||V||^2 + ||grad l||)), 1} (equation 3.4)."""
    return np.minimum(1 / (4 * np.sqrt(2) * smoothness * (norm**2 + slope)), 1.0)


def descent_lemma(smoothness: Value, norm: Value, slope: Value, moved: Value) -> Value:
    """The bound of J(V + D) - J(V) - <grad J(V), D>, with `moved` = ||D|| (Lemma 3.3)."""
    powers = moved**2 * norm**2 + moved**3 * norm + moved**4 / 4
    return np.sqrt(2) * smoothness * powers + slope * moved**2


def sharper_lemma(smoothness: Value, norm: Value, slope: Value, moved: Value) -> Value:
    """The same with 1/2 for sqrt(2), 1/8 for sqrt(2)/4 and half the last term.

    B A changes by X = D_B A + B D_A + D_B D_A, of norm at most ||D|| ||V|| + ||D||^2/2; l is L-smooth in it.
    """
    return smoothness / 2 * (moved * norm + moved**2 / 2) ** 2 + slope * moved**2 / 2


def least_decrease(step: Value, gradient2: Value) -> Value:
    """J(V_t) - J(V_{t+1}) is at least eta_t/4 ||grad J||^2 (section 3, from the lemma and the step size)."""
    return step / 4 * gradient2


def stationarity_bound(excess: Value, total: Value) -> Value:
    """min_t ||grad J||^2 <= 4 (J_0 - l*)/sum eta_t (Theorem 3.5); `total` is that sum."""
    return 4 * excess / total


def growth(smoothness: Value, norm: Value, excess: Value) -> tuple[Value, Value]:
    """c0 and c1 such that 1/eta_t <= c0 + c1 (eta_0 + ... + eta_{t-1}); `norm` is ||V_0||, `excess` J_0 - l*.

    The reason: V has moved by at most sqrt(4 (J_0 - l*) sum eta).
    """
    c0 = 1 + 4 * np.sqrt(2) * smoothness * (2 * norm**2 + np.sqrt(2 * smoothness * excess))
    return c0, 32 * np.sqrt(2) * smoothness * excess


def least_total(c0: Value, c1: Value, steps: Value) -> Value:
    """The sum of the step sizes is at least ln(1 + c1 T/c0)/c1: Theorem 3.5's O(1/log T)."""
    return np.log1p(c1 * steps / c0) / c1


def sharper_total(c0: Value, c1: Value, steps: Value) -> Value:
    """The sum of the step sizes is even at least (sqrt(c0^2 + 2 c1 T) - c0)/c1, which gives O(1/sqrt(T))."""
    return (np.sqrt(c0**2 + 2 * c1 * steps) - c0) / c1

"""Stable-LoRA on one layer (Wu, Gao, Li and Wu 2026, arXiv 2603.05204): when its rule is met, and what is left then.

A `(r, n)` shrinks at the rate `k = lam/eta` until `||A||_F/n < ||B||_F/m`, with B `(m, r)` and B(0) = 0. The formulas
are derived here. That A never falls below its start without shrinking, and that B's part of a step is the larger one at
first, is what the source sees in training.
"""

from __future__ import annotations

import numpy as np


def switch_off_time(task: np.ndarray, a: np.ndarray, rate: float) -> np.ndarray:
    """log(1 + k m ||A_0||_F / (n ||G A_0^T||_F)) / k: when the rule is met, while little is learned.

    While the negative gradient G `(m, n)` of the weight stays the task, `A = A_0 exp(-k t)` and
    `B = G A_0^T (1 - exp(-k t))/k`. Right where `k` is several times the largest singular value of G, and A_0 not above
    the usual size, with entries of variance 1/n: a larger one learns before it is shrunk, and meets the rule later. The
    start `a` may have leading axes.
    """
    m, n = task.shape
    grown = np.linalg.norm(task @ np.swapaxes(a, -1, -2), axis=(-2, -1))
    return np.asarray(np.log1p(rate * m * np.linalg.norm(a, axis=(-2, -1)) / (n * grown)) / rate)


def switch_off_time_of_gaussian(task: np.ndarray, rate: float) -> float:
    """log(1 + k m / (sqrt(n) ||G||_F)) / k: the same for a Gaussian A_0, whatever its size and rank."""
    m, n = task.shape
    return float(np.log1p(rate * m / (np.sqrt(n) * np.linalg.norm(task))) / rate)


def norms_left(layer: tuple[int, int]) -> float:
    """(||A||_F^2 - ||B||_F^2) / ||A||_F^2 when the rule is met: 1 - m^2/n^2. The flow then keeps the difference."""
    m, n = layer
    return 1 - (m / n) ** 2


def share_of_b(
    signs_b: np.ndarray, signs_a: np.ndarray, a: np.ndarray, inputs: np.ndarray, eta: float, t: int
) -> float:
    """||delta_1||/||delta_2|| at step t of sign descent while no sign changes: B's part of a step over A's.

    With the signs S_B `(m, r)` and S_A `(r, n)` of the gradients, `B = t eta S_B` and `A = A_0 + (t - 1) eta S_A`, as A
    has no gradient at step 0. A step changes the outputs on Z, `(n, samples)`, by `delta_1 = eta S_B A Z` and
    `delta_2 = eta B S_A Z`. So the ratio is `1 + O(1/(eta n t))`: it falls to 1 as A_0 is outgrown.
    """
    of_start, of_steps = signs_b @ a @ inputs, eta * signs_b @ signs_a @ inputs
    return float(np.linalg.norm(of_start + (t - 1) * of_steps) / np.linalg.norm(t * of_steps))


STEP_EXPONENTS = (-1.0, -0.5)  # of n, between which that ratio falls at a fixed step that is neither early nor late

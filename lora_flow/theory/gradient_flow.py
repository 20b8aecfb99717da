r"""The formulas of Xu et al., "Understanding the Learning Dynamics of LoRA" (arXiv 2503.06982), rank-one shift.

Symbols are the paper's: sigma the shift's singular value, s1 = sigma_W1 and s2 = sigma_W2 the weights' gains along
it, d = delta_w = s1/s2 < 1. Where the paper contradicts itself, the right reading is the default, and the
name of the other says "as printed". Every function takes numbers or arrays that broadcast, and returns the broadcast
shape. "Slides" is the authors'
talk on the paper.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lora_flow.problems.factorization import Factorization

Value = Any  # a number or an array


class Gains(NamedTuple):
    """sigma, sigma_W1 and sigma_W2, from which all rates are made."""

    sigma: Value
    s1: Value
    s2: Value

    @property
    def d(self) -> Value:
        """delta_w."""
        return self.s1 / self.s2

    @property
    def rate(self) -> Value:
        """sigma sigma_W2, the unit of all rates."""
        return self.sigma * self.s2


def gains(problem: Factorization) -> Gains:
    spectrum = problem.spectrum()
    return Gains(spectrum["sigma_shift"][0], spectrum["sigma_w1"], spectrum["sigma_w2"])


# Early alignment (section 3, appendix C)


def linearised_flow(z: np.ndarray, left: np.ndarray, right: np.ndarray, growth: Value) -> np.ndarray:
    """Claim 3.1: Z(t) while the adapters are small, from Z(0) `(out + in, r)`; `growth` is sigma sigma_W t.

    With gamma = (left; right)/sqrt(2) and gammabar = (left; -right)/sqrt(2). The last term is missing from equation 10.
    """
    moving = linearised_flow_as_printed(z, left, right, growth)
    return moving + z - linearised_flow_as_printed(z, left, right, 0.0)


def linearised_flow_as_printed(z: np.ndarray, left: np.ndarray, right: np.ndarray, growth: Value) -> np.ndarray:
    """Equation 10 as printed: without the part of Z(0) that neither grows nor decays."""
    gamma, gammabar = np.concatenate([left, right]) / np.sqrt(2), np.concatenate([left, -right]) / np.sqrt(2)
    return np.exp(growth) * np.outer(gamma, gamma @ z) + np.exp(-growth) * np.outer(gammabar, gammabar @ z)


def growth_rate(c: Gains) -> Value:
    """d/dt log ||gamma_1^T Z_1||^2 of the linearised flow (Claim 3.1)."""
    return 2 * c.sigma * c.s2


def selection_rate(c: Gains) -> Value:
    """d/dt log (||gamma_1^T Z_1||^2 / ||gamma_2^T Z_2||^2) of the linearised flow (Claim 3.1)."""
    return 2 * c.sigma * (c.s2 - c.s1)


def early_time(c: Gains, alpha: Value, z_max: Value, w1: Value, w2: Value) -> Value:
    """That1, the end of early alignment (Theorem C.1); w1, w2 and sigma are spectral norms. May be negative."""
    size = c.sigma + w1**2 + w1 * w2 + w2**2 + np.sqrt(w1 + w2)
    return 2 / ((5 - c.d) * c.rate) * np.log(1 / (alpha * z_max**2 * size))


def escape_time(c: Gains, alpha: Value, z_max: Value) -> Value:
    """Ttil1: T1 lies in [That1, That1 + Ttil1] (Theorem C.2)."""
    return 2 * np.log(1 + (1 - c.d**2) * c.sigma**2 / (4 * alpha**2 * z_max**2)) / ((1 + c.d) * c.rate)


def t1_threshold(c: Gains) -> Value:
    """The value that g^T B1 A1 v first reaches at T1 (Theorem C.2)."""
    return (1 - c.d) * c.sigma / (4 * c.s2)


def t1_slides(c: Gains, alpha: Value) -> Value:
    """T1 = log(1/alpha) / (sigma sigma_W2) (slides)."""
    return -np.log(alpha) / c.rate


def alignment_exponent(d: Value) -> Value:
    """p in cos^2(U_Z1, gamma_1) >= 1 - b alpha^p, at That1 and at T1 (Theorems C.1, C.2)."""
    return (3 + d) / (5 - d)


def alignment_exponent_claim(d: Value) -> Value:
    """The weaker p of Claim 3.2."""
    return (1 + d) / (3 + d)


def imbalance_exponent(d: Value) -> Value:
    """p in ||Z1||^2 / ||Z2||^2 >= b alpha^-p (Theorems C.1, C.2)."""
    return 2 * (1 - d) / (5 - d)


def imbalance_exponent_claim(d: Value) -> Value:
    """Claim 3.2's p, twice `imbalance_exponent`. Right for ||B1 A1||^2 / ||B2 A2||^2, as on the slides."""
    return 4 * (1 - d) / (5 - d)


def alignment_floor(alpha: Value, h: int, m: int, norm_z1: Value) -> Value:
    """The level at which 1 - cos(gamma_1, U_Z1) stops with side "B": (h - m) alpha^2 / (2 ||Z1||^2).

    Derived for this project. The null space of W2, of dimension h - m, is never damped, so B1's random part in this
    space stays, and no other part does.
    """
    return (h - m) * alpha**2 / (2 * norm_z1**2)


# Local convergence (Theorem 3.2)


def local_loss_bound(c: Gains, loss_t1: Value, elapsed: Value, norm_ratio: Value, floor: Value) -> Value:
    """2 exp(-(1 - ||Z2(T1)||/||Z1(T2)||) (1 - d) sigma s2 (t - T1) / 16) L(T1) + floor (Theorem 3.2).

    `norm_ratio` is ||Z2(T1)|| / ||Z1(T2)|| and `floor` is c8 (1 - cos^2(T1)), with a c8 that the theorem leaves open.
    """
    return 2 * np.exp(-(1 - norm_ratio) * (1 - c.d) * c.rate * elapsed / 16) * loss_t1 + floor


def local_rate(c: Gains) -> Value:
    """The loss falls at least at this rate after T1, down to 2 alpha^c3 (Theorem 3.2, second form)."""
    return (1 - c.d) * c.rate / 32


# Spectral initialisation (section 4, appendices F and G)


def mode_field(c: Gains, state: np.ndarray) -> np.ndarray:
    """(a1', b1', a2', b2') of one mode, whose matrices stay diagonal (section 4)."""
    a1, b1, a2, b2 = state
    e = c.sigma - (c.s2 * b1 * a1 + c.s1 * b2 * a2 + b1 * a1 * b2 * a2)
    one, two = (c.s2 + b2 * a2) * e, (c.s1 + b1 * a1) * e
    return np.array([b1 * one, a1 * one, b2 * two, a2 * two])


def mode_growth_rate(c: Gains) -> Value:
    """d/dt log z1 is at least this until T1 (Theorem 4.1); from `mode_growth_start` on, not from 0 as printed."""
    return (3 + c.d) / 2 * c.rate


def mode_growth_start(c: Gains) -> Value:
    """The start of `mode_growth_rate`: a mode with one factor at zero first grows at 2 tanh(2 sigma s2 t) sigma s2."""
    return 0.5 * np.arctanh((3 + c.d) / 4) / c.rate


def mode_selection_rate(c: Gains) -> Value:
    """d/dt log (z1/z2) is at least this until T1 (Theorem 4.1)."""
    return 3 * (1 - c.d) / 2 * c.rate


def mode_t1_level(c: Gains) -> Value:
    """The level that z1 or z2 first reaches at a mode's T1, z_k = a_k^2 + b_k^2 (appendix F: z1(0) X)."""
    return (1 - c.d) * c.sigma / (8 * c.s2)


def mode_t1(c: Gains, z1: Value) -> Value:
    """The latest possible T1, by the least growth rate, for a mode that starts with z1(0) (appendix F).

    Modes grow faster than this rate, by 4/(3 + d) in the end. Taken for T1 itself, as printed, this time is too late,
    and the growth rate does not last until then.
    """
    return np.log(mode_t1_level(c) / z1) / mode_growth_rate(c)


def mode_t1_main_text(c: Gains, z1: Value) -> Value:
    """T1 with the main text's X = sigma / (16 z1(0)), which is later still."""
    return np.log(c.sigma / (16 * z1)) / mode_growth_rate(c)


def mode_local_rate(c: Gains) -> Value:
    """The loss of a mode falls at least at this rate after T1 (Theorem 4.1)."""
    return (1 - c.d) * c.rate / 8

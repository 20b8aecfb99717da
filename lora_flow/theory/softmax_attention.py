r"""The order parameters of `lora_flow.theory.attention` for softmax attention, over the rows of the pre-activations.

The proximal step of each sequence, which linear attention has in closed form, is made by Newton's method for a fixed
set of draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lora_flow.theory.attention import (
    CLOSE_IN_DRAWS,
    SEED,
    FineTuning,
    Law,
    Order,
    Pretraining,
    adapted,
    law,
    settle,
)

DRAWS = 6_000
STEPS = 60  # of Newton's method at the most
FLAT = 1e-9  # gradient at which it ends


class _Quadratic(NamedTuple):
    """A loss of x `(draw, k)` to second order: its value, gradient and Hessian, over draws."""

    value: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray


def attention(preactivation: np.ndarray) -> np.ndarray:
    """The softmax over the last axis."""
    up = np.exp(preactivation - preactivation.max(axis=-1, keepdims=True))
    return up / up.sum(axis=-1, keepdims=True)


def pretrain(
    alpha: float, ridge: float, *, tokens: int = 3, noise: float = 0.5, kappa0: float = 1.0, kappa: float = 1.0
) -> Pretraining:
    """Pre-training of softmax attention on alpha D^2 sequences, as `lora_flow.theory.attention.pretrain`."""
    rng, degrees, q0 = np.random.default_rng(SEED), tokens * (tokens + 1) // 2, 1 + kappa0
    teacher, other = np.sqrt(q0) * rng.normal(size=(DRAWS, degrees)), rng.normal(size=(DRAWS, degrees))
    basis = _symmetric_basis(tokens)
    disturbed = teacher + np.sqrt(noise / 2) * rng.normal(size=(DRAWS, degrees))
    label = attention(np.einsum("nk,ktu->ntu", disturbed, basis))
    kept = {"g": other}

    def loss(g: np.ndarray) -> _Quadratic:
        value, slope, hessian = _of_rows(np.einsum("nk,ktu->ntu", g, basis), label)
        return _Quadratic(
            value, np.einsum("ntu,ktu->nk", slope, basis), np.einsum("ktu,ntuv,ltv->nkl", basis, hessian, basis)
        )

    def channel(q: float, m: float, v: float) -> tuple[Law, Order, float]:
        omega = m / q0 * teacher + np.sqrt(max(q - m**2 / q0, 0.0)) * other
        kept["g"], at, response = proximal(loss, omega, v, kept["g"])
        f = (kept["g"] - omega) / v
        vh = alpha * float(np.mean(degrees - response)) / v
        mh = (alpha * float(np.mean(np.sum(f * teacher, axis=1))) + m * vh) / q0
        qh = alpha * float(np.mean(np.sum(f**2, axis=1)))
        return *law(vh, mh, qh, ridge * np.sqrt(kappa), kappa0), float(np.mean(at.value))

    q, m, v = settle(lambda *order: channel(*order)[1], (q0 / 2, q0 / 2, 1.0), CLOSE_IN_DRAWS)
    (eta, delta, eps), _, train_error = channel(q, m, v)
    return Pretraining(q, m, v, eta, delta, eps, train_error, tokens, noise, kappa0)


def fine_tune(pretraining: Pretraining, ratio: float, ridge: float, *, q0: float = 1.0) -> FineTuning:
    """Fine-tuning of softmax attention by w on alpha' D new sequences, `ratio` = alpha', with the ridge lambda'."""
    drawn = _Drawn.of(pretraining, q0)
    kept = {"chi": drawn.teacher}

    def channel(q: float, m: float, v: float) -> tuple[Order, float]:
        omega = drawn.adapter(q, m, q0)
        kept["chi"], at, response = proximal(lambda chi: drawn.loss(chi, q), omega, v, kept["chi"])
        f = (kept["chi"] - omega) / v
        vh = ratio * float(np.mean(pretraining.tokens - response)) / v
        mh = (ratio * float(np.mean(np.sum(f * drawn.teacher, axis=1))) + m * vh) / q0
        qh = ratio * float(np.mean(np.sum(f**2, axis=1)))
        centring = -ratio * float(np.mean(np.einsum("ntt->n", drawn.slope(kept["chi"], q))))
        return adapted(vh, mh, qh, centring, ridge, q0), float(np.mean(at.value))

    q, m, v = settle(lambda *order: channel(*order)[0], (q0, 0.9 * q0, 0.1), CLOSE_IN_DRAWS)
    return FineTuning(q, m, v, q0, channel(q, m, v)[1])


def generalisation_error(pretraining: Pretraining, tuned: FineTuning) -> float:
    """The error on a new sequence, `||attention - label||_F^2`, over the same draws."""
    drawn = _Drawn.of(pretraining, tuned.q0)
    chi = drawn.adapter(tuned.q, tuned.m, tuned.q0)
    return float(np.mean(_of_rows(drawn.preactivation(chi, tuned.q), drawn.label)[0]))


def proximal(
    loss: Callable[[np.ndarray], _Quadratic], omega: np.ndarray, v: float, start: np.ndarray
) -> tuple[np.ndarray, _Quadratic, np.ndarray]:
    """The minimum x of `|x - omega|^2/(2 v) + loss(x)`, the loss there, and the trace of dx/domega, for each draw."""
    unit, x = np.eye(omega.shape[1]), start
    damping = np.zeros(len(x))

    def whole(x: np.ndarray, at: _Quadratic) -> np.ndarray:
        return np.sum((x - omega) ** 2, axis=1) / (2 * v) + at.value

    at = loss(x)
    for _ in range(STEPS):
        slope = (x - omega) / v + at.gradient
        if np.max(np.abs(slope)) * v < FLAT:
            break
        values, vectors = np.linalg.eigh(at.hessian + unit / v)
        along = np.einsum("nij,ni->nj", vectors, slope) / (np.maximum(np.abs(values), 0.1 / v) + damping[:, None])
        tried = x - np.einsum("nij,nj->ni", vectors, along)
        new = loss(tried)
        better = whole(tried, new) <= whole(x, at) + 1e-14
        damping = np.where(better, damping / 8, 4 * damping + 1 / v)
        damping[damping < 1e-3 / v] = 0.0
        x = np.where(better[:, None], tried, x)
        at = _Quadratic(
            np.where(better, new.value, at.value),
            np.where(better[:, None], new.gradient, at.gradient),
            np.where(better[:, None, None], new.hessian, at.hessian),
        )
    response = np.einsum("nii->n", np.linalg.inv(unit + v * at.hessian))
    return x, at, response


class _Drawn(NamedTuple):
    """The Gaussian variables of fine-tuning, over draws."""

    teacher: np.ndarray  # chi*
    other: np.ndarray
    frozen: np.ndarray  # z
    label: np.ndarray

    @classmethod
    def of(cls, pretraining: Pretraining, q0: float) -> _Drawn:
        rng, tokens = np.random.default_rng(SEED), pretraining.tokens
        basis = _symmetric_basis(tokens)
        teacher, other = np.sqrt(q0) * rng.normal(size=(DRAWS, tokens)), rng.normal(size=(DRAWS, tokens))
        first, second, third = rng.normal(size=(3, DRAWS, len(basis)))
        told = pretraining.m / np.sqrt(pretraining.q) if pretraining.q > 0 else 0.0
        rest = pretraining.q0 - told**2
        known = told * first + np.sqrt(rest) * second + np.sqrt(pretraining.noise / 2) * third
        known = np.einsum("nk,ktu->ntu", known, basis)
        frozen = np.sqrt(pretraining.q) * np.einsum("nk,ktu->ntu", first, basis)
        centred = teacher[:, :, None] * teacher[:, None] - q0 * np.eye(tokens)
        return cls(teacher, other, frozen, attention(known + centred))

    def adapter(self, q: float, m: float, q0: float) -> np.ndarray:
        """Gaussian chi with the variance q, and m with the teacher's."""
        return m / q0 * self.teacher + np.sqrt(max(q - m**2 / q0, 0.0)) * self.other

    def preactivation(self, chi: np.ndarray, q: float) -> np.ndarray:
        return self.frozen + chi[:, :, None] * chi[:, None] - q * np.eye(chi.shape[1])

    def slope(self, chi: np.ndarray, q: float) -> np.ndarray:
        """The loss's derivative with respect to the pre-activation."""
        return _of_rows(self.preactivation(chi, q), self.label)[1]

    def loss(self, chi: np.ndarray, q: float) -> _Quadratic:
        value, slope, hessian = _of_rows(self.preactivation(chi, q), self.label)
        both, unit = slope + slope.mT, np.eye(chi.shape[1])
        # the derivative of chi_t chi_u with respect to chi_k
        first = unit[None, :, None] * chi[:, None, :, None] + unit[None, None] * chi[:, :, None, None]
        curved = np.einsum("ntuk,ntuv,ntvl->nkl", first, hessian, first, optimize=True)
        return _Quadratic(value, np.einsum("nkt,nt->nk", both, chi), curved + both)


def _of_rows(preactivation: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`||softmax - label||_F^2` over the draws, its gradient, and the Hessian of each row, `(draw, T, T, T)`."""
    s = attention(preactivation)
    r = s - label
    mean = np.sum(s * r, axis=-1, keepdims=True)
    slope = s * (r - mean)
    unit = np.eye(s.shape[-1])
    spread = s[..., None] * (unit - s[..., None, :])
    hessian = spread @ spread + (r - mean)[..., None] * spread - s[..., None] * slope[..., None, :]
    return np.sum(r**2, axis=(-2, -1)), 2 * slope, 2 * hessian


def _symmetric_basis(tokens: int) -> np.ndarray:
    """Symmetric matrices `(T (T + 1)/2, T, T)`: z = sum of g_k times them has z's law for equal, independent g_k."""
    places = [(t, u) for t in range(tokens) for u in range(t, tokens)]
    basis = np.zeros((len(places), tokens, tokens))
    for k, (t, u) in enumerate(places):
        basis[k, t, u] = basis[k, u, t] = 1.0 if t != u else np.sqrt(2.0)
    return basis

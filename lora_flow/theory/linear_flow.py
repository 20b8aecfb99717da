r"""Gradient flow of two-layer linear networks: the rates and the implicit bias of Min et al. 2021 and 2022.

Notation and references are in `linear_networks`. Min et al. write U for W1 and V^T for W2. With X of rank r,
X = Wx S^{1/2} Phi1^T, the flow moves Phi1^T U and V alone, as if X were S^{1/2} and Y were Wx^T Y. `reduce` makes this
problem, of shapes (r, r), (r, m), (r, h), (h, m), whose loss falls to zero. Rates are in units of the flow's time t.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.checks import concrete, require
from lora_flow.theory.linear_networks import (
    First,
    Inputs,
    Matrix,
    Scalar,
    Second,
    Spectrum,
    Targets,
    Value,
    alpha,
    gaps,
    imbalance,
    imbalance_spectrum,
    residual,
    singular_values,
)


class Reduced(NamedTuple):
    """The part of a problem that the flow moves, and the part that stays (Min et al. 2021)."""

    wx: Float[Array, "N r"]
    s: Float[Array, " r"]  # the diagonal of S: eigenvalues of X^T X, in decreasing order
    phi1: Float[Array, "n r"]
    y: Float[Array, "r m"]  # Yt = Wx^T Y
    u1: Float[Array, "r h"]  # Phi1^T U
    outside: Float[Array, "n h"]  # Phi2 U2 = U - Phi1 U1, which does not move
    w2: Float[Array, "h m"]  # V^T
    least_loss: Value  # L* = 1/2 ||Y - Wx Wx^T Y||_F^2

    @property
    def x(self) -> Float[Array, "r r"]:
        """S^{1/2}."""
        return jnp.diag(jnp.sqrt(self.s))

    @property
    def network(self) -> tuple[Matrix, Matrix, Matrix, Matrix]:
        """(X, Y, W1, W2) of the reduced problem: the loss is L - L*; `linear_descent`, `linear_local` apply."""
        return self.x, self.y, self.u1, self.w2

    @property
    def error(self) -> Float[Array, "r m"]:
        """E = Wx^T Y - S^{1/2} U1 V^T, with L - L* = 1/2 ||E||_F^2."""
        return residual(*self.network)

    @property
    def imbalance(self) -> Float[Array, "h h"]:
        """Lam = U1^T U1 - V^T V, which the flow conserves."""
        return imbalance(self.u1, self.w2)


def reduce(x: Inputs, y: Targets, w1: First, w2: Second, rank: int | None = None) -> Reduced:
    """Wx, S, Phi1, Wx^T Y, U1 and the part that stays (Min et al. 2021), for X of any rank above zero.

    `rank` must be given where X is traced, and is X's numerical rank otherwise. Raises InputError if it cannot be.
    """
    left, values, right = _thin(x, rank)
    y, w1, w2 = (jnp.asarray(matrix) for matrix in (y, w1, w2))
    u1 = right.T @ w1
    inside = left.T @ y
    least = 0.5 * jnp.sum((y - left @ inside) ** 2)
    return Reduced(left, values**2, right, inside, u1, w1 - right @ u1, w2, least)


def min_norm_solution(x: Inputs, y: Targets, rank: int | None = None) -> Float[Array, "n m"]:
    """X^+ Y = Phi1 S^{-1/2} Wx^T Y, the least of the solutions (Min et al. 2021); `rank` as in `reduce`."""
    left, values, right = _thin(x, rank)
    return right @ ((left.T @ y) / values[:, None])


def _thin(x: Inputs, rank: int | None) -> tuple[Float[Array, "N r"], Float[Array, " r"], Float[Array, "n r"]]:
    if rank is None:
        values = concrete(x)
        require(values is not None, "rank", "be given where X is traced", rank)
        rank = int(np.linalg.matrix_rank(np.asarray(values)))
    require(1 <= rank <= min(x.shape), "rank", f"be from 1 to {min(x.shape)}", rank)
    left, roots, right = jnp.linalg.svd(jnp.asarray(x), full_matrices=False)
    return left[:, :rank], roots[:rank], right[:rank].T


# Convergence. With d/dt log(L - L*) <= -rate, L - L* falls at least like exp(-rate t).


def imbalance_level(spectrum: Spectrum, r: int, m: int) -> Scalar:
    """c = [lambda_r(Lam)]+ + [lambda_m(-Lam)]+ (Min et al. 2021, Theorem 1): Delta, r for n; `spectrum` is Lam's."""
    return gaps(spectrum, r, m).delta


def imbalance_rate(start: Reduced) -> Scalar:
    """2 lambda_r(S) c, the rate at all times (Min et al. 2021, Theorem 1)."""
    r, m = start.y.shape
    return 2 * start.s[-1] * imbalance_level(imbalance_spectrum(start.u1, start.w2), r, m)


def instantaneous_rate(now: Reduced) -> Scalar:
    """2 lambda_r(S) alpha(Lam; sigma_m(U1 V^T), sigma_r(U1 V^T)), the rate now (Min et al. 2022, Proposition 1)."""
    r, m = now.y.shape
    s_m, s_r = singular_values(now.u1 @ now.w2, m, r)
    return 2 * now.s[-1] * alpha(imbalance_spectrum(now.u1, now.w2), s_m, s_r, r, m)


def global_rate(start: Reduced) -> Scalar:
    """The rate at all times (Min et al. 2022, Theorem 3): `instantaneous_rate` at the least singular values possible,

    [sigma_k(Yt) - ||Yt - S^{1/2} U1 V^T(0)||_F]+ / sqrt(lambda_1(S)), in the place of sigma_k(U1 V^T).
    """
    r, m = start.y.shape
    off = jnp.linalg.norm(start.error)
    s_m, s_r = (jnp.maximum(value - off, 0.0) / jnp.sqrt(start.s[0]) for value in singular_values(start.y, m, r))
    return 2 * start.s[-1] * alpha(imbalance_spectrum(start.u1, start.w2), s_m, s_r, r, m)


def scalar_rate(d: Value, w: Value, s: Value = 1.0) -> Value:
    """2 s sqrt(d^2 + 4 w^2), the rate itself for n = m = h = 1, with d = u^2 - v^2 and w = u v (Min et al. 2022)."""
    return 2 * s * jnp.sqrt(d**2 + 4 * w**2)


class Gains(NamedTuple):
    """The gains of a trained network's two weights along a singular pair of the target."""

    first: Value  # ||W1^T u||, of the pair's side in the inputs; sigma_W1 of a LoRA problem
    second: Value  # ||W2 v||; sigma_W2

    @property
    def ratio(self) -> Value:
        """delta_w."""
        return self.first / self.second


def trained_gains(sigma: Value, a: Float[Array | np.ndarray, " h"], b: Float[Array | np.ndarray, " h"]) -> Gains:
    r"""The gains along a target's singular pair (u, v) once it is learned, X = I; a = W1^T u, b = W2 v of the start.

    The imbalance keeps d = ||a||^2 - ||b||^2 and p = ||a||^2 ||b||^2 - (a . b)^2, the squared area between a and b, and
    a . b ends at sigma: so ||a||^2 and -||b||^2 are the roots of x^2 - d x - (sigma^2 + p) = 0.

    Exact where the pairs do not meet in the hidden layer, from a start along the singular vectors or from one whose
    rows of W1 and columns of W2 are all orthogonal, as those of wide layers nearly are. Derived for this project.
    """
    square_a, square_b, overlap = jnp.sum(a**2), jnp.sum(b**2), jnp.sum(a * b)
    d, p = square_a - square_b, square_a * square_b - overlap**2
    root = jnp.sqrt(d**2 + 4 * (sigma**2 + p))
    larger = (root + jnp.abs(d)) / 2
    smaller = (sigma**2 + p) / larger
    return Gains(*(jnp.sqrt(jnp.where(sign * d >= 0, larger, smaller)) for sign in (1, -1)))


def loss_bound(rate: Value, t: Value, excess: Value) -> Value:
    """exp(-rate t) (L(0) - L*), at least L(t) - L* (Min et al. 2021, Theorem 1; Min et al. 2022, Theorem 3)."""
    return jnp.exp(-rate * t) * excess


# Implicit bias. The flow goes to X^+ Y from where V U2^T = 0 and U1 U2^T = 0 (Min et al. 2021, Proposition 1).


def bias_invariants(start: Reduced) -> tuple[Float[Array, "m n"], Float[Array, "r n"]]:
    """(V U2^T Phi2^T, U1 U2^T Phi2^T): if both are zero they stay zero, and the flow goes to X^+ Y.

    This is Proposition 1 of Min et al. 2021: the two obey
    `d/dt [V U2^T; U1 U2^T] = [[0, E^T S^{1/2}], [S^{1/2} E, 0]] [V U2^T; U1 U2^T]`.
    """
    return start.w2.T @ start.outside.T, start.u1 @ start.outside.T


def width_bound(h: Value, a: Value, s: Spectrum, y_norm: Value, n: int, m: int, failure: Value) -> Value:
    """At most this is ||U V^T(inf) - X^+ Y||_2 for a wide network with entries N(0, h^{-2a}), 1/4 < a <= 1/2:

    2 C^{1/h^{1-2a}} sqrt(m + r) (sqrt(m + n) + 1/2 log(2/failure)) / h^{2a - 1/2},
    C = exp(1 + sqrt(lambda_1(S)) ||Y||_F / lambda_r(S)), with probability 1 - failure (Min et al. 2021, Theorem 2).

    `s` is S's diagonal and `y_norm` ||Y||_F. The theorem leaves open how wide: h > h_0^{1/(4a - 1)}.
    """
    log_c = 1 + jnp.sqrt(s[0]) * y_norm / s[-1]
    size = jnp.sqrt(m + len(s)) * (jnp.sqrt(m + n) + 0.5 * jnp.log(2 / failure))
    return 2 * jnp.exp(log_c * h ** (2 * a - 1)) * size * h ** (0.5 - 2 * a)


def width_imbalance(h: Value, a: Value) -> Value:
    """h^{1-2a}: lambda_r(Lam) + lambda_m(-Lam) is above it for such networks (Min et al. 2021, Lemma 1)."""
    return h ** (1 - 2 * a)

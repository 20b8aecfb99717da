r"""Gradient descent of two-layer linear networks, at fixed and adaptive steps: Xu et al. 2023 (AISTATS).

Notation and references are in `linear_networks`. X has full column rank and Y lies in its range, so the loss can fall
to zero; `linear_flow.reduce` brings any problem into this form. A step is W1 - eta G W2^T, W2 - eta W1^T G, and
0 < c1 < 1 < c2 say how far lmin(tau) may fall below alpha_0 and lmax(tau) rise above beta_0 along the way.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_flow.theory.linear_networks import (
    First,
    Inputs,
    Scalar,
    Second,
    Targets,
    Value,
    alpha,
    beta,
    curvature,
    imbalance_spectrum,
    product_gradient,
    residual,
    root_of_increasing,
    singular_values,
    tau_largest,
    tau_smallest,
)
from lora_flow.theory.linear_networks import loss as loss_of


class Constants(NamedTuple):
    """The constants of a start, or of any weights on the way (Xu et al. 2023)."""

    mu: Value
    K: Value
    p_m: Value  # p1 as a bound of sigma_m(W), and of sigma_n(W): zero where W has no such singular value
    p_n: Value
    p2: Value
    alpha: Value
    beta: Value
    loss: Value

    @property
    def kappa(self) -> Value:
        """K/mu."""
        return self.K / self.mu

    @property
    def p1(self) -> Value:
        """[sigma_min(Y) - ||E||_F]+ / sigma_max(X)."""
        return jnp.maximum(self.p_m, self.p_n)


def constants(x: Inputs, y: Targets, w1: First, w2: Second) -> Constants:
    """mu, K, p1, p2, alpha_0, beta_0 and L of these weights (Xu et al. 2023):

    p1 = [sigma_min(Y) - ||E||_F]+ / sigma_max(X), p2 = (||Y||_F + ||E||_F) / sigma_min(X),
    alpha_0 = alpha(D; p1, p1), which for n != m must be alpha(D; p_m, p_n), and beta_0 = beta(D; p2).

    While the loss does not rise, p_k <= sigma_k(W) and ||W||_F <= p2.
    """
    n, m = w1.shape[0], w2.shape[1]
    mu, k = curvature(x)
    y, off = jnp.asarray(y), jnp.linalg.norm(residual(x, y, w1, w2))
    p1 = jnp.maximum(singular_values(y, min(n, m))[0] - off, 0.0) / jnp.sqrt(k)
    p_m, p_n = (p1 if i == min(n, m) else jnp.zeros_like(p1) for i in (m, n))
    p2 = (jnp.linalg.norm(y) + off) / jnp.sqrt(mu)
    spectrum = imbalance_spectrum(w1, w2)
    lowest, highest = alpha(spectrum, p_m, p_n, n, m), beta(spectrum, p2)
    return Constants(mu, k, p_m, p_n, p2, lowest, highest, loss_of(x, y, w1, w2))


# Rates


class RateBound(NamedTuple):
    """1 - a1 eta + a2 eta^2 + a3 eta^3 + a4 eta^4, at least L(t + 1)/L(t); no coefficient is negative."""

    a1: Value
    a2: Value
    a3: Value
    a4: Value

    def at(self, eta: Value) -> Value:
        return 1 - eta * (self.a1 - eta * (self.a2 + eta * (self.a3 + eta * self.a4)))

    def best_step(self) -> Scalar:
        """Where the derivative with respect to eta is zero (Xu et al. 2023)."""
        return root_of_increasing(self.a1, (2 * self.a2, 3 * self.a3, 4 * self.a4))


def rate(x: Inputs, y: Targets, w1: First, w2: Second) -> RateBound:
    """rho(eta) = 1 - 2 eta mu lmin + K mu eta^2 lmax^2 + 2 eta^2 mu g + 2 eta^3 mu K lmax g + eta^4 mu K g^2,

    g = ||G||_F sigma_1(W): L+ <= rho L for the steps with `rate_margin` >= 0 (Xu et al. 2023, Lemma 3.1).
    """
    mu, k = curvature(x)
    lowest, highest, g = tau_smallest(w1, w2), tau_largest(w1, w2), _second_order(x, y, w1, w2)
    return RateBound(2 * mu * lowest, mu * (k * highest**2 + 2 * g), 2 * mu * k * highest * g, mu * k * g**2)


def rate_margin(x: Inputs, y: Targets, w1: First, w2: Second, eta: Value) -> Value:
    """lmin - eta g - (K eta/2) (lmax + eta g)^2, whose sign says if the rate holds (Xu et al. 2023, Lemma 3.1)."""
    g = _second_order(x, y, w1, w2)
    return tau_smallest(w1, w2) - eta * g - 0.5 * curvature(x).K * eta * (tau_largest(w1, w2) + eta * g) ** 2


def _second_order(x: Inputs, y: Targets, w1: First, w2: Second) -> Scalar:
    """g = ||G||_F sigma_1(W), a bound of G W^T G relative to G."""
    return jnp.linalg.norm(product_gradient(x, y, w1, w2)) * singular_values(w1 @ w2, 1)[0]


def rate_bound(start: Constants, loss: Value, c1: Value, c2: Value) -> RateBound:
    """f(eta, t), at least rho(eta) while c1 alpha_0 <= lmin and lmax <= c2 beta_0 (Xu et al. 2023), at L = L(t):

    a1 = 2 c1 alpha_0 mu, a2 = 2 p2 sqrt(2 kappa L mu^3) + kappa mu^2 (c2 beta_0)^2,
    a3 = 2 c2 beta_0 p2 sqrt(2 kappa^3 L mu^5), a4 = 2 kappa^2 mu^3 p2^2 L.
    """
    mu, k = start.mu, start.K
    g = jnp.sqrt(2 * k * loss) * start.p2
    highest = c2 * start.beta
    return RateBound(2 * c1 * start.alpha * mu, mu * (2 * g + k * highest**2), 2 * mu * k * highest * g, mu * k * g**2)


def current_rate_bound(x: Inputs, y: Targets, w1: First, w2: Second) -> RateBound:
    """rhohat(eta): f with p2, alpha and beta of the current weights and c1 = c2 = 1 (Xu et al. 2023)."""
    now = constants(x, y, w1, w2)
    return rate_bound(now, now.loss, 1.0, 1.0)


def asymptotic_rate(start: Constants, c1: Value, c2: Value) -> Value:
    """1 - (c1 alpha_0/(c2 beta_0))^2/kappa, the least that f(., t) goes to as L(t) does to zero (Xu et al. 2023)."""
    return 1 - (c1 * start.alpha / (c2 * start.beta)) ** 2 / start.kappa


# Steps


class LargestStep(NamedTuple):
    """The two bounds of the step (Xu et al. 2023): the first keeps lmax <= c2 beta_0, the second lmin >= c1 alpha_0."""

    above: Value
    below: Value

    @property
    def step(self) -> Value:
        return jnp.minimum(self.above, self.below)


def largest_step(start: Constants, c1: Value, c2: Value) -> LargestStep:
    """The positive roots of a4 eta^3 + a3 eta^2 + (a2 + q) eta = a1, the coefficients being those of f(., 0), for

    q = 4 c2 L_0 K/(c2 - 1) and q = 8 c2 beta_0 L_0 K/((1 - c1) alpha_0) (Xu et al. 2023). Zero where alpha_0 is.

    For any step up to `.step`: c1 alpha_0 <= lmin, lmax <= c2 beta_0 and L(t + 1) <= f(eta, t) L(t), at all t.
    """
    f = rate_bound(start, start.loss, c1, c2)
    lowest = jnp.where(start.alpha > 0, start.alpha, 1.0)
    drift = 4 * c2 * start.loss * start.K
    above, below = (
        root_of_increasing(f.a1, (f.a2 + q, f.a3, f.a4))
        for q in (drift / (c2 - 1), 2 * drift * start.beta / ((1 - c1) * lowest))
    )
    return LargestStep(above, below)


def adaptive_step(bound: RateBound, largest: Value) -> Value:
    """eta_t = min(eta_max, the best step by `bound`): any of rho, rhohat, f(., t) and f(., 0) (Xu et al. 2023)."""
    return jnp.minimum(largest, bound.best_step())


def arora_step(p1: Value, y: Targets) -> Scalar:
    """p1^3/(6144 2^3 ||Y||_F^4), Arora et al. 2019 (arXiv 1810.02281, Theorem 1), for two layers."""
    return p1**3 / (6144 * 2**3 * jnp.linalg.norm(jnp.asarray(y)) ** 4)


def du_step(t: Value, epsilon: Value, r: int, y: Targets) -> Value:
    """sqrt(epsilon/r)/(100 (t + 1) ||Y||_F^{3/2}), Du, Hu and Lee 2018 (arXiv 1806.00900)."""
    return jnp.sqrt(epsilon / r) / (100 * (t + 1) * jnp.linalg.norm(jnp.asarray(y)) ** 1.5)


# Drift of the imbalance


def imbalance_change(x: Inputs, y: Targets, w1: First, w2: Second, eta: Value) -> Float[Array, "h h"]:
    """D+ - D = eta^2 (W2 G^T G W2^T - W1^T G G^T W1), exactly (Xu et al. 2023)."""
    g = product_gradient(x, y, w1, w2)
    one, two = w1.T @ g, g @ w2.T
    return eta**2 * (two.T @ two - one @ one.T)


def imbalance_change_bound(x: Inputs, y: Targets, w1: First, w2: Second, eta: Value) -> Value:
    """2 eta^2 K lmax(tau) L, at least ||D+ - D||_F (Xu et al. 2023)."""
    return 2 * eta**2 * curvature(x).K * tau_largest(w1, w2) * loss_of(x, y, w1, w2)


def imbalance_drift_bound(start: Constants, eta: Value, c1: Value, c2: Value) -> Value:
    """2 c2 beta_0 K L_0 eta^2/(1 - f(eta, 0)), at least ||D_t - D_0||_F for a fixed step (Xu et al. 2023)."""
    f = rate_bound(start, start.loss, c1, c2)
    return 2 * c2 * start.beta * start.K * start.loss * eta**2 / (1 - f.at(eta))

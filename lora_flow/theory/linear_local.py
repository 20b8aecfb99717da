r"""A local Polyak-Łojasiewicz inequality and descent lemma for two-layer linear networks: Xu et al. 2025 (TMLR).

Notation and references are in `linear_networks`. The loss is L = l(W1 W2), l any mu-strongly convex and K-smooth
function of the product with minimum 0, at W*: 1/2 ||Y - X W||_F^2 with Y in the range of X, say, and mu, K =
`curvature(x)`. W2 in Xu et al. 2025 is the transpose of W2 here, `(h, m)`. Theorem 3.2 is Theorem E.1 with c = 1/2
and d = 2, and is the default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_flow.theory.linear_networks import (
    Curvature,
    First,
    Product,
    Scalar,
    Second,
    Value,
    alpha,
    beta,
    imbalance_spectrum,
    root_of_increasing,
    singular_values,
    tau_largest,
    tau_smallest,
)


def pl_constant(mu: Value, w1: First, w2: Second) -> Value:
    """mu_t = mu (sigma_min(W1)^2 + sigma_min(W2)^2): 1/2 ||grad L||^2 >= mu_t L (Xu et al. 2025, Theorem 3.1)."""
    return mu * tau_smallest(w1, w2)


class Smoothness(NamedTuple):
    """K_t(eta) = k0 + k1 eta + k2 eta^2, which depends on the step that it is to allow."""

    k0: Value
    k1: Value
    k2: Value

    def at(self, eta: Value) -> Value:
        return self.k0 + eta * (self.k1 + eta * self.k2)

    def step(self) -> Scalar:
        """1/K_t, the root of eta K_t(eta) = 1 (Xu et al. 2025)."""
        return root_of_increasing(1.0, self)


def smoothness(K: Value, loss: Value, w1: First, w2: Second) -> Smoothness:
    """K_t = K smax2 + sqrt(2 K L) + 6 K^2 sigma_1(W) L eta^2 + 3 K smax2 sqrt(2 K L) eta.

    That is Theorem 3.1 of Xu et al. 2025, with smax2 = sigma_max(W1)^2 + sigma_max(W2)^2. L+ <= L - (eta - K_t eta^2/2)
    ||grad L||_F^2.
    """
    highest, root = K * tau_largest(w1, w2), jnp.sqrt(2 * K * loss)
    (largest,) = singular_values(w1 @ w2, 1)
    return Smoothness(highest + root, 3 * highest * root, 6 * K**2 * largest * loss)


def rate(pl: Value, smooth: Value, eta: Value) -> Value:
    """rho = 1 - 2 mu_t eta + mu_t K_t eta^2, at least L+/L while eta K_t < 2 (Xu et al. 2025, Theorem 3.1)."""
    return 1 - 2 * pl * eta + pl * smooth * eta**2


# Theorem E.1


class Constants(NamedTuple):
    """The constants of Theorem E.1 that do not depend on the step."""

    mu: Value
    K: Value
    loss: Value
    b_m: Value  # b1 as a bound of sigma_m(W), and of sigma_n(W): zero where W has no such singular value
    b_n: Value
    b2: Value
    a1: Value
    a2: Value

    @property
    def b1(self) -> Value:
        """[sigma_min(W*) - sqrt(kappa) ||W_0 - W*||_F]+."""
        return jnp.maximum(self.b_m, self.b_n)


def constants(curvature: Curvature, loss: Value, optimum: Product, w1: First, w2: Second) -> Constants:
    """b1 = [sigma_min(W*) - sqrt(kappa) ||W_0 - W*||_F]+, b2 = sigma_max(W*) + sqrt(kappa) ||W_0 - W*||_F,

    a1 = alpha(D_0; b1, b1), which for n != m must be alpha(D_0; b_m, b_n), and a2 = beta(D_0; b2): Theorem E.1 of
    Xu et al. 2025.
    """
    n, m = optimum.shape
    far = jnp.sqrt(curvature.kappa) * jnp.linalg.norm(w1 @ w2 - jnp.asarray(optimum))
    s_m, s_n, s_1 = singular_values(optimum, m, n, 1)
    b_m, b_n = jnp.maximum(s_m - far, 0.0), jnp.maximum(s_n - far, 0.0)
    b2, spectrum = s_1 + far, imbalance_spectrum(w1, w2)
    return Constants(curvature.mu, curvature.K, loss, b_m, b_n, b2, alpha(spectrum, b_m, b_n, n, m), beta(spectrum, b2))


class Schedule(NamedTuple):
    """The growing steps of Theorem E.1 from eta0 on, and what they guarantee."""

    start: Constants
    eta0: Value
    c: Value = 0.5
    d: Value = 2.0

    @property
    def growth(self) -> Value:
        """e^{eta0^c}: lmax(tau) stays below this times a2."""
        return jnp.exp(self.eta0**self.c)

    @property
    def mubar(self) -> Value:
        """mu (a1 + 2 a2 (1 - e^{eta0^c})), at most mu_t for all t."""
        return self.start.mu * (self.start.a1 - 2 * self.start.a2 * jnp.expm1(self.eta0**self.c))

    @property
    def rhobar(self) -> Value:
        """rhobar_0 = 1 - 2 mubar eta0 + mubar Kbar_0 eta0^2: L(t) <= L_0 rhobar_0^t."""
        return rate(self.mubar, self._smoothness(1.0, 1.0), self.eta0)

    @property
    def Dbar(self) -> Value:
        """(1 + eta0^d) rhobar_0: eta_t^2 L(t) <= eta0^2 L_0 Dbar^t."""
        return (1 + self.eta0**self.d) * self.rhobar

    def smoothness(self, t: Value) -> Value:
        """Kbar_t, at least K_t: sqrt(2 K L_0 rhobar_0^t) + 6 K^2 b2 L_0 eta0^2 Dbar^t

        + K e^{eta0^c} a2 (1 + 3 sqrt(2 K L_0 Dbar^t) eta0); the exponential is printed for c = 1/2.
        """
        return self._smoothness(self.rhobar**t, self.Dbar**t)

    def _smoothness(self, fall: Value, steps: Value) -> Value:
        k, loss = self.start.K, self.start.loss
        third = k * self.growth * self.start.a2 * (1 + 3 * jnp.sqrt(2 * k * loss * steps) * self.eta0)
        return jnp.sqrt(2 * k * loss * fall) + 6 * k**2 * self.start.b2 * loss * self.eta0**2 * steps + third

    def step(self, t: Value, largest: Value) -> Value:
        """eta_t = min{(1 + eta0^d)^{t/2} eta0, 1/K_t}; `largest` is 1/K_t, `Smoothness.step`, or 1/Kbar_t."""
        return jnp.minimum(self.eta0 * jnp.exp(0.5 * t * jnp.log1p(self.eta0**self.d)), largest)

    def imbalance_drift_bound(self) -> Value:
        """2 K eta0^2 a2 e^{eta0^c} L_0/(1 - Dbar), at least ||D_t - D_0||_F."""
        return 2 * self.start.K * self.eta0 * self.start.a2 * self.growth * self.start.loss / self._contraction

    def drift_margin(self) -> Value:
        """((1 - e^{-eta0^c}) (1 - Dbar) - 4 K L_0 eta0^2)/eta0: eta0 is small enough while it is positive."""
        drift = 4 * self.start.K * self.start.loss * self.eta0
        return -jnp.expm1(-(self.eta0**self.c)) * self._contraction - drift

    @property
    def _contraction(self) -> Value:
        """(1 - Dbar)/eta0, without the cancellation at small steps."""
        fall = self.mubar * (2 - self._smoothness(1.0, 1.0) * self.eta0)
        return (1 + self.eta0**self.d) * fall - self.eta0 ** (self.d - 1)


class LargestStep(NamedTuple):
    """The three conditions of Theorem E.1, each as the least eta0 that breaks it."""

    smooth: Value  # eta0 Kbar_0 = 1
    drift: Value  # 4 K L_0 eta0^2 = (1 - e^{-eta0^c}) (1 - Dbar)
    positive: Value  # mubar = 0

    @property
    def step(self) -> Value:
        """eta_max."""
        return jnp.minimum(jnp.minimum(self.smooth, self.drift), self.positive)


def largest_step(start: Constants, c: Value = 0.5, d: Value = 2.0) -> LargestStep:
    """The roots of eta0 Kbar_0 = 1 and of 4 K L_0 eta0^2 = (1 - e^{-eta0^c}) (1 - Dbar), the smallest positive one, and

    [log(1 + a1/(2 a2))]^{1/c}: their minimum is eta_max (Xu et al. 2025, Theorem E.1). Zero where a1 is.

    The second root exists for a1 > 0: the right-hand side is negative where eta0 Kbar_0 = 2 and where mubar = 0.
    """

    def room(eta: Array) -> Array:
        return 1 - eta * Schedule(start, eta, c, d)._smoothness(1.0, 1.0)

    def drift(eta: Array) -> Array:
        return Schedule(start, eta, c, d).drift_margin()

    smooth = _first_root(room, 1 / (jnp.sqrt(2 * start.K * start.loss) + start.K * start.a2))
    positive = jnp.log1p(start.a1 / (2 * start.a2)) ** (1 / c)
    return LargestStep(smooth, _first_root(drift, jnp.minimum(2 * smooth, positive)), positive)


def _first_root(function: Callable[[Array], Array], end: Value) -> Array:
    """The first positive point, up to `end`, at which `function` is not positive any more; zero if it never was.

    For d near 1 it may be at 1e-70: hence the grid in the logarithm, which bisection then refines.
    """
    fixed = jax.lax.stop_gradient(jnp.asarray(end, float))
    least = float(1e17 * jnp.finfo(fixed.dtype).tiny)
    grid = jnp.linspace(jnp.log(least), jnp.log(jnp.maximum(fixed, 10 * least)), 4096)
    broken = jax.lax.stop_gradient(jax.vmap(function)(jnp.exp(grid))) <= 0
    first = jnp.argmax(broken)

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        holds = jax.lax.stop_gradient(function(jnp.exp(middle))) > 0
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    _, high = jax.lax.fori_loop(0, 60, halve, (grid[jnp.maximum(first - 1, 0)], grid[first]))
    root = jnp.exp(high)
    slope = jax.lax.stop_gradient(jax.grad(function)(root))
    value = function(root)  # once more a step of Newton's, of no size, for the root's derivatives
    root = root - (value - jax.lax.stop_gradient(value)) / slope
    return jnp.where(broken[0], 0.0, jnp.where(jnp.any(broken), root, jnp.inf))


def asymptotic_rate(start: Constants) -> Value:
    """1 - (mu/K) (a1/a2), the schedule's rate for small eta0 (Xu et al. 2025); that of 2023 has a square."""
    return 1 - start.mu / start.K * start.a1 / start.a2


def backtracking_step(
    loss: Callable[[Any], Array],
    parameters: Any,
    gradient: Any,
    first: Value = 1.0,
    factor: Value = 0.1,
    constant: Value = 0.9,
    tries: int = 300,
) -> Array:
    """The first of eta = first, first factor, first factor^2, ... with

    L(p - eta grad L) <= L(p) - constant eta ||grad L||^2; zero if none of so many tries is. A baseline of Xu et al.
    2025.

    The paper prints the condition without its last eta; then no step need meet it. `parameters` and `gradient` are
    PyTrees of the same structure.
    """
    now = loss(parameters)
    square = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient))

    def refused(carry: tuple[Array, Array]) -> Array:
        tried, eta = carry
        moved = jax.tree.map(lambda p, g: p - eta * g, parameters, gradient)
        return (tried < tries) & ~(loss(moved) <= now - constant * eta * square)

    begin = jnp.zeros((), int), jnp.asarray(first, now.dtype)
    tried, eta = jax.lax.while_loop(refused, lambda carry: (carry[0] + 1, carry[1] * factor), begin)
    return jnp.where(tried < tries, eta, 0.0)

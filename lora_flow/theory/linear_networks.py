r"""Two-layer linear networks: loss, imbalance, the operator tau, and bounds of its eigenvalues by the imbalance.

L = 1/2 ||Y - X W1 W2||_F^2 with X `(N, n)`, Y `(N, m)`, W1 `(n, h)`, W2 `(h, m)` and W = W1 W2, the notation of

- Min et al. 2021: Min, Tarmoun, Vidal, Mallada, "On the Explicit Role of Initialization on the Convergence and Implicit
  Bias of Overparametrized Linear Networks" (ICML 2021, arXiv 2105.06351), U = W1, V^T = W2.
- Min et al. 2022, its extension: "Convergence and Implicit Bias of Gradient Flow on Overparametrized Linear Networks".
  `linear_flow` has the rates of both.
- Xu et al. 2023: Xu, Min, Tarmoun, Mallada, Vidal, "Linear Convergence of Gradient Descent for Finite Width
  Over-parametrized Linear Networks with General Initialization" (AISTATS 2023). Rates and steps: `linear_descent`.
- Xu et al. 2025: the same authors, "A Local Polyak-Łojasiewicz and Descent Lemma of Gradient Descent for
  Overparametrized Linear Models" (TMLR 2025, arXiv 2505.11664), whose W2 is transposed. Rates and steps:
  `linear_local`.

All in double precision; everything can be jitted, mapped and differentiated, once the shapes (and `rank`) are fixed.
Eigenvalues and singular values count from 1, in decreasing order, and are zero beyond the dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.algebra.spectra import difference_spectrum
from lora_flow.algebra.spectra import spectrum as spectrum_of

Value = Any  # a number or a scalar array
Scalar = Float[Array, ""]
Inputs = Float[Array | np.ndarray, "N n"]
Targets = Float[Array | np.ndarray, "N m"]
First = Float[Array | np.ndarray, "n h"]
Second = Float[Array | np.ndarray, "h m"]
Product = Float[Array | np.ndarray, "n m"]
Spectrum = Float[Array | np.ndarray, " k"]
Matrix = Array | np.ndarray


def residual(x: Inputs, y: Targets, w1: First, w2: Second) -> Float[Array, "N m"]:
    """E = Y - X W1 W2."""
    return jnp.asarray(y) - x @ (w1 @ w2)


def loss(x: Inputs, y: Targets, w1: First, w2: Second) -> Scalar:
    """L = 1/2 ||Y - X W1 W2||_F^2."""
    return 0.5 * jnp.sum(residual(x, y, w1, w2) ** 2)


def product_gradient(x: Inputs, y: Targets, w1: First, w2: Second) -> Float[Array, "n m"]:
    """G = -X^T (Y - X W), the gradient with respect to the product W; Xu et al. 2023 omit the minus sign."""
    return -jnp.asarray(x).T @ residual(x, y, w1, w2)


def gradients(x: Inputs, y: Targets, w1: First, w2: Second) -> tuple[Float[Array, "n h"], Float[Array, "h m"]]:
    """(G W2^T, W1^T G), the gradients with respect to the weights; gradient flow goes along minus them."""
    g = product_gradient(x, y, w1, w2)
    return g @ w2.T, jnp.asarray(w1).T @ g


class Curvature(NamedTuple):
    """The strong convexity mu and the smoothness K of the loss as a function of the product W."""

    mu: Value
    K: Value

    @property
    def kappa(self) -> Value:
        """K/mu, the condition number of the problem that is not over-parametrised."""
        return self.K / self.mu


def curvature(x: Inputs) -> Curvature:
    """mu = sigma_min(X)^2 and K = sigma_max(X)^2. With dependent columns mu is zero: `linear_flow.reduce` first."""
    lowest, highest = singular_values(x, x.shape[1], 1)
    return Curvature(lowest**2, highest**2)


def singular_values(matrix: Float[Array | np.ndarray, "rows columns"], *places: int) -> tuple[Scalar, ...]:
    """sigma_k for each k of `places`."""
    values = spectrum_of(jnp.asarray(matrix))
    return tuple(values[k - 1] if k <= len(values) else jnp.zeros((), values.dtype) for k in places)


# The operator tau


def tau(z: Product, w1: First, w2: Second) -> Float[Array, "n m"]:
    """tau(Z) = Z W2^T W2 + W1 W1^T Z: the flow moves the product by W' = -tau(G)."""
    return jnp.asarray(z) @ (w2.T @ w2) + (w1 @ w1.T) @ z


def tau_smallest(w1: First, w2: Second) -> Scalar:
    """lmin(tau) = lambda_n(W1 W1^T) + lambda_m(W2^T W2); sigma_min(W1)^2 + sigma_min(W2)^2 in Xu et al. 2025."""
    return singular_values(w1, w1.shape[0])[0] ** 2 + singular_values(w2, w2.shape[1])[0] ** 2


def tau_largest(w1: First, w2: Second) -> Scalar:
    """lmax(tau) = sigma_1(W1)^2 + sigma_1(W2)^2."""
    return singular_values(w1, 1)[0] ** 2 + singular_values(w2, 1)[0] ** 2


# Imbalance


def imbalance(w1: First, w2: Second) -> Float[Array, "h h"]:
    """D = W1^T W1 - W2 W2^T, which gradient flow conserves (Min et al. 2021, section 2)."""
    return jnp.asarray(w1).T @ w1 - w2 @ w2.T


def imbalance_spectrum(w1: First, w2: Second) -> Float[Array, " k"]:
    """The eigenvalues of D in decreasing order, k = min(h, n + m) of them: the others are zero.

    Wide layers cost no more than their ends.
    """
    return difference_spectrum(jnp.asarray(w1).T, jnp.asarray(w2))


class Gaps(NamedTuple):
    """Delta, Delta+ and Delta-, the numbers by which all bounds depend on the imbalance."""

    delta: Value
    plus: Value
    minus: Value


def gaps(spectrum: Spectrum, n: int, m: int) -> Gaps:
    """Delta = [lambda_n(D)]+ + [lambda_m(-D)]+, Delta± = [lambda_1(±D)]+ - [lambda_n(D)]+ (- [lambda_m(-D)]+ for -).

    All four papers use these. `spectrum` holds the eigenvalues of D; zeros may be left out.
    """
    above, below = _positive_part(spectrum, n), _positive_part(-spectrum, m)
    return Gaps(above + below, _positive_part(spectrum, 1) - above, _positive_part(-spectrum, 1) - below)


def alpha(spectrum: Spectrum, s_m: Value, s_n: Value, n: int, m: int) -> Scalar:
    """A lower bound of lmin(tau), at s_k = sigma_k(W) or less (Min et al. 2022, Proposition 1):

    alpha(D; s_m, s_n) = 1/2 (-Delta+ + sqrt((Delta+ + Delta)^2 + 4 s_m^2))
                       + 1/2 (-Delta- + sqrt((Delta- + Delta)^2 + 4 s_n^2)).

    One of s_m and s_n is zero for n != m. `spectrum` holds the eigenvalues of D; zeros may be left out.
    """
    delta, plus, minus = gaps(spectrum, n, m)
    return delta + _excess(plus + delta, s_m) + _excess(minus + delta, s_n)


def alpha_as_printed(spectrum: Spectrum, s: Value, n: int, m: int) -> Scalar:
    """alpha(D; s, s), s = sigma_min(W) in both roots, as the tables of Xu et al. 2023 and 2025: no bound for n != m."""
    return alpha(spectrum, s, s, n, m)


def beta(spectrum: Spectrum, p: Value) -> Scalar:
    """An upper bound of lmax(tau), at p = sigma_1(W) or more (Xu et al. 2023 and 2025):

    beta(D; p) = 1/2 (l+ + sqrt(l+^2 + 4 p^2)) + 1/2 (l- + sqrt(l-^2 + 4 p^2)), l± = [lambda_1(±D)]+.
    """
    above, below = _positive_part(spectrum, 1), _positive_part(-spectrum, 1)
    return above + below + _excess(above, p) + _excess(below, p)


def _positive_part(spectrum: Spectrum, k: int) -> Scalar:
    """[lambda_k]+."""
    ordered = jnp.sort(jnp.asarray(spectrum), descending=True)
    return jnp.maximum(ordered[k - 1], 0.0) if k <= len(ordered) else jnp.zeros((), ordered.dtype)


def _excess(a: Value, s: Value) -> Scalar:
    """(sqrt(a^2 + 4 s^2) - a)/2 for a, s >= 0, without cancellation, and with derivatives where both are zero."""
    square = jnp.asarray(a**2 + 4 * s**2)
    zero = square == 0
    return jnp.where(zero, 0.0, 2 * s**2 / jnp.where(zero, 1.0, a + jnp.sqrt(jnp.where(zero, 1.0, square))))


# To find the steps of Xu et al. 2023 and 2025


def root_of_increasing(target: Value, coefficients: tuple[Value, ...]) -> Scalar:
    """The x > 0 at which coefficients[0] x + coefficients[1] x^2 + ... comes to `target`; none may be negative.

    Zero for target = 0. Newton's method, which for a convex function never steps below the root from above it.
    """
    c = jnp.stack([jnp.asarray(value, float) for value in coefficients])
    powers = jnp.arange(1.0, len(coefficients) + 1)
    target = jnp.asarray(target, float)

    def newton(x: Array, c: Array, target: Array) -> Array:
        slope = jnp.sum(c * powers * x ** (powers - 1))
        return x - (jnp.sum(c * x**powers) - target) / jnp.where(slope > 0, slope, 1.0)

    fixed, level = jax.lax.stop_gradient((c, target))
    alone = jnp.where(fixed > 0, (level / jnp.where(fixed > 0, fixed, 1.0)) ** (1 / powers), jnp.inf)
    # Where one term alone comes to the target: at most as many times the root as there are terms.
    x = jax.lax.fori_loop(0, 12, lambda _, x: newton(x, fixed, level), jnp.where(level > 0, jnp.min(alone), 0.0))
    return newton(x, c, target)  # once more, for the root's derivatives

r"""LoRA on an attention head: pre-training, rank-one fine-tuning, and the effective noise between them, as D grows.

Duranthon, Boncoraglio and Zdeborová, "High-Dimensional Theory of LoRA Fine-Tuning in a Solvable Attention Model",
arXiv 2606.05899, of which the abstract was read, and equations (25)-(28) second hand. The equations for the order
parameters are derived for this project from the model, and give those four as well.

A head with tied keys and queries sees sequences of T tokens with D white entries. Its map S `(D, D)` makes the
pre-activations `z_tu = D^{-1/2} (x_t^T S x_u - delta_tu tr S)`, a symmetric Gaussian matrix with variance `tr S^2/D`
off the diagonal and twice that on it, and its adapter w `(D,)` adds `chi chi^T - q I`, `chi = X w/sqrt(D)`. A teacher
with S0, of rank kappa0 D, and w* labels the sequences, with noise of variance Delta/2 and Delta in its pre-activations.
Pre-training on alpha D^2 sequences without w* has the ridge `lambda ||W||_F^2`, S = W W^T/sqrt(P D), P = kappa D >= D.
Fine-tuning on alpha' D sequences has the ridge `lambda' |w|^2`. Both losses are sums over sequences of
`||attention - label||_F^2`. Here attention is linear, pre-activations over T; `lora_flow.theory.softmax_attention` has
the softmax.

Order parameters: Q = tr S^2/D, M = tr S S0/D, and V, the response, of pre-training; q = |w|^2/D, m = w.w*/D, v of
fine-tuning. Q0 = tr S0^2/D = 1 + kappa0, and q0 = |w*|^2/D.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from lora_flow.checks import InputError

SEED = 0
DRAWS = 20_000  # of the channel's Gaussian variables, always the same: q and m are known to 1e-3
MOST = 2_000  # iterations
CLOSE = 1e-7  # largest change of an order parameter by the last one
CLOSE_IN_DRAWS = 1e-5  # where Gaussian variables are drawn
LEAST = 1e-3  # curvature of w along the way
NODES, WEIGHTS = np.polynomial.legendre.leggauss(300)

Order = tuple[float, float, float]  # Q, M, V, or q, m, v
Law = tuple[float, float, float]  # eta, delta, eps


class Pretraining(NamedTuple):
    """The order parameters of pre-training, and the law `S = eta max(S0 + delta Z - eps, 0)` of its map.

    Z is symmetric and Gaussian with variance 1/D off the diagonal and 2/D on it. `tokens`, `noise` and `kappa0` are T,
    Delta and kappa0. `train_error` is the loss over the number of sequences.
    """

    q: float
    m: float
    v: float
    eta: float
    delta: float
    eps: float
    train_error: float
    tokens: int
    noise: float
    kappa0: float

    @property
    def q0(self) -> float:
        """Q0."""
        return 1 + self.kappa0

    def effective_noise(self, beta: float = 1.0) -> float:
        """De = Delta/2 + Q0 + beta^2 Q - 2 beta M of the map beta S: equations (25) and (26).

        All that pre-training does to fine-tuning: the variance, off the diagonal, of what the frozen map does not say
        of the teacher's pre-activations.
        """
        return self.noise / 2 + self.q0 + beta**2 * self.q - 2 * beta * self.m

    def best_beta(self) -> float:
        """M/Q, the beta with the least effective noise, `Delta/2 + Q0 - M^2/Q`; 1 where the ridge leaves no map."""
        return self.m / self.q if self.q > 0 else 1.0

    def reused_noise(self) -> float:
        """The effective noise De/(1 + 4 V/T^2)^2 on sequences that pre-training has fitted: equation (27).

        It takes the place of De in the equations for q and m. The test error keeps De.
        """
        return self.effective_noise() / (1 + 4 * self.v / self.tokens**2) ** 2

    def selected_noise(self, kept: float) -> float:
        """The effective noise on the share `kept` of sequences whose frozen pre-activations are smallest.

        It falls to `Delta/2 + Q0 - M^2/Q` as the share goes to 0, equation (28). In between the pre-activations have a
        chi-squared law of T (T + 1)/2 degrees, cut off at its quantile (derived here).
        """
        degrees = self.tokens * (self.tokens + 1) / 2
        left = stats.chi2.cdf(stats.chi2.ppf(kept, degrees), degrees + 2) / kept
        return self.effective_noise(self.best_beta()) + left * (1 - self.best_beta()) ** 2 * self.q


class FineTuning(NamedTuple):
    """The order parameters of fine-tuning, and the loss over the number of sequences, without the ridge."""

    q: float
    m: float
    v: float
    q0: float
    train_error: float

    @property
    def overlap(self) -> float:
        """The cosine between w and w*: how well the task's direction is represented."""
        return self.m / np.sqrt(self.q * self.q0)


def pretrain(
    alpha: float, ridge: float, *, tokens: int = 3, noise: float = 0.5, kappa0: float = 1.0, kappa: float = 1.0
) -> Pretraining:
    """Pre-training of linear attention on alpha D^2 sequences of T `tokens`, with the ridge lambda and noise Delta."""
    samples, curvature = alpha * tokens * (tokens + 1) / 2, 4 / tokens**2

    def missed(q: float, m: float) -> float:
        return noise / 2 + 1 + kappa0 - 2 * m + q

    def response(q: float, m: float, v: float) -> tuple[Law, Order]:
        vh = samples * curvature / (1 + curvature * v)
        return law(vh, vh, vh**2 * missed(q, m) / samples, ridge * np.sqrt(kappa), kappa0)

    q, m, v = settle(lambda *order: response(*order)[1], (0.0, 0.0, 1.0))
    train_error = (tokens + 1) / tokens * missed(q, m) / (1 + curvature * v) ** 2
    return Pretraining(q, m, v, *response(q, m, v)[0], train_error, tokens, noise, kappa0)


def settle(step: Callable[..., Order], order: Order, close: float = CLOSE) -> Order:
    """Where a step leaves the order parameters as they are, by half of each step, and by less where it overshoots.

    **Raises:** `InputError` where they do not come there.
    """
    share, before, changes = 0.5, np.zeros(3), np.zeros(3)
    for _ in range(MOST):
        changes = np.subtract(step(*order), order)
        if np.max(np.abs(changes)) < close:
            return order
        share = share / 2 if changes @ before < 0 else min(1.2 * share, 0.5)
        order, before = tuple(map(float, order + share * changes)), changes  # type: ignore[assignment]
    largest = f"changes of {np.max(np.abs(changes)):.2g} in the last"
    raise InputError(f"the order parameters must settle in {MOST} iterations, got {largest}")


def law(vh: float, mh: float, qh: float, ridge: float, kappa0: float) -> tuple[Law, Order]:
    """(eta, delta, eps) of the map's law, and its (Q, M, V), from the conjugate parameters and lambda sqrt(kappa)."""
    eta, delta, eps = mh / vh, float(np.sqrt(qh / 2)) / mh, ridge / mh
    square, shared, response = thresholded(delta, eps, kappa0)
    return (eta, delta, eps), (eta**2 * square, eta * shared, response / (2 * vh))


def adapted(vh: float, mh: float, qh: float, centring: float, ridge: float, q0: float) -> Order:
    """(q, m, v) of w = (mh w* + sqrt(qh) zeta)/(vh + 2 lambda' + 2 p), p the part of centring."""
    curvature = max(vh + 2 * ridge + 2 * centring, LEAST)
    return (mh**2 * q0 + qh) / curvature**2, mh * q0 / curvature, 1 / curvature


def thresholded(delta: float, eps: float, kappa0: float) -> tuple[float, float, float]:
    """Of F = max(H - eps, 0), H = S0 + delta Z: tr F^2/D, tr F S0/D, and the response.

    The latter is the mean divided difference of F, the double integral of `(F(x) - F(y))/(x - y)` over the spectral
    density of H: twice that of F times the real part of the Stieltjes transform. By it tr F S0/D = tr F H/D - delta^2
    times the response.
    """
    x, weights = quadrature(delta, kappa0, eps)
    real, density = stieltjes(x, delta, kappa0)
    weights = weights * density
    f = x - eps
    response = 2 * float(np.sum(weights * f * real))
    return float(np.sum(weights * f**2)), float(np.sum(weights * x * f)) - delta**2 * response, response


def stieltjes(x: np.ndarray, delta: float, kappa0: float) -> tuple[np.ndarray, np.ndarray]:
    """Real part of the Stieltjes transform of S0 + delta Z, and the spectral density, at real x.

    The transform g, which behaves like 1/x far out, solves `-delta^2 g^3 + (delta^2 k + x) g^2 + (kappa0 - 1 - x k) g +
    k = 0` with k = sqrt(kappa0). Within the spectrum two roots are complex, and their imaginary part is pi times the
    density. Elsewhere the density is 0, and so is what is returned for the real part.
    """
    a, b, c, d = _cubic(np.asarray(x, float), delta, kappa0)
    p, q = (3 * a * c - b**2) / (3 * a**2), (2 * b**3 - 9 * a * b * c + 27 * a**2 * d) / (27 * a**3)
    inside = (q / 2) ** 2 + (p / 3) ** 3
    root = np.sqrt(np.maximum(inside, 0.0))
    first = np.cbrt(-q / 2 - np.where(q > 0, root, -root))  # the larger of the two, without cancellation
    second = -p / (3 * np.where(first == 0, 1.0, first))
    real = -(first + second) / 2 - b / (3 * a)
    density = np.sqrt(3) / 2 * np.abs(first - second) / np.pi
    return np.where(inside > 0, real, 0.0), np.where(inside > 0, density, 0.0)


def edges(delta: float, kappa0: float) -> np.ndarray:
    """The ends of the intervals that carry the spectrum of S0 + delta Z, `(intervals, 2)`: one interval or two.

    They are the real zeros of the cubic's discriminant, of degree 4 in x.
    """
    a, b, c, d = _cubic(np.polynomial.Polynomial([0.0, 1.0]), delta, kappa0)
    discriminant = b**2 * c**2 - 4 * a * c**3 - 4 * b**3 * d - 27 * a**2 * d**2 + 18 * a * b * c * d
    zeros = discriminant.roots()
    ends = np.sort(zeros[np.abs(zeros.imag) < 1e-7 * (1 + np.abs(zeros))].real)
    between = [(low, high) for low, high in itertools.pairwise(ends) if discriminant((low + high) / 2) < 0]
    return np.array(between)


def quadrature(delta: float, kappa0: float, start: float = -np.inf) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for integrals over the spectrum of S0 + delta Z, from `start` on, exact at its square roots."""
    nodes, weights = [np.empty(0)], [np.empty(0)]
    for low, high in edges(delta, kappa0):
        low = max(low, start)
        if low < high:
            angle, half = np.pi / 2 * (NODES + 1), (high - low) / 2
            nodes.append(low + half * (1 - np.cos(angle)))
            weights.append(np.pi / 2 * WEIGHTS * half * np.sin(angle))
    return np.concatenate(nodes), np.concatenate(weights)


def fine_tune(noise: float, ratio: float, ridge: float, *, tokens: int = 3, q0: float = 1.0) -> FineTuning:
    """Fine-tuning of linear attention by w on alpha' D sequences, `ratio` = alpha', with the ridge lambda'.

    `noise` is the effective noise De. What the frozen map knows drops out.
    """
    rng = np.random.default_rng(SEED)
    teacher = np.sqrt(q0) * rng.normal(size=(DRAWS, tokens))
    other, drawn = rng.normal(size=(DRAWS, tokens)), rng.normal(size=(DRAWS, tokens, tokens))
    target = teacher[:, :, None] * teacher[:, None] + np.sqrt(noise / 2) * (drawn + drawn.mT)
    values, vectors = np.linalg.eigh(target)  # in whose basis all that follows is diagonal
    teacher, other = (np.einsum("nji,nj->ni", vectors, one) for one in (teacher, other))

    def channel(q: float, m: float, v: float) -> tuple[Order, float]:
        c, b = values + (q - q0), 4 * v / tokens**2
        omega = m / q0 * teacher + np.sqrt(max(q - m**2 / q0, 0.0)) * other
        square = secular(omega, c, b)
        gain = 1 / (1 + b * (square[:, None] - c))
        chi = gain * omega
        f = (chi - omega) / v
        pushed = 2 * b * np.sum(chi**2 * gain**2, axis=1) / (1 + 2 * b * np.sum(chi**2 * gain, axis=1))
        vh = ratio * np.mean(tokens - np.sum(gain, axis=1) + pushed) / v
        mh = (ratio * np.mean(np.sum(f * teacher, axis=1)) + m * vh) / q0  # by Stein's lemma
        qh = ratio * np.mean(np.sum(f**2, axis=1))
        centring = 2 * ratio / tokens**2 * np.mean(np.sum(c, axis=1) - square)
        left = np.mean(np.sum(c**2, axis=1) - 2 * np.sum(c * chi**2, axis=1) + square**2) / tokens**2
        return adapted(vh, mh, qh, centring, ridge, q0), float(left)

    q, m, v = map(float, settle(lambda *order: channel(*order)[0], (q0, 0.9 * q0, 0.1), CLOSE_IN_DRAWS))
    return FineTuning(q, m, v, q0, channel(q, m, v)[1])


def secular(omega: np.ndarray, c: np.ndarray, b: float) -> np.ndarray:
    """The only n > max(c) - 1/b with `sum_i omega_i^2/(1 + b (n - c_i))^2 = n`, for each row `(draw, T)`.

    It is |chi|^2 at the minimum of `|chi - omega|^2/2 + b/4 ||diag(c) - chi chi^T||^2` over chi. The left side falls
    and is convex, so that Newton's method comes to n from below.
    """
    largest, leading = np.max(c, axis=1), np.abs(np.take_along_axis(omega, np.argmax(c, axis=1)[:, None], 1)[:, 0])
    most = np.maximum(largest, np.sum(omega**2, axis=1))
    n = np.maximum(largest + (leading / np.sqrt(most) - 1) / b, 0.0)
    for _ in range(100):
        gain = 1 / (1 + b * (n[:, None] - c))
        excess = np.sum((omega * gain) ** 2, axis=1) - n
        change = excess / (1 + 2 * b * np.sum(omega**2 * gain**3, axis=1))
        n = n + change
        if np.max(np.abs(change) / (1 + n)) < 1e-7:  # by the next step that would be its square
            break
    return n


def generalisation_error(noise: float, tuned: FineTuning, tokens: int) -> float:
    """The error on a new sequence, `||attention - label||_F^2`: (T + 1)/T (De + q0^2 - 2 m^2 + q^2)."""
    return (tokens + 1) / tokens * (noise + tuned.q0**2 - 2 * tuned.m**2 + tuned.q**2)


def _cubic(x: Any, delta: float, kappa0: float) -> tuple[Any, ...]:
    """The coefficients of the Stieltjes transform's equation, of g^3 first, at numbers or a polynomial x."""
    k = np.sqrt(kappa0)
    return -(delta**2), delta**2 * k + x, kappa0 - 1 - k * x, k

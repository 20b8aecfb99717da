"""Order parameters of attention, pre-trained and fine-tuned: sum rules, other formulas of the same, and known values.

The known values were found for this project by another program, with draws of its own. Claims hold the theory against
runs.
"""

import numpy as np
import pytest
from scipy import optimize

from lora_flow.checks import InputError
from lora_flow.theory import attention, softmax_attention

PRETRAINED = attention.pretrain(0.1, 0.1)


@pytest.mark.parametrize(("delta", "kappa0"), [(0.3, 1.0), (0.1, 0.3), (0.5, 2.0), (0.05, 1.0)])
def test_the_spectrum_is_that_of_a_wishart_matrix_and_noise(delta, kappa0):
    """Moments of S0 + delta Z; kappa0 = .3 has two intervals, around 0 and above."""
    x, weights = attention.quadrature(delta, kappa0)
    weights = weights * attention.stieltjes(x, delta, kappa0)[1]
    assert np.sum(weights) == pytest.approx(1.0, abs=1e-7)
    assert np.sum(weights * x) == pytest.approx(np.sqrt(kappa0), abs=1e-7)
    assert np.sum(weights * x**2) == pytest.approx(1 + kappa0 + delta**2, abs=1e-7)
    assert len(attention.edges(delta, kappa0)) == (2 if kappa0 < 1 else 1)


def test_the_spectrum_is_that_of_a_drawn_matrix():
    rng, (delta, kappa0), size = np.random.default_rng(0), (0.3, 0.5), 1000
    factor, noise = rng.normal(size=(size, size // 2)), rng.normal(size=(size, size))
    drawn = factor @ factor.T / np.sqrt(size**2 / 2) + delta * (noise + noise.T) / np.sqrt(2 * size)
    values, vectors = np.linalg.eigh(drawn)
    for eps in (0.2, 1.0):
        square, shared, response = attention.thresholded(delta, eps, kappa0)
        f = np.maximum(values - eps, 0.0)
        assert np.mean(f**2) == pytest.approx(square, rel=0.01)
        s0 = np.einsum("ij,ik,kj->j", vectors, factor @ factor.T / np.sqrt(size**2 / 2), vectors, optimize=True)
        assert np.mean(f * s0) == pytest.approx(shared, rel=0.01)
        difference = values[:, None] - values + np.eye(size)
        ratios = np.where(np.eye(size) > 0, (values > eps)[:, None], (f[:, None] - f) / difference)
        assert np.mean(ratios) == pytest.approx(response, rel=0.01)


@pytest.mark.parametrize(
    ("ridge", "q", "m", "missed", "train_error"),
    [(0.01, 2.223, 1.925, 0.622, 0.0963), (0.1, 1.268, 1.411, 0.696, 0.261), (1.0, 0.0133, 0.0655, 2.132, 2.750)],
)
def test_known_values_of_pretraining(ridge, q, m, missed, train_error):
    found = attention.pretrain(0.1, ridge)
    assert (found.q, found.m, found.effective_noise(), found.train_error) == pytest.approx(
        (q, m, missed, train_error), abs=6e-4
    )


@pytest.mark.parametrize(("alpha", "ridge", "kappa0"), [(1e-3, 0.1, 5.0), (1e-3, 1e-6, 1.0), (1e-3, 1e-6, 5.0)])
def test_few_sequences_settle_where_half_a_step_overshoots(alpha, ridge, kappa0):
    """A step from there leads nowhere else. By half of each step the iteration does not come there."""
    found = attention.pretrain(alpha, ridge, kappa0=kappa0)
    samples, curvature = alpha * 6, 4 / 9
    vh = samples * curvature / (1 + curvature * found.v)
    _, again = attention.law(vh, vh, vh**2 * found.effective_noise() / samples, ridge, kappa0)
    assert again == pytest.approx((found.q, found.m, found.v), abs=1e-6)


def test_what_does_not_settle_is_told(monkeypatch):
    monkeypatch.setattr(attention, "MOST", 3)
    with pytest.raises(InputError, match=r"^the order parameters must settle in 3 iterations, got changes of"):
        attention.pretrain(0.1, 0.1)


def test_a_ridge_that_leaves_no_map_leaves_it_as_it_is():
    found = attention.pretrain(0.1, 100.0)
    assert (found.q, found.m, found.best_beta()) == (0, 0, 1)
    assert found.effective_noise(found.best_beta()) == found.noise / 2 + found.q0


def test_without_a_ridge_much_data_leaves_the_teacher():
    """Least squares on alpha K D^2 numbers for D^2/2 unknowns, the error Delta/2 (1 + 1/(2 alpha K - 1))."""
    tokens, noise, alpha = 2, 0.4, 400.0
    found = attention.pretrain(alpha, 1e-9, tokens=tokens, noise=noise, kappa0=2.0)
    ratio = 2 * alpha * tokens * (tokens + 1) / 2
    assert found.q == pytest.approx(found.q0, rel=1e-3)
    assert found.effective_noise() == pytest.approx(noise / 2 * (1 + 1 / (ratio - 1)), rel=1e-4)
    assert attention.pretrain(0.1, 0.05, kappa=4.0)[:6] == pytest.approx(PRETRAINED[:6], abs=1e-6), "lambda sqrt(kappa)"


@pytest.mark.parametrize(
    ("ratio", "overlap", "q", "error"),
    [
        (0.5, 0.818, 0.506, 1.699),
        (1.0, 0.944, 0.755, 1.228),
        (2.0, 0.980, 0.901, 1.034),
        (3.0, 0.988, 0.942, 0.989),
        (5.0, 0.994, 0.969, 0.961),
        (10.0, 0.997, 0.987, 0.943),
    ],
)
def test_known_values_of_fine_tuning(ratio, overlap, q, error):
    """Up to the draws of either program, which count most where sequences are few."""
    missed = PRETRAINED.effective_noise()
    found = attention.fine_tune(missed, ratio, 0.5)
    assert found.overlap == pytest.approx(overlap, abs={0.5: 0.006, 1.0: 0.003}.get(ratio, 0.001))
    assert found.q == pytest.approx(q, abs=0.012)
    assert attention.generalisation_error(missed, found, 3) == pytest.approx(error, rel=0.01)


def test_the_secular_equation_has_the_minimum():
    rng, b, v = np.random.default_rng(0), 0.6, 0.7
    noise = rng.normal(size=(20, 3, 3))
    target, omega = noise + noise.mT, rng.normal(size=(20, 3))
    values, vectors = np.linalg.eigh(target)
    square = attention.secular(np.einsum("nji,nj->ni", vectors, omega), values, b)
    for c, start, n in zip(target, omega, square, strict=True):

        def loss(chi, c=c, start=start):
            return np.sum((chi - start) ** 2) / (2 * v) + b / (4 * v) * np.sum((c - np.outer(chi, chi)) ** 2)

        tries = [optimize.minimize(loss, at, tol=1e-12) for at in (start, -start, 2 * start)]
        best = min(tries, key=lambda one: one.fun)
        assert np.sum(best.x**2) == pytest.approx(n, rel=1e-5)


def test_consequences_of_the_effective_noise():
    one = PRETRAINED
    betas = np.linspace(0.2, 3, 400)
    noises = [one.effective_noise(beta) for beta in betas]
    assert betas[np.argmin(noises)] == pytest.approx(one.best_beta(), abs=0.01)
    assert one.effective_noise(one.best_beta()) == pytest.approx(one.noise / 2 + one.q0 - one.m**2 / one.q)
    assert one.effective_noise(0.0) == one.noise / 2 + one.q0
    assert attention.pretrain(0.1, 0.01).best_beta() == pytest.approx(0.866, abs=1e-3)
    assert attention.pretrain(0.1, 1.0).best_beta() == pytest.approx(4.92, abs=0.01)
    assert one.reused_noise() < one.effective_noise()
    assert one.selected_noise(1.0) == pytest.approx(one.effective_noise())
    assert one.selected_noise(1e-9) == pytest.approx(one.effective_noise(one.best_beta()), abs=1e-3)
    clean = attention.pretrain(0.1, 0.1, noise=0.0)
    assert clean.effective_noise() == pytest.approx(0.363, abs=1e-3)
    assert clean.effective_noise(clean.best_beta()) == pytest.approx(0.302, abs=1e-3)
    normal = np.random.default_rng(0).normal(size=(200_000, 6))
    square = np.sort(np.sum(normal**2, axis=1))
    kept = np.mean(square[:8000]) / 6
    expected = clean.effective_noise(clean.best_beta()) + kept * (1 - clean.best_beta()) ** 2 * clean.q
    assert clean.selected_noise(0.04) == pytest.approx(expected, rel=1e-3)


def test_known_values_where_representation_and_error_disagree():
    known = {
        0.01: (0.9957, 0.870, 0.978, 0.965),
        0.1: (0.9946, 0.739, 0.981, 0.809),
        0.8: (0.9752, 1.504, 0.964, 1.568),
    }
    for ridge, (reused, reused_error, new, new_error) in known.items():
        one = attention.pretrain(0.2, ridge, tokens=2, kappa0=0.5)
        missed = one.effective_noise()
        for noise, overlap, error in ((one.reused_noise(), reused, reused_error), (missed, new, new_error)):
            found = attention.fine_tune(noise, 3.0, 0.5, tokens=2)
            assert found.overlap == pytest.approx(overlap, abs=1.5e-3)
            assert attention.generalisation_error(missed, found, 2) == pytest.approx(error, rel=0.006)


def test_derivatives_of_softmax_attention():
    """By differences."""
    rng = np.random.default_rng(0)
    a, label = rng.normal(size=(5, 3, 3)), softmax_attention.attention(rng.normal(size=(5, 3, 3)))
    value, slope, hessian = softmax_attention._of_rows(a, label)
    np.testing.assert_allclose(value, np.sum((softmax_attention.attention(a) - label) ** 2, axis=(1, 2)))
    step = 1e-5 * rng.normal(size=(5, 3, 3))
    (up, slope_up, _), (down, slope_down, _) = (softmax_attention._of_rows(a + sign * step, label) for sign in (1, -1))
    np.testing.assert_allclose(np.sum(slope * step, axis=(1, 2)), (up - down) / 2, rtol=1e-6)
    np.testing.assert_allclose(
        np.einsum("ntuv,ntv->ntu", hessian, step), (slope_up - slope_down) / 2, rtol=1e-5, atol=1e-12
    )


def test_the_proximal_step_of_softmax_attention():
    """At a minimum, with the response that differences of omega give."""
    drawn = softmax_attention._Drawn.of(PRETRAINED, 1.0)
    drawn = softmax_attention._Drawn(*(part[:50] for part in drawn))

    def minimum(omega):
        return softmax_attention.proximal(lambda chi: drawn.loss(chi, 0.8), omega, 0.4, drawn.teacher)

    chi, at, response = minimum(drawn.teacher)
    np.testing.assert_allclose((chi - drawn.teacher) / 0.4, -at.gradient, atol=1e-8)
    moved = [minimum(drawn.teacher + sign * 1e-5 * unit)[0] for unit in np.eye(3) for sign in (1, -1)]
    trace = sum((moved[2 * i] - moved[2 * i + 1])[:, i] for i in range(3)) / 2e-5
    np.testing.assert_allclose(response, trace, rtol=1e-4)


def test_known_values_of_softmax_attention():
    """Overlap, q, train and test error of runs at D = 200, alpha' = 3 and 6."""
    for ratio, ridge, overlap, q, train, test in (
        (3.0, 0.05, 0.9576, 0.937, 0.2369, 0.3156),
        (6.0, 0.05, 0.9816, 0.884, 0.2522, 0.2855),
    ):
        found = softmax_attention.fine_tune(PRETRAINED, ratio, ridge)
        assert found.overlap == pytest.approx(overlap, abs=0.004)
        assert found.q == pytest.approx(q, abs=0.04)
        assert found.train_error == pytest.approx(train, rel=0.01)
        assert softmax_attention.generalisation_error(PRETRAINED, found) == pytest.approx(test, rel=0.015)


def test_softmax_pretraining_learns_less_with_a_larger_ridge():
    assert softmax_attention.pretrain(0.1, 3.0, tokens=2).q < 1e-3
    low, high = (softmax_attention.pretrain(0.2, ridge, tokens=2, kappa0=0.5) for ridge in (0.01, 0.05))
    assert low.q > high.q > 0.1
    assert low.train_error < high.train_error
    for one in (low, high):
        assert 0 < one.m < np.sqrt(one.q * one.q0)
        assert one.effective_noise(one.best_beta()) < one.noise / 2 + one.q0

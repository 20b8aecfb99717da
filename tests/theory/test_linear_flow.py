"""Gradient flow of linear networks (Min et al. 2021 and 2022): bounds on random problems, the least-norm solution."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given
from random_networks import (
    FLOOR,
    SHAPES,
    Problem,
    below,
    draw_problem,
    each,
    imbalance,
    loss,
    matrix,
    numpy_results,
    problems,
    sigma,
)
from scipy.integrate import solve_ivp

from lora_flow import InputError
from lora_flow.theory import linear_flow as flow
from lora_flow.theory import linear_networks as nets


def flow_report(x, y, w1, w2, rank):
    p = flow.reduce(x, y, w1, w2, rank)
    spectrum = nets.imbalance_spectrum(p.u1, p.w2)
    return {
        "reduced": p,
        "network": p.network,
        "gradients": (nets.gradients(x, y, w1, w2), nets.gradients(*p.network)),
        "fastest": 2 * p.s[0] * nets.tau_largest(w1, w2),
        "error": p.error,
        "least": p.least_loss,
        "instantaneous": flow.instantaneous_rate(p),
        "global": flow.global_rate(p),
        "imbalance": flow.imbalance_rate(p),
        "level": flow.imbalance_level(spectrum, p.y.shape[0], p.y.shape[1]),
        "lam": p.imbalance,
        "solution": flow.min_norm_solution(x, y, rank),
        "invariants": flow.bias_invariants(p),
    }


report = numpy_results(flow_report, "rank")


@each()
@given(problems())
def test_the_reduced_problem_is_what_the_flow_sees(drawn):
    """The same loss above L*, the same gradients for V and U1, none for U2; X^+ Y by NumPy's pinv."""
    p, shape = drawn
    got = report(*p, rank=shape.rank)
    r = got["reduced"]
    np.testing.assert_allclose(r.wx * np.sqrt(r.s) @ r.phi1.T, p.x, atol=1e-13 * np.linalg.norm(p.x))
    best = np.linalg.pinv(p.x, rcond=1e-10) @ p.y
    np.testing.assert_allclose(got["solution"], best, atol=1e-11 * np.linalg.norm(best))
    least = 0.5 * np.sum((p.y - p.x @ best) ** 2)
    assert got["least"] == pytest.approx(least, abs=1e-12 * np.sum(p.y**2))
    assert 0.5 * np.sum(got["error"] ** 2) + least == pytest.approx(loss(p), rel=1e-11)
    (g1, g2), (f1, f2) = got["gradients"]
    scale = np.linalg.norm(g1) + np.linalg.norm(g2)
    np.testing.assert_allclose(r.phi1 @ f1, g1, atol=1e-11 * scale)
    np.testing.assert_allclose(f2, g2, atol=1e-11 * scale)
    np.testing.assert_allclose(r.phi1 @ r.u1 + r.outside, p.w1, atol=1e-13 * np.linalg.norm(p.w1))
    np.testing.assert_allclose(r.phi1.T @ r.outside, 0, atol=1e-13 * np.linalg.norm(p.w1))
    np.testing.assert_allclose(got["lam"], r.u1.T @ r.u1 - p.w2 @ p.w2.T, atol=1e-12 * np.sum(p.w1**2 + 1))


@each(400)
@given(problems())
def test_the_flow_is_never_slower_than_its_rates(drawn):
    """d/dt log(L - L*) = -||grad||^2/(L - L*) against Proposition 1, and Theorems 3 and 1 at t = 0."""
    p, shape = drawn
    got = report(*p, rank=shape.rank)
    fastest = got["fastest"]
    rate = sum(np.sum(g**2) for g in got["gradients"][1]) / (0.5 * np.sum(got["error"] ** 2))
    assert below(got["instantaneous"], rate, fastest)
    assert below(got["global"], got["instantaneous"], fastest)
    assert below(got["imbalance"], got["global"], fastest)
    assert got["imbalance"] == pytest.approx(2 * got["reduced"].s[-1] * got["level"], rel=1e-12)


@partial(jax.jit, static_argnames="steps")
def integrate(x, y, w1, w2, end, steps=400):
    """Classical Runge-Kutta; the weights at equal times."""

    def field(weights):
        w1, w2 = weights
        g = x.T @ (y - x @ w1 @ w2)
        return g @ w2.T, w1.T @ g

    def step(weights, _):
        dt = end / steps
        along = lambda slope, by: jax.tree.map(lambda w, s: w + by * dt * s, weights, slope)  # noqa: E731
        k1 = field(weights)
        k2 = field(along(k1, 0.5))
        k3 = field(along(k2, 0.5))
        k4 = field(along(k3, 1.0))
        new = jax.tree.map(lambda w, a, b, c, d: w + dt / 6 * (a + 2 * b + 2 * c + d), weights, k1, k2, k3, k4)
        return new, weights

    return jax.lax.scan(step, (w1, w2), None, steps)[1]


@jax.jit
def losses_along(x, y, w1, w2):
    return jax.vmap(lambda a, b: nets.loss(x, y, a, b))(w1, w2)


@each(200)
@given(problems(scales=(-0.5, 0.3)))
def test_the_loss_stays_below_its_exponential_bounds(drawn):
    """Theorems 1 and 3 over time, by a Runge-Kutta of steps well inside its stability; Lam stays as it is."""
    p, shape = drawn
    got = report(*p, rank=shape.rank)
    p = Problem(*got["network"])
    biggest = (np.linalg.norm(p.w1, 2) + np.linalg.norm(p.w2, 2) + np.sqrt(sigma(p.y, 1) / sigma(p.x, shape.rank))) ** 2
    end = 400 * 0.1 / (sigma(p.x, 1) ** 2 * biggest)
    w1, w2 = integrate(*p, end)
    times, losses = np.linspace(0, end, 401)[:-1], np.asarray(losses_along(p.x, p.y, w1, w2))
    seen = losses > FLOOR * losses[0]
    for rate in ("imbalance", "global"):
        bound = np.asarray(flow.loss_bound(got[rate], times, losses[0]))
        assert below(losses[seen], bound[seen], slack=1e-6)
    drift = np.linalg.norm(imbalance(p._replace(w1=np.asarray(w1[-1]), w2=np.asarray(w2[-1]))) - imbalance(p))
    assert drift < 1e-6 * biggest


def test_a_start_in_the_invariant_set_goes_to_the_min_norm_solution():
    """To 1e-8; V_0 U2^T = 0 without U1 U2^T = 0, or the other way round, goes elsewhere."""
    rng = np.random.default_rng(3)
    n, samples, m, h = 8, 3, 2, 12
    x, y = matrix(rng, samples, n, -0.2, 0.2), rng.standard_normal((samples, m))
    best = np.linalg.pinv(x) @ y
    inside = np.linalg.pinv(x) @ x
    w1, w2 = rng.standard_normal((n, h)), rng.standard_normal((h, m))
    free = w1 - inside @ w1

    def away_from(rows):
        basis = np.linalg.qr(rows.T)[0]
        return free - free @ basis @ basis.T

    starts = {
        "both": away_from(np.vstack([inside @ w1, w2.T])),
        "V alone": away_from(w2.T),
        "U1 alone": away_from(inside @ w1),
        "neither": free,
    }
    distance = {}
    for name, outside in starts.items():
        start = inside @ w1 + outside
        ends = solve_linear_flow(x, y, start, w2, 60.0)
        distance[name] = np.linalg.norm(ends[0] @ ends[1] - best)
        zero = [np.abs(matrix).max() < 1e-12 for matrix in flow.bias_invariants(flow.reduce(x, y, start, w2))]
        assert zero == [name in ("both", "V alone"), name in ("both", "U1 alone")]
        assert np.linalg.norm(y - x @ ends[0] @ ends[1]) < 1e-9
    assert distance["both"] < 1e-8
    assert min(distance["V alone"], distance["U1 alone"], distance["neither"]) > 0.1, distance


def solve_linear_flow(x, y, w1, w2, end):
    shapes, cut = (w1.shape, w2.shape), w1.size

    def field(_, flat):
        w1, w2 = flat[:cut].reshape(shapes[0]), flat[cut:].reshape(shapes[1])
        g = x.T @ (y - x @ (w1 @ w2))
        return np.concatenate([(g @ w2.T).ravel(), (w1.T @ g).ravel()])

    flat = solve_ivp(field, (0, end), np.concatenate([w1.ravel(), w2.ravel()]), "DOP853", rtol=1e-12, atol=1e-13).y
    return flat[:cut, -1].reshape(shapes[0]), flat[cut:, -1].reshape(shapes[1])


def wide_limit(rng, p, h, a):
    """||U V^T(inf) - X^+ Y||_2 of a network with entries N(0, h^{-2a}), and the extremes of its imbalance.

    The flow moves U1 and V within the span of their rows, r + m of the h directions, so that a triangular factor
    stands for them; U2, independent of it, is seen through its projection on that span alone, Gaussian as well.
    """
    (n, r), m = p.phi1.shape, p.y.shape[1]
    rows = np.linalg.qr(rng.normal(0, h**-a, (h, r + m)))[1].T
    u1, w2, u2 = rows[:r], rows[r:].T, rng.normal(0, h**-a, (n - r, r + m))
    spectrum = nets.imbalance_spectrum(u1, w2)
    end = 12 / (p.s[-1] * flow.width_imbalance(h, a))  # exp(-24) of the loss at most is left by then
    return np.linalg.norm(u2 @ np.asarray(integrate(p.x, p.y, u1, w2, end)[1][-1]), 2), spectrum


WIDTHS = (500, 1000, 2500, 5000, 10000)


@pytest.mark.long
@pytest.mark.parametrize("a", [0.5, 0.4])
def test_wide_networks_end_near_the_min_norm_solution(a):
    """Experiment (ii) of Min et al. 2021, 100 samples of 400 inputs: the distance falls as h^{1/2 - 2a}.

    It is within Theorem 2's bound, and the imbalance above Lemma 1's.
    """
    rng = np.random.default_rng(0)
    samples, n, runs = 100, 400, 5
    x = rng.normal(0, n**-0.5, (samples, n))
    y = x @ rng.normal(0, n**-0.5, (n, 1)) + 0.01 * rng.standard_normal((samples, 1))
    p = jax.tree.map(np.asarray, flow.reduce(x, y, np.zeros((n, 1)), np.zeros((1, 1))))
    means = []
    for h in WIDTHS:
        distances, spectra = zip(*(wide_limit(rng, p, h, a) for _ in range(runs)), strict=True)
        assert max(distances) < flow.width_bound(h, a, p.s, np.linalg.norm(y), n, 1, 0.05)
        assert all(lam[samples - 1] - lam[-1] > flow.width_imbalance(h, a) for lam in spectra)
        means.append(np.mean(distances))
    slope = np.polyfit(np.log(WIDTHS), np.log(means), 1)[0]
    assert slope == pytest.approx(0.5 - 2 * a, abs=0.1), means


def test_the_width_bound_by_hand():
    s = np.array([4.0, 1.0])
    by_hand = 2 * np.exp(7) ** (1 / 16**0.2) * np.sqrt(5) * (np.sqrt(8) + 0.5 * np.log(20)) / 16**0.3
    assert flow.width_bound(16, 0.4, s, 3.0, 5, 3, 0.1) == pytest.approx(by_hand, rel=1e-14)
    assert flow.width_imbalance(16, 0.4) == pytest.approx(16**0.2, rel=1e-14)


def test_rank_is_asked_for_where_it_cannot_be_seen():
    x, y, w1, w2 = draw_problem(0, SHAPES[3], "gaussian", 1.0)
    assert flow.reduce(x, y, w1, w2).s.shape == (4,)
    with pytest.raises(InputError, match="rank must be given where X is traced, got None"):
        jax.jit(flow.reduce)(x, y, w1, w2)
    with pytest.raises(InputError, match="rank must be from 1 to 6, got 7"):
        flow.min_norm_solution(x, y, 7)

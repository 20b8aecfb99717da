"""Over-parametrised linear networks: every bound holds on random problems, and the misprinted one does not.

A problem is drawn from a seed, a shape and a way to start; descent and flow are written out here. What a bound is
compared with is masked below 1e-16 L_0, where the loss is rounding.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from lora_flow import InputError
from lora_flow.algebra import spectra
from lora_flow.theory import linear_descent as descent
from lora_flow.theory import linear_flow as flow
from lora_flow.theory import linear_local as local
from lora_flow.theory import linear_networks as nets

pytestmark = pytest.mark.long

FLOOR = 1e-16
C1, C2 = 0.5, 1.5  # of the experiments of Xu et al. 2023


class Problem(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    w1: np.ndarray
    w2: np.ndarray


class Shape(NamedTuple):
    """Few of them, as each is compiled for."""

    samples: int
    n: int
    m: int
    h: int
    rank: int


SHAPES = (
    Shape(4, 4, 4, 10, 4),
    Shape(7, 3, 5, 9, 3),
    Shape(3, 8, 2, 7, 3),  # fewer samples than inputs
    Shape(9, 6, 4, 5, 4),  # dependent inputs
    Shape(5, 5, 4, 2, 5),  # narrower than its ends
    Shape(1, 1, 1, 1, 1),
)
STARTS = ("gaussian", "balanced", "one large", "uneven", "almost solved", "balanced, almost solved")


def matrix(rng, rows, columns, low=-0.5, high=0.5, rank=None):
    """Any singular vectors; singular values from 10^low to 10^high, `rank` of them."""
    small = min(rows, columns) if rank is None else rank
    left, right = (np.linalg.qr(rng.standard_normal((size, small)))[0] for size in (rows, columns))
    return left * 10 ** rng.uniform(low, high, small) @ right.T


def draw_problem(seed, shape, start, scale):
    rng = np.random.default_rng(seed)
    samples, n, m, h, rank = shape
    x = matrix(rng, samples, n, rank=rank)
    w1, w2 = scale * rng.standard_normal((n, h)), scale * rng.standard_normal((h, m))
    if start.startswith("balanced"):
        u, s, vt = np.linalg.svd(w1 @ w2, full_matrices=False)
        k = min(len(s), h)
        q = np.linalg.qr(rng.standard_normal((h, k)))[0]
        w1, w2 = u[:, :k] * np.sqrt(s[:k]) @ q.T, q * np.sqrt(s[:k]) @ vt[:k]
    elif start == "one large":
        ratio = 10 ** rng.uniform(-1, 1)
        w1, w2 = w1 * ratio, w2 / ratio
    elif start == "uneven":
        w1, w2 = w1 * 10 ** rng.uniform(-1, 0.5, h), w2 * 10 ** rng.uniform(-1, 0.5, (h, 1))
    y = rng.standard_normal((samples, m))
    if start.endswith("almost solved"):
        y = x @ w1 @ w2 + 10 ** rng.uniform(-4, -1) * scale * y
    return Problem(x, y, w1, w2)


def problems(shapes=SHAPES, starts=STARTS, scales=(-1.0, 0.5)):
    seeds = st.integers(0, 2**32 - 1)
    scale = st.floats(*scales).map(lambda exponent: 10**exponent)
    cases = st.tuples(seeds, st.sampled_from(shapes), st.sampled_from(starts), scale)
    return cases.map(lambda case: (draw_problem(*case), case[1]))


def each(count=250):
    return settings(max_examples=count, deadline=None, derandomize=True)


def numpy_results(function, *static):
    compiled = jax.jit(function, static_argnames=static)
    return lambda *args, **kwargs: jax.tree.map(np.asarray, compiled(*args, **kwargs))


reduced = numpy_results(lambda x, y, w1, w2, rank: flow.reduce(x, y, w1, w2, rank).network, "rank")


def full_rank(problem, shape):
    """The problem that flow and descent see: X square and of full rank, the least loss zero."""
    return Problem(*reduced(*problem, rank=shape.rank))


def error(p):
    return p.y - p.x @ p.w1 @ p.w2


def descend(p, eta):
    g = -p.x.T @ error(p)
    return p._replace(w1=p.w1 - eta * g @ p.w2.T, w2=p.w2 - eta * p.w1.T @ g)


def loss(p):
    return 0.5 * np.sum(error(p) ** 2)


def imbalance(p):
    return p.w1.T @ p.w1 - p.w2 @ p.w2.T


def tau_ends(w1, w2):
    """The extreme eigenvalues of tau, from the matrix of the operator itself."""
    operator = np.kron(np.eye(len(w1)), (w2.T @ w2).T) + np.kron(w1 @ w1.T, np.eye(w2.shape[1]))
    return np.linalg.eigvalsh(operator)[[0, -1]]


def sigma(w, k):
    return np.append(np.linalg.svd(w, compute_uv=False), np.zeros(max(w.shape)))[k - 1]


def below(lower, upper, scale=None, slack=1e-9):
    """lower <= upper but for rounding, relative to the largest of what they were computed from."""
    scale = np.maximum(np.abs(lower), np.abs(upper)) if scale is None else scale
    return np.all(lower <= upper + slack * scale)


# The common notation


def at_point(x, y, w1, w2):
    n, m = w1.shape[0], w2.shape[1]
    w, spectrum = w1 @ w2, nets.imbalance_spectrum(w1, w2)
    s_m, s_n, s_1 = nets.singular_values(w, m, n, 1)
    smallest = jnp.linalg.svd(w, compute_uv=False)[-1]
    return {
        "alpha": nets.alpha(spectrum, s_m, s_n, n, m),
        "printed": nets.alpha_as_printed(spectrum, smallest, n, m),
        "beta": nets.beta(spectrum, s_1),
        "ends": jnp.stack([nets.tau_smallest(w1, w2), nets.tau_largest(w1, w2)]),
        "tau": nets.tau(w, w1, w2),
        "imbalance": nets.imbalance(w1, w2),
        "spectrum": spectrum,
        "loss": nets.loss(x, y, w1, w2),
        "gradients": nets.gradients(x, y, w1, w2),
        "slopes": jax.grad(lambda w1, w2: 0.5 * jnp.sum((y - x @ w1 @ w2) ** 2), argnums=(0, 1))(w1, w2),
        "curvature": nets.curvature(x),
    }


point = numpy_results(at_point)


@each(400)
@given(problems())
def test_alpha_and_beta_enclose_the_spectrum_of_tau(drawn):
    p, _ = drawn
    at = point(*p)
    ends = tau_ends(p.w1, p.w2)
    np.testing.assert_allclose(at["ends"], ends, atol=1e-12 * ends[1])
    np.testing.assert_allclose(at["tau"], p.w1 @ (p.w2 @ p.w2.T + p.w1.T @ p.w1) @ p.w2, atol=1e-12 * ends[1] ** 2)
    assert below(at["alpha"], ends[0], ends[1])
    assert below(ends[1], at["beta"])
    assert at["alpha"] >= 0


def test_the_printed_alpha_is_a_bound_for_square_products_only():
    """The document's counts: none of 813 for n = m, 1679 of 3187 otherwise."""
    broken = {True: [], False: []}
    for seed in range(40):
        for shape in SHAPES:
            for start in STARTS[:4]:
                p = draw_problem(seed, shape, start, 1.0)
                at = point(*p)
                lowest, highest = tau_ends(p.w1, p.w2)
                broken[shape.n == shape.m].append(not below(at["printed"], lowest, highest))
    assert not any(broken[True])
    assert 0.2 < np.mean(broken[False]) < 0.8, np.mean(broken[False])


@each()
@given(problems(shapes=(SHAPES[-1],)))
def test_alpha_is_the_eigenvalue_itself_for_scalars(drawn):
    """And the exact rate of Min et al. 2021 is twice that, times S."""
    p, _ = drawn
    at, u, v = point(*p), p.w1.item(), p.w2.item()
    assert at["alpha"] == pytest.approx(u**2 + v**2, rel=1e-12)
    assert flow.scalar_rate(u**2 - v**2, u * v, p.x.item() ** 2) == pytest.approx(
        2 * p.x.item() ** 2 * (u**2 + v**2), rel=1e-12
    )


@each()
@given(problems())
def test_loss_gradients_imbalance_and_curvature_are_what_they_are_called(drawn):
    p, shape = drawn
    at = point(*p)
    assert at["loss"] == pytest.approx(loss(p), rel=1e-12)
    for ours, theirs in zip(at["gradients"], at["slopes"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-11 * np.abs(theirs).max())
    np.testing.assert_allclose(at["imbalance"], imbalance(p), atol=1e-12 * np.abs(imbalance(p)).max() + 1e-14)
    spectrum = np.linalg.eigvalsh(imbalance(p))
    found = np.append(at["spectrum"], np.zeros(max(0, shape.h - shape.n - shape.m)))
    np.testing.assert_allclose(np.sort(found), spectrum, atol=1e-12 * np.sum(p.w1**2 + 0) + 1e-12 * np.sum(p.w2**2))
    hessian = np.linalg.eigvalsh(p.x.T @ p.x)
    np.testing.assert_allclose(at["curvature"], [max(hessian[0], 0), hessian[-1]], atol=1e-12 * hessian[-1])


def test_gaps_of_a_spectrum_by_hand():
    """h = 6, eigenvalues 5, 3, 1, 0, -2, -4, zeros given or left out; n = 2, m = 2 and n = 3, m = 1."""
    for spectrum in ([5.0, 3.0, 1.0, 0.0, -2.0, -4.0], [-4.0, 1.0, 5.0, -2.0, 3.0]):
        assert nets.gaps(np.array(spectrum), 2, 2) == (3 + 2, 5 - 3, 4 - 2)
        assert nets.gaps(np.array(spectrum), 3, 1) == (1 + 4, 5 - 1, 4 - 4)
        assert nets.gaps(np.array(spectrum), 8, 9) == (0, 5, 4)
    spectrum = np.array([5.0, 3.0, 1.0, -2.0, -4.0])
    by_hand = 0.5 * (-2 + np.sqrt(49 + 4 * 9)) + 0.5 * (-2 + np.sqrt(49 + 4 * 0.25))
    assert nets.alpha(spectrum, 3.0, 0.5, 2, 2) == pytest.approx(by_hand, rel=1e-14)
    assert nets.alpha(spectrum, 0.5, 3.0, 3, 1) != nets.alpha(spectrum, 3.0, 0.5, 3, 1)
    assert nets.beta(spectrum, 1.5) == pytest.approx(0.5 * (5 + np.sqrt(34)) + 0.5 * (4 + 5), rel=1e-14)


polynomial_root = jax.jit(nets.root_of_increasing)


@each()
@given(
    st.lists(st.floats(-6, 6), min_size=3, max_size=3),
    st.floats(-6, 6),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_the_root_of_an_increasing_polynomial(exponents, where, kept):
    """Coefficients over twelve decades and zeros among them; no root is lost however far it is from any one term's."""
    coefficients = [10**e * k for e, k in zip(exponents, (True, *kept[1:]), strict=True)]
    root = 10**where
    target = sum(c * root ** (i + 1) for i, c in enumerate(coefficients))
    assert float(polynomial_root(target, tuple(coefficients))) == pytest.approx(root, rel=1e-12)
    assert polynomial_root(0.0, tuple(coefficients)) == 0


# Gradient flow (Min et al. 2021 and 2022)


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

    flat = solve_ivp(field, (0, end), np.concatenate([w1.ravel(), w2.ravel()]), "DOP853", rtol=1e-10, atol=1e-13).y
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


# Gradient descent (Xu et al. 2023)


def descent_constants(x, y, w1, w2):
    start = descent.constants(x, y, w1, w2)
    steps = descent.largest_step(start, C1, C2)
    fixed, at_end = (descent.rate_bound(start, now, C1, C2) for now in (start.loss, 0.0))
    return {
        "constants": start,
        "p1": start.p1,
        "kappa": start.kappa,
        "steps": steps,
        "step": steps.step,
        "f": fixed,
        "best": fixed.best_step(),
        "adaptive": descent.adaptive_step(fixed, steps.step),
        "asymptotic": descent.asymptotic_rate(start, C1, C2),
        "at the end": at_end.at(at_end.best_step()),
        "rhohat": descent.current_rate_bound(x, y, w1, w2),
        "rho": descent.rate(x, y, w1, w2),
    }


def descent_at(x, y, w1, w2, eta):
    rho = descent.rate(x, y, w1, w2)
    return {
        "rate": rho.at(eta),
        "margin": descent.rate_margin(x, y, w1, w2, eta),
        "change": descent.imbalance_change(x, y, w1, w2, eta),
        "bound": descent.imbalance_change_bound(x, y, w1, w2, eta),
    }


constants = numpy_results(descent_constants)
descent_step = numpy_results(descent_at)
fractions = st.floats(-2, 1).map(lambda exponent: 10**exponent)  # of the step 1/(K lmax), whichever theorem applies


@each(400)
@given(problems(), fractions)
def test_a_step_changes_the_imbalance_by_the_exact_term(drawn, fraction):
    """And by no more than the bound; rounding is relative to what D+ is made of."""
    p, _ = drawn
    eta = fraction / (sigma(p.x, 1) ** 2 * tau_ends(p.w1, p.w2)[1])
    at, new = descent_step(*p, eta), descend(p, eta)
    size = sum(np.sum(w**2) for w in (p.w1, p.w2, new.w1, new.w2))
    np.testing.assert_allclose(at["change"], imbalance(new) - imbalance(p), atol=1e-12 * size)
    assert below(np.linalg.norm(at["change"]), at["bound"])


@each(400)
@given(problems(), fractions)
def test_the_loss_falls_at_the_rate_of_lemma_3_1(drawn, fraction):
    """L+ <= rho L where the condition holds, which it does for small steps."""
    p, shape = drawn
    p = full_rank(p, shape)
    lowest, highest = tau_ends(p.w1, p.w2)
    eta = fraction * lowest / (sigma(p.x, 1) ** 2 * highest**2)
    at, now = descent_step(*p, eta), loss(p)
    if at["margin"] >= 0:
        assert below(loss(descend(p, eta)), at["rate"] * now, now)
    assert descent_step(*p, 0.0)["margin"] == pytest.approx(lowest, abs=1e-10 * highest)


def along(count, step):
    """Loss, the ends of tau's spectrum, the drift of D, and what `step` yields, along `count` steps of descent."""

    def run(x, y, w1, w2, *extra):
        first = nets.imbalance(w1, w2)

        def one(weights, t):
            eta, more = step(t, x, y, *weights, *extra)
            g1, g2 = nets.gradients(x, y, *weights)
            seen = {
                "loss": nets.loss(x, y, *weights),
                "ends": jnp.stack([nets.tau_smallest(*weights), nets.tau_largest(*weights)]),
                "drift": jnp.linalg.norm(nets.imbalance(*weights) - first),
                "eta": eta,
                **more,
            }
            return (weights[0] - eta * g1, weights[1] - eta * g2), seen

        return jax.lax.scan(one, (w1, w2), jnp.arange(count))[1]

    return numpy_results(run)


def fixed_step(t, x, y, w1, w2, eta, start):
    now = nets.loss(x, y, w1, w2)
    f = descent.rate_bound(start, now, C1, C2).at(eta)
    return eta, {"rho": descent.rate(x, y, w1, w2).at(eta), "f": f}


def best_step(t, x, y, w1, w2, largest, start, which):
    """Adaptive steps by rho, rhohat, f(., t) and f(., 0)."""
    now = nets.loss(x, y, w1, w2)
    bounds = (
        descent.rate(x, y, w1, w2),
        descent.current_rate_bound(x, y, w1, w2),
        descent.rate_bound(start, now, C1, C2),
        descent.rate_bound(start, start.loss, C1, C2),
    )
    bound = jax.tree.map(lambda *a: jnp.stack(a)[which], *bounds)
    eta = descent.adaptive_step(bound, largest)
    return eta, {
        "rho": bounds[0].at(eta),
        "rhohat": bounds[1].at(eta),
        "f": bounds[2].at(eta),
        "margin": descent.rate_margin(x, y, w1, w2, eta),
    }


def falls(run, rate, p):
    """L+ <= rate L; a residual is rounded relative to Y."""
    now, after = run["loss"][:-1], run["loss"][1:]
    seen = after > FLOOR * run["loss"][0]
    return below(after[seen], (rate[:-1] * now)[seen], (now + 1e-5 * np.sqrt(now) * np.linalg.norm(p.y))[seen])


fixed_run, adaptive_run = along(25, fixed_step), along(25, best_step)


@each()
@given(problems(), st.floats(0.05, 1.0))
def test_fixed_steps_up_to_the_largest_keep_every_promise_of_b(drawn, fraction):
    """rho <= f, L+ <= f L, c1 alpha_0 <= lmin <= lmax <= c2 beta_0 and the drift of the imbalance; n != m included."""
    p, shape = drawn
    p = full_rank(p, shape)
    start = constants(*p)
    if not start["step"] > 0:
        assert start["constants"].alpha == 0
        return
    eta = fraction * start["step"]
    run = fixed_run(*p, eta, start["constants"])
    assert below(run["rho"], run["f"])
    assert falls(run, run["f"], p)
    assert below(C1 * start["constants"].alpha, run["ends"][:, 0])
    assert below(run["ends"][:, 1], C2 * start["constants"].beta)
    bound = descent.imbalance_drift_bound(start["constants"], eta, C1, C2)
    assert below(run["drift"], bound, scale=bound + 1e-5 * run["ends"][0, 1])


@each()
@given(problems(SHAPES[:4]), st.integers(0, 3))
def test_adaptive_steps_fall_at_their_rates(drawn, which):
    """rho <= rhohat, rho <= f and L+ <= rho L at each step, whichever of the four rates chooses it."""
    p, shape = drawn
    p = full_rank(p, shape)
    start = constants(*p)
    run = adaptive_run(*p, start["step"], start["constants"], which)
    assert below(run["rho"], run["f"])
    assert below(run["rho"], run["rhohat"])
    assert falls(run, run["rho"], p)
    assert np.all(run["margin"] >= -1e-9 * run["ends"][:, 1])
    assert np.all(run["eta"] <= start["step"] * (1 + 1e-12))


@each()
@given(problems())
def test_constants_and_steps_solve_their_equations(drawn):
    """p1 and p2 bound the product, alpha_0 and beta_0 tau; the steps are roots; f never beats 1 - 1/kappa."""
    p, shape = drawn
    p = full_rank(p, shape)
    got = constants(*p)
    c, f, w = got["constants"], got["f"], p.w1 @ p.w2
    lowest, highest = tau_ends(p.w1, p.w2)
    assert below(c.alpha, lowest, highest)
    assert below(highest, c.beta)
    assert below(got["p1"], sigma(w, min(w.shape)), np.linalg.norm(w))
    assert below(np.linalg.norm(w), c.p2)
    assert [p > 0 for p in (c.p_m, c.p_n)] == [got["p1"] > 0 and k == min(w.shape) for k in w.shape[::-1]]
    grid = np.logspace(-3, 3, 2001) * max(got["best"], 1e-300)
    assert below(f.at(got["best"]), f.at(grid))
    assert below(1 - 1 / got["kappa"], f.at(grid))
    assert got["asymptotic"] == pytest.approx(got["at the end"], rel=1e-10)
    assert got["adaptive"] == min(got["best"], got["step"])
    if c.alpha > 0:
        extra = 4 * C2 * c.loss * c.K / (C2 - 1), 8 * C2 * c.beta * c.loss * c.K / ((1 - C1) * c.alpha)
        for eta, q in zip(got["steps"], extra, strict=True):
            assert f.a4 * eta**3 + f.a3 * eta**2 + (f.a2 + q) * eta == pytest.approx(f.a1, rel=1e-10)


def test_rates_and_steps_of_b_by_hand():
    """mu = 2, K = 3, p2 = 0.7, alpha_0 = 0.6, beta_0 = 5, L_0 = 0.04, at L = 0.01, c1 = 0.5, c2 = 1.5."""
    start = descent.Constants(2.0, 3.0, 0.1, 0.1, 0.7, 0.6, 5.0, 0.04)
    a1 = 2 * 0.5 * 0.6 * 2
    a2 = 2 * 0.7 * np.sqrt(2 * 1.5 * 0.01 * 8) + 1.5 * 4 * 7.5**2
    a3 = 2 * 7.5 * 0.7 * np.sqrt(2 * 1.5**3 * 0.01 * 32)
    a4 = 2 * 1.5**2 * 8 * 0.49 * 0.01
    np.testing.assert_allclose(descent.rate_bound(start, 0.01, 0.5, 1.5), (a1, a2, a3, a4), rtol=1e-13)
    assert descent.asymptotic_rate(start, 0.5, 1.5) == pytest.approx(1 - (0.3 / 7.5) ** 2 / 1.5, rel=1e-14)
    y = np.diag([3.0, 4.0])
    assert descent.arora_step(0.5, y) == pytest.approx(0.125 / (6144 * 8 * 625), rel=1e-14)
    assert descent.du_step(3, 0.02, 2, y) == pytest.approx(0.1 / (400 * 5**1.5), rel=1e-14)
    bound = descent.imbalance_drift_bound(start, 1e-3, 0.5, 1.5)
    fall = 1 - descent.rate_bound(start, 0.04, 0.5, 1.5).at(1e-3)
    assert bound == pytest.approx(2 * 1.5 * 5 * 3 * 0.04 * 1e-6 / float(fall), rel=1e-12)


@pytest.mark.parametrize(("spread", "published"), [(1, 0.505), (5, 0.555), (100, 0.600)])
def test_alpha_over_beta_of_the_published_experiment(spread, published):
    """The titles of Figure 2 of Xu et al. 2023, by the authors' code: at seeds 1 to 3, and the mean over 50."""
    side, h = 20, 1000

    def ratio(seed):
        rng = np.random.RandomState(seed)
        x, theta = np.linalg.qr(rng.normal(size=(side, side)))[0], rng.normal(0, side**-0.5, (side, side))
        scale = np.sqrt((spread + np.sqrt(spread**2 + 4)) / 2)
        w1, w2 = scale * rng.normal(size=(side, h)), rng.normal(size=(h, side)) / scale
        start = jitted(x, x @ theta, w1, w2)
        return start.alpha / start.beta

    jitted = jax.jit(descent.constants)
    ratios = np.array([ratio(seed) for seed in range(50)])
    assert np.mean(ratios[1:4]) == pytest.approx(published, abs=0.0015)
    assert np.mean(ratios) == pytest.approx(published, abs=0.01)


# The local Polyak-Łojasiewicz inequality and descent lemma (Xu et al. 2025)


class General(NamedTuple):
    """l(W) = sum of phi(W - W*): phi'' falls from K at zero to mu, so that l is mu-strongly convex and K-smooth."""

    mu: float
    K: float
    optimum: np.ndarray

    def __call__(self, w):
        off = w - self.optimum
        return jnp.sum(self.mu * off**2 / 2 + (self.K - self.mu) * (jnp.sqrt(1 + off**2) - 1))


def local_at(mu, K, optimum, w1, w2, eta):
    convex = General(mu, K, optimum)
    of_weights = lambda w: convex(w[0] @ w[1])  # noqa: E731
    now, slopes = jax.value_and_grad(of_weights)((w1, w2))
    smooth, pl = local.smoothness(K, now, w1, w2), local.pl_constant(mu, w1, w2)
    eta = eta / smooth.k0
    return {
        "loss": now,
        "next": of_weights((w1 - eta * slopes[0], w2 - eta * slopes[1])),
        "square": jnp.sum(slopes[0] ** 2) + jnp.sum(slopes[1] ** 2),
        "pl": pl,
        "smooth": smooth.at(eta),
        "eta": eta,
        "step": smooth.step(),
        "at step": smooth.at(smooth.step()),
        "rate": local.rate(pl, smooth.at(eta), eta),
        "parts": smooth,
    }


local_step = numpy_results(local_at)


@each(400)
@given(problems(starts=STARTS[:4]), st.floats(-2, 0.5).map(lambda e: 10**e), st.floats(0, 2).map(lambda e: 10**e))
def test_the_descent_lemma_and_the_pl_inequality_hold_for_a_general_loss(drawn, eta, kappa):
    """L+ <= L - (eta - K_t eta^2/2) ||grad L||^2 and 1/2 ||grad L||^2 >= mu_t L; L+ <= rho L for eta K_t < 2."""
    p, shape = drawn
    optimum = (p.w1 @ p.w2)[::-1] if shape.n > 1 else 2 * p.w1 @ p.w2 - 1
    at = local_step(0.7, 0.7 * kappa, optimum, p.w1, p.w2, eta)
    now, slope = at["loss"], at["square"]
    assert below(at["next"], now - (at["eta"] - at["smooth"] * at["eta"] ** 2 / 2) * slope, now)
    assert below(at["pl"] * now, slope / 2, at["parts"].k0 * now)
    assert at["step"] * at["at step"] == pytest.approx(1, rel=1e-12)
    if at["eta"] * at["smooth"] < 2:
        assert below(at["next"], at["rate"] * now, now)


def test_local_constants_by_hand():
    """sigma(W1) = (3, 1), sigma(W2) = (2, 0.5): smax2 = 13, smin2 = 1.25, sigma_1(W) = 6; K = 2, L = 0.25."""
    w1, w2 = np.diag([3.0, 1.0]), np.diag([2.0, 0.5])
    np.testing.assert_allclose(local.smoothness(2.0, 0.25, w1, w2), (27.0, 3 * 26.0, 6 * 4 * 6 * 0.25), rtol=1e-13)
    assert local.pl_constant(2.0, w1, w2) == pytest.approx(2.5, rel=1e-13)
    assert local.rate(2.5, 30.0, 0.1) == pytest.approx(1 - 0.5 + 0.75, rel=1e-13)


def local_constants(x, y, w1, w2, optimum, c, d):
    start = local.constants(nets.curvature(x), nets.loss(x, y, w1, w2), optimum, w1, w2)
    steps = local.largest_step(start, c, d)
    return {"constants": start, "b1": start.b1, "steps": steps, "step": steps.step}


def scheduled_step(t, x, y, w1, w2, schedule, by_bound):
    smooth = local.smoothness(schedule.start.K, nets.loss(x, y, w1, w2), w1, w2)
    bound = schedule.smoothness(t)
    eta = schedule.step(t, jnp.where(by_bound, 1 / bound, smooth.step()))
    pl = local.pl_constant(schedule.start.mu, w1, w2)
    return eta, {"smooth": smooth.at(eta), "bound": bound, "pl": pl}


def schedule_promises(schedule):
    return {
        "mubar": schedule.mubar,
        "rhobar": schedule.rhobar,
        "growth": schedule.growth,
        "drift": schedule.imbalance_drift_bound(),
    }


promises = numpy_results(schedule_promises)
theorem_e1 = numpy_results(local_constants)
scheduled_run = along(40, scheduled_step)
EXPONENTS = ((0.5, 2.0), (0.5, 1.01), (0.8, 1.5))
WIDE = (Shape(4, 4, 4, 100, 4), Shape(7, 3, 5, 60, 3), Shape(3, 8, 2, 40, 3), SHAPES[-1])  # where a1 is not tiny


@each()
@given(problems(WIDE), st.sampled_from(EXPONENTS), st.floats(0.05, 0.999), st.booleans())
def test_the_schedule_keeps_every_promise_of_theorem_e_1(drawn, exponents, fraction, by_bound):
    """mubar <= mu_t, K_t <= Kbar_t, L(t) <= L_0 rhobar_0^t and the drift, for steps by 1/K_t and by 1/Kbar_t."""
    p, shape = drawn
    p = full_rank(p, shape)
    optimum = np.linalg.solve(p.x, p.y)
    got = theorem_e1(*p, optimum, *exponents)
    start = got["constants"]
    if start.a1 < 1e-9 * start.a2:  # no step is promised to do anything
        return
    schedule = local.Schedule(start, fraction * got["step"], *exponents)
    run, promised = scheduled_run(*p, schedule, by_bound), promises(schedule)
    seen = run["loss"] > FLOOR * run["loss"][0]
    times = np.arange(len(seen))
    assert promised["mubar"] > 0
    assert promised["rhobar"] <= 1
    scale = run["loss"] + 1e-5 * np.sqrt(run["loss"]) * np.linalg.norm(p.y)
    assert below(run["loss"][seen], (start.loss * promised["rhobar"] ** times)[seen], scale[seen])
    assert below(promised["mubar"], run["pl"])
    assert below(run["smooth"], run["bound"])
    assert below(run["ends"][:, 1], start.a2 * promised["growth"])
    bound = promised["drift"]
    assert below(run["drift"], bound, scale=bound + 1e-5 * run["ends"][0, 1])


def test_constants_and_schedule_of_theorem_e_1_by_hand():
    """c = 0.8, d = 1.5, where the e^{sqrt(eta0)} that is printed in Kbar_t would differ."""
    start = local.Constants(0.5, 2.0, 0.3, 0.0, 0.0, 4.0, 3.0, 7.0)
    eta, c, d, t = 0.01, 0.8, 1.5, 3
    schedule = local.Schedule(start, eta, c, d)
    growth = np.exp(eta**c)
    mubar = 0.5 * (3 + 14 * (1 - growth))

    def kbar(rho, big):
        last = 2 * growth * 7 * (1 + 3 * np.sqrt(4 * 0.3 * big) * eta)
        return np.sqrt(4 * 0.3 * rho) + 6 * 4 * 4 * 0.3 * eta**2 * big + last

    rhobar = 1 - 2 * mubar * eta + mubar * kbar(1, 1) * eta**2
    big = (1 + eta**d) * rhobar
    assert schedule.mubar == pytest.approx(mubar, rel=1e-13)
    assert schedule.rhobar == pytest.approx(rhobar, rel=1e-13)
    assert schedule.Dbar == pytest.approx(big, rel=1e-13)
    assert schedule.smoothness(t) == pytest.approx(kbar(rhobar**t, big**t), rel=1e-13)
    assert schedule.step(t, 1.0) == pytest.approx((1 + eta**d) ** (t / 2) * eta, rel=1e-13)
    assert schedule.step(t, 0.001) == 0.001
    assert schedule.imbalance_drift_bound() == pytest.approx(
        2 * 2 * eta**2 * 7 * growth * 0.3 / (1 - float(big)), rel=1e-10
    )
    assert local.asymptotic_rate(start) == pytest.approx(1 - 0.25 * 3 / 7, rel=1e-14)
    assert local.Schedule(start, eta)[2:] == (0.5, 2.0)  # Theorem 3.2


@each()
@given(problems(WIDE), st.sampled_from(EXPONENTS))
def test_the_largest_step_of_theorem_e_1_is_where_a_condition_first_breaks(drawn, exponents):
    p, shape = drawn
    p = full_rank(p, shape)
    optimum, c = np.linalg.solve(p.x, p.y), exponents[0]
    got = theorem_e1(*p, optimum, *exponents)
    start, steps, w = got["constants"], got["steps"], p.w1 @ p.w2
    if start.a1 < 1e-9 * start.a2:
        return
    lowest, highest = tau_ends(p.w1, p.w2)
    assert below(start.a1, lowest, highest)
    assert below(highest, start.a2)
    assert below(got["b1"], sigma(w, min(w.shape)), np.linalg.norm(w))
    assert below(sigma(w, 1), start.b2)
    assert [b > 0 for b in (start.b_m, start.b_n)] == [got["b1"] > 0 and k == min(w.shape) for k in w.shape[::-1]]

    def conditions(eta):
        """Positive where they hold, as the paper writes them."""
        schedule = local.Schedule(start, eta, *exponents)
        drift = (1 - np.exp(-(eta**c))) * (1 - schedule.Dbar) - 4 * start.K * start.loss * eta**2
        return 1 - eta * schedule.smoothness(0), drift, np.log(1 + start.a1 / (2 * start.a2)) ** (1 / c) - eta

    for index, step in enumerate(steps):
        if step > 1e-4:  # below, the conditions as written are rounding
            grid = step * np.append(np.logspace(-2, 0, 300)[:-1] ** 0.5, [1 - 1e-4, 1 + 1e-4])
            assert np.array_equal(np.array(conditions(grid)[index]) > 0, np.arange(len(grid)) < len(grid) - 1)
    assert got["step"] == min(steps)


@pytest.mark.parametrize(("n", "h"), [(4, 100), pytest.param(5, 400, marks=pytest.mark.long)])
def test_the_schedule_solves_the_authors_problem_in_tens_of_steps(n, h):
    """The experiment of Xu et al. 2025, smaller, with c = 0.5, d = 1.01: twenty decades of loss."""
    rng = np.random.default_rng(h)
    x, w1, w2 = np.linalg.qr(rng.standard_normal((n, n)))[0], rng.standard_normal((n, h)), rng.standard_normal((h, n))
    p = Problem(x, x @ w1 @ w2 + 0.1 * rng.standard_normal((n, n)), w1, w2)
    got = theorem_e1(*p, x.T @ p.y, 0.5, 1.01)
    losses = scheduled_run(*p, local.Schedule(got["constants"], 0.9 * got["step"], 0.5, 1.01), False)["loss"]
    needed = np.argmax(losses < 1e-20 * losses[0])
    assert 10 < needed <= 40, needed


def test_backtracking_takes_the_first_step_that_falls_far_enough():
    """On K/2 ||p||^2 the condition is eta <= 2 (1 - constant)/K."""
    p = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}

    def convex(p):
        return 2.0 * (jnp.sum(p["a"] ** 2) + p["b"] ** 2)

    step = partial(local.backtracking_step, convex, p, jax.grad(convex)(p))
    assert step() == pytest.approx(0.01, rel=1e-12)
    assert step(0.051) == pytest.approx(0.0051, rel=1e-12)
    assert step(0.049) == pytest.approx(0.049, rel=1e-12)
    assert step(1.0, 0.5, 0.5) == pytest.approx(0.25, rel=1e-12)
    assert step(tries=2) == 0
    assert jax.jit(step)() == step()


@pytest.mark.parametrize("rows", [3, 30])
def test_spectra_have_the_derivatives_of_the_eigenvalues(rows):
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.standard_normal((rows, 4))), jnp.asarray(rng.standard_normal((rows, 5)))
    dx, dy = (jnp.asarray(rng.standard_normal(matrix.shape)) for matrix in (x, y))
    k = min(rows, 9)

    def kept(x, y):
        values = jnp.linalg.eigvalsh(x @ x.T - y @ y.T)[::-1]
        return jnp.concatenate([values[:4], values[-5:]]) if rows > k else values

    for ours, reference, at, along in (
        (spectra.spectrum, lambda x: jnp.linalg.svd(x, compute_uv=False), (x,), (dx,)),
        (spectra.difference_spectrum, kept, (x, y), (dx, dy)),
    ):
        np.testing.assert_allclose(ours(*at), reference(*at), atol=1e-12)
        slopes = [jax.jvp(function, at, along)[1] for function in (ours, reference)]
        np.testing.assert_allclose(*slopes, atol=1e-11)
        slopes = [jax.grad(lambda *z, f=function: jnp.sum(f(*z) ** 3))(*at) for function in (ours, reference)]
        np.testing.assert_allclose(*slopes, rtol=1e-9, atol=1e-9)


def test_no_more_than_one_matrix_is_given_to_lapack_at_a_time():
    """Batches of them, inside a compiled program on CPU, can wait for each other for ever."""
    x = jnp.zeros((7, 4, 3))
    for function, batch in ((spectra.spectrum, (x,)), (spectra.difference_spectrum, (x, x))):
        program = jax.jit(jax.vmap(function)).lower(*batch).as_text()
        calls = [line for line in program.splitlines() if "custom_call @lapack" in line]
        assert calls
        assert not any("7x" in line for line in calls)


def test_all_of_it_can_be_jitted_mapped_and_differentiated():
    """The relative derivatives of rates and roots along one direction, summed, against a central difference."""
    shape = WIDE[1]
    p = draw_problem(4, shape, "gaussian", 1.0)
    towards = Problem(*(np.random.default_rng(9).standard_normal(matrix.shape) for matrix in p))

    def summary(x, y, w1, w2):
        reduced = flow.reduce(x, y, w1, w2, shape.rank)
        x, y, u1, w2 = reduced.network
        start = descent.constants(x, y, u1, w2)
        theorem = local.constants(nets.curvature(x), start.loss, jnp.linalg.solve(x, y), u1, w2)
        steps = *descent.largest_step(start, C1, C2), *local.largest_step(theorem)
        smooth = local.smoothness(theorem.K, theorem.loss, u1, w2).step()
        best = descent.current_rate_bound(x, y, u1, w2).best_step()
        drift = local.Schedule(theorem, 0.5 * steps[2]).imbalance_drift_bound()
        return jnp.log(jnp.stack([flow.global_rate(reduced), *steps, smooth, best, drift]))

    points = Problem(*(np.stack([a + by * b for by in (1e-6, 0, -1e-6)]) for a, b in zip(p, towards, strict=True)))
    ahead, here, behind = np.sum(jax.jit(jax.vmap(summary))(*points), axis=1)
    value, slopes = jax.jit(jax.value_and_grad(lambda p: jnp.sum(summary(*p))))(p)
    assert float(value) == pytest.approx(float(here), rel=1e-9)
    slope = sum(np.sum(a * b) for a, b in zip(slopes, towards, strict=True))
    assert float(slope) == pytest.approx(float(ahead - behind) / 2e-6, rel=1e-6)

"""The closed forms against scipy's DOP853, extended precision, each other, the solver, and what they tend to."""

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from lora_flow import Adapter, InputError, SingleLayer, oracles, solve
from lora_flow.oracles.modes import mean_exponential

TIMES = np.array([0.0, 0.3, 1.0, 3.0, 8.0])


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def orthonormal_rows(seed, rows, columns):
    return np.linalg.qr(normal(seed, columns, rows))[0].T


def lambda_balanced(seed, m, n, h, lam):
    """W1 (h, n) and W2 (m, h) with W2^T W2 - W1 W1^T = lam I."""
    common = np.zeros(h)
    common[: min(m, n)] = 0.3 * np.abs(normal(seed, min(m, n, h)))
    basis = orthonormal_rows(seed + 1, h, h)
    sides = []
    for extra, size in ((max(-lam, 0.0), n), (max(lam, 0.0), m)):
        rows = np.zeros((h, size))
        rows[:size] = orthonormal_rows(seed + size, min(h, size), size)
        sides.append(basis @ (np.sqrt(common + extra)[:, None] * rows))
    return sides[0], sides[1].T


def integrate(field, start, times):
    """The flow by DOP853, at tolerances near rounding: the parts of the state at each time."""
    shapes = [np.shape(part) for part in start]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]

    def parts(x):
        return [part.reshape(shape) for part, shape in zip(np.split(x, ends), shapes, strict=True)]

    def flattened(parts):
        return np.concatenate([np.ravel(part) for part in parts])

    run = solve_ivp(
        lambda t, x: flattened(field(*parts(x))),
        (0.0, times[-1]),
        flattened(start),
        method="DOP853",
        rtol=1e-13,
        atol=1e-15,
        t_eval=times,
    )
    return [parts(x) for x in run.y.T]


def two_layer(target):
    return lambda w1, w2: (w2.T @ (target - w2 @ w1), (target - w2 @ w1) @ w1.T)


def assert_products(got, flow, atol):
    for index, (w1, w2) in enumerate(flow):
        for ours, theirs in zip(got, (w2 @ w1, w1.T @ w1, w2 @ w2.T), strict=True):
            np.testing.assert_allclose(ours[index], theirs, rtol=0, atol=atol)


def stacked(products):
    """P = [W1^T; W2] [W1^T; W2]^T."""
    product, gram1, gram2 = map(np.asarray, products)
    return np.block([[gram1, product.T], [product, gram2]])


class TestRiccati:
    @pytest.mark.parametrize(
        ("m", "n", "h", "lam"),
        [
            (5, 5, 5, 0.0),
            (5, 5, 5, 2.0),
            (5, 5, 5, -2.0),
            (4, 7, 4, 1.5),
            (4, 7, 4, -1.5),
            (7, 4, 4, 1.5),
            (7, 4, 4, -0.5),
            (7, 4, 4, 1e-3),
            (6, 5, 8, 0.0),
        ],
    )
    def test_it_is_the_flow_from_lambda_balanced_weights(self, m, n, h, lam):
        target, (w1, w2) = normal(m, m, n), lambda_balanced(1, m, n, h, lam)
        flow = integrate(two_layer(target), (w1, w2), TIMES)
        assert_products(oracles.riccati(target, w1, w2, TIMES), flow, atol=3e-12)

    def test_it_agrees_with_extended_precision_down_to_small_modes(self):
        """From alpha = 1e-3 every mode, the smallest 1e-8 beside a largest of 3; the formula in 80 digits loses 20."""
        m = n = 5
        target, rows, t = normal(1, m, n), 1e-3 * orthonormal_rows(2, 2, n), 3.0
        lam = -mpmath.mpf(float(np.sum(rows**2) / 2))
        with mpmath.workdps(80):
            f = mpmath.zeros(m + n)
            for i in range(n):
                f[i, i] = -lam / 2
                for j in range(m):
                    f[n + j, i] = f[i, n + j] = mpmath.mpf(float(target[j, i]))
            for j in range(m):
                f[n + j, n + j] = lam / 2
            values, basis = mpmath.eigsy(f)
            q = basis.T * mpmath.matrix(np.vstack([rows.T, np.zeros((m, 2))]).tolist())
            gain = mpmath.diag([mpmath.expm1(2 * value * t) / (2 * value) for value in values])
            grown = basis * mpmath.diag([mpmath.exp(value * t) for value in values]) * q
            p = grown * (mpmath.eye(2) + q.T * gain * q) ** -1 * grown.T
            expected = np.array(p.tolist(), float)
        got = stacked(oracles.single_layer(target, rows, t))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14 * expected.max())
        left, _, right = np.linalg.svd(target)
        modes = [np.diag(left.T @ each[n:, :n] @ right.T) for each in (got, expected)]
        assert modes[1].min() < 1e-7 < 1 < modes[1].max()
        np.testing.assert_allclose(*modes, rtol=1e-8)

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 1000), st.floats(0.0, 4.0), st.floats(0.0, 4.0), st.sampled_from([-1.0, 0.0, 0.3]))
    def test_it_is_a_semigroup(self, seed, t1, t2, lam):
        """Started again from P(t1), whose square root is W1 and W2 up to a rotation, it goes on to P(t1 + t2)."""
        target, (w1, w2) = normal(seed, 3, 4), lambda_balanced(seed, 3, 4, 2, lam)
        values, vectors = np.linalg.eigh(stacked(oracles.riccati(target, w1, w2, t1, steps=16)))
        q = vectors[:, -2:] * np.sqrt(np.maximum(values[-2:], 0.0))
        went_on = oracles.riccati(target, q[:4].T, q[4:], t2, steps=16)
        at_once = oracles.riccati(target, w1, w2, t1 + t2, steps=16)
        np.testing.assert_allclose(stacked(went_on), stacked(at_once), rtol=0, atol=1e-9)

    def test_the_number_of_sub_steps_changes_nothing(self):
        target, (w1, w2) = normal(4, 4, 7), lambda_balanced(1, 4, 7, 4, -1.5)
        for few, many in zip(*(oracles.riccati(target, w1, w2, TIMES, steps=n) for n in (None, 300)), strict=True):
            np.testing.assert_allclose(few, many, rtol=0, atol=1e-12)

    def test_long_times_lead_to_the_best_approximation_of_rank_r(self):
        """And stay there: what the formula in one step makes of t = 8 is rounding."""
        shift = normal(3, 5, 6)
        left, sigma, right = np.linalg.svd(shift, full_matrices=False)
        alpha = 1e-2
        final = oracles.single_layer(shift, alpha * orthonormal_rows(4, 2, 6), 1e4)
        np.testing.assert_allclose(final.product, left[:, :2] * sigma[:2] @ right[:2], rtol=0, atol=1e-12)
        size = np.sqrt(sigma[:2] ** 2 + alpha**4 / 4)  # of a mode, where a^2 - b^2 = alpha^2 and a b = sigma
        expected = right[:2].T * (size + alpha**2 / 2) @ right[:2], left[:, :2] * (size - alpha**2 / 2) @ left[:, :2].T
        np.testing.assert_allclose(final.gram1, expected[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(final.gram2, expected[1], rtol=0, atol=1e-12)

    def test_times_have_any_shape_and_order(self):
        target, (w1, w2) = normal(5, 5, 5), lambda_balanced(1, 5, 5, 5, 0.0)
        row, column = (oracles.riccati(target, w1, w2, times) for times in (TIMES, TIMES[::-1, None]))
        for ours, theirs in zip(column, row, strict=True):
            assert ours.shape == (5, 1, 5, 5)
            np.testing.assert_allclose(ours[::-1, 0], theirs, rtol=0, atol=1e-14)
        np.testing.assert_allclose(row.product[0], w2 @ w1, rtol=0, atol=1e-14)

    def test_under_jit_and_vmap_with_sub_steps_that_suffice_or_not(self):
        shift, rows, times = normal(1, 4, 3), normal(2, 3, 1, 3), np.array([2.0, 8.0, 90.0])
        learned = jax.jit(jax.vmap(lambda a, t: oracles.single_layer(shift, a, t, steps=16).product))(rows, times)
        np.testing.assert_allclose(learned[0], oracles.single_layer(shift, rows[0], 2.0).product, rtol=0, atol=1e-13)
        assert np.all(np.isfinite(learned[1]))
        assert np.all(np.isnan(learned[2])), "16 sub-steps do not reach t = 90"


class TestLora:
    def test_a_scaled_layer_is_the_flow_of_single_layer(self):
        shift, rows = normal(5, 4, 6), 0.3 * orthonormal_rows(6, 2, 6)
        layer = SingleLayer(shift, scaling=2.0)
        field = jax.jit(lambda a, b: layer.field((Adapter(a, b),))[0])
        flow = integrate(field, (rows, np.zeros((4, 2))), TIMES)
        assert_products(oracles.single_layer(shift, rows, TIMES, scaling=2.0), flow, atol=3e-12)

    @pytest.mark.parametrize("rank", [1, 3])
    def test_below_a_frozen_isometry(self, rank):
        shift, w2 = normal(7, 7, 5), 1.7 * orthonormal_rows(8, 4, 7).T
        a0 = normal(9, 1, 5) if rank == 1 else 0.2 * orthonormal_rows(9, rank, 5)

        def field(a, b):
            residual = w2.T @ (shift - w2 @ b @ a)
            return b.T @ residual, residual @ a.T

        flow = integrate(field, (a0, np.zeros((4, rank))), TIMES / 2)
        assert_products(oracles.first_layer(shift, w2, a0, TIMES / 2), flow, atol=3e-12)

    @pytest.mark.long
    def test_derivatives_are_those_of_the_flow(self):
        """With respect to a shift of rank 1, whose F has a kernel, and to the row; solve differentiates its steps."""
        shift, row = np.outer(normal(1, 3), normal(2, 4)), normal(3, 1, 4)

        def with_oracle(shift, row):
            product = oracles.single_layer(shift, row, 1.0, steps=4).product
            return 0.5 * jnp.sum((shift - product) ** 2)

        def with_solver(shift, row):
            start = (Adapter(row, jnp.zeros((3, 1))),)
            return solve(SingleLayer(shift), start, t1=1.0, saves=2, rtol=1e-10).observables["loss"][-1]

        ours, theirs = (jax.grad(loss, argnums=(0, 1))(shift, row) for loss in (with_oracle, with_solver))
        for got, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-7)


def mode_exactly(y, u0, v0, t):
    """The closed form of (u + v)^2 in 120 digits, or that of (u - v)^2 where this is larger: u = -v is then no case."""
    y, u0, v0, t = map(mpmath.mpf, (y, u0, v0, t))
    swapped = abs(u0 - v0) > abs(u0 + v0)
    if swapped:
        y, v0 = -y, -v0
    d, z0 = (u0 - v0) * (u0 + v0), (u0 + v0) ** 2
    if z0 == 0:
        return 0.0, 0.0
    s = mpmath.sqrt(4 * y**2 + d**2)
    if s == 0:
        z = z0 / (1 + z0 * t / 2)
    else:
        high, low, decay = 2 * y + s, 2 * y - s, mpmath.exp(-s * t)
        z = (high * (z0 - low) - low * (z0 - high) * decay) / (z0 - low - (z0 - high) * decay)
    w = mpmath.sign(u0 + v0) * mpmath.sqrt(z)
    u, v = (w + d / w) / 2, (w - d / w) / 2
    return float(u), float(-v if swapped else v)


sizes = st.floats(-6, 1).map(lambda power: 10.0**power) | st.just(0.0)
values = st.builds(lambda size, sign: sign * size, sizes, st.sampled_from([-1.0, 1.0]))


class TestScalar:
    @pytest.mark.parametrize("y", [2.0, -2.0, 0.0])
    @pytest.mark.parametrize("start", [(0.0, 0.01), (0.5, -0.5), (0.5, 0.5), (0.0, 0.0), (-1.0, 0.3), (3.0, -0.2)])
    def test_it_is_the_flow_of_one_mode(self, y, start):
        flow = np.array(integrate(lambda u, v: ((y - u * v) * v, (y - u * v) * u), start, TIMES))
        got = np.array(oracles.scalar(y, *start, TIMES)).T
        if y > 0 and start == (0.5, -0.5):  # into the saddle, from which rounding then takes the solver away
            flow, got = flow[:3], got[:3]
        np.testing.assert_allclose(got, flow, rtol=0, atol=2e-12)

    @settings(max_examples=300, deadline=None)
    @given(values, values, values, st.floats(-3, 4).map(lambda power: 10.0**power), st.sampled_from([None, 1, -1]))
    def test_nothing_cancels(self, y, u0, v0, t, tie):
        """To 1e-13 of the mode's size from any start, u = v and u = -v included, at all times."""
        v0 = v0 if tie is None else tie * u0
        with mpmath.workdps(120):
            expected = np.array(mode_exactly(y, u0, v0, t))
        error = np.linalg.norm(np.array(oracles.scalar(y, u0, v0, t)) - expected)
        assert error <= 1e-13 * np.linalg.norm(expected) + 1e-140

    def test_when_half_is_learned(self):
        """From (0, alpha): u v = y/2 at t = log(2 sqrt(y)/alpha)/y, but for O(alpha^2)."""
        y, alpha = 2.0, 0.01
        u, v = oracles.scalar(y, 0.0, alpha, np.log(2 * np.sqrt(y) / alpha) / y)
        np.testing.assert_allclose(u * v, y / 2, rtol=alpha**2)
        u, v = oracles.scalar(y, 0.0, alpha, 2.82245)
        np.testing.assert_allclose(u * v, y / 2, rtol=2e-4)

    def test_the_loss_falls_at_twice_s(self):
        y, u0, v0 = 1.0, 0.0, 0.8
        u, v = oracles.scalar(y, u0, v0, np.array([4.0, 4.5]))
        rate = -np.diff(np.log((y - u * v) ** 2))[0] / 0.5
        np.testing.assert_allclose(rate, 2 * np.sqrt(4 * y**2 + (u0**2 - v0**2) ** 2), rtol=1e-3)

    def test_arguments_broadcast(self):
        u, v = oracles.scalar(np.array([1.0, 2.0]), 0.0, 0.1, np.linspace(0, 1, 3)[:, None])
        assert u.shape == v.shape == (3, 2)


class TestSpectral:
    left, right = orthonormal_rows(1, 3, 5).T, orthonormal_rows(2, 3, 4)
    sigma = np.array([3.0, 1.0, 1.0])

    def test_the_factors_are_those_of_the_flow(self):
        b0, a0 = np.array([0.0, 0.3, -0.2]), np.array([0.1, -0.3, 0.7])
        got = oracles.spectral(self.left, self.sigma, self.right, b0, a0, TIMES)
        field = two_layer(self.left * self.sigma @ self.right)
        flow = integrate(field, (a0[:, None] * self.right, self.left * b0), TIMES[:4])
        for index, (a, b) in enumerate(flow):
            np.testing.assert_allclose(got.a[index], a, rtol=0, atol=2e-12)
            np.testing.assert_allclose(got.b[index], b, rtol=0, atol=2e-12)

    def test_from_equal_sizes_it_is_the_riccati_solution(self):
        a, b = oracles.spectral(self.left, self.sigma, self.right, np.zeros(3), np.full(3, 0.1), TIMES)
        products = oracles.single_layer(self.left * self.sigma @ self.right, 0.1 * self.right, TIMES)
        for ours, theirs in zip((b @ a, a.mT @ a, b @ b.mT), products, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)


class TestSymmetric:
    def test_it_is_the_flow_for_long_times(self):
        """The target has both signs and a kernel, in which W vanishes only as 1/(2 t)."""
        basis = orthonormal_rows(3, 5, 5)
        target, u = basis.T * np.array([2.0, 0.7, 0.0, -0.1, -1.0]) @ basis, 0.5 * normal(4, 5, 4)
        times = np.array([0.0, 1.0, 10.0, 100.0])
        flow = integrate(lambda u: ((target - u @ u.T) @ u,), (u,), times)
        for got, (reached,) in zip(oracles.symmetric(target, u, times), flow, strict=True):
            np.testing.assert_allclose(got, reached @ reached.T, rtol=0, atol=2e-10)

    def test_a_spectral_start_gives_the_modes(self):
        s, p0, times = np.array([2.0, 0.0, -0.5]), np.array([1e-4, 0.3, 0.4]), np.array([0.0, 2.0, 50.0])
        got = oracles.symmetric(np.diag(s), np.diag(np.sqrt(p0)), times)
        expected = [np.diag(p) for p in oracles.symmetric_mode(s, p0, times[:, None])]
        np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-16)

    @settings(max_examples=200, deadline=None)
    @given(values, sizes, st.floats(-3, 4).map(lambda power: 10.0**power))
    def test_a_mode_to_rounding(self, s, p0, t):
        with mpmath.workdps(120):
            s_, p, t_ = map(mpmath.mpf, (s, p0, t))
            growth = mpmath.exp(2 * s_ * t_)
            expected = float(p / (1 + 2 * p * t_) if s == 0 else p * s_ * growth / (s_ + p * (growth - 1)))
        # the relative rounding of an exponent is an absolute one of it
        assert oracles.symmetric_mode(s, p0, t) == pytest.approx(expected, rel=1e-14 + 1e-15 * abs(s * t), abs=1e-290)

    def test_the_schur_complement_evolves_by_itself(self):
        l1, l2, times = np.array([2.0, 0.5]), np.array([0.0, 0.3, 1.0]), np.array([0.0, 1.0, 4.0])
        w = oracles.symmetric(np.diag(np.concatenate([l1, -l2])), 0.4 * normal(5, 5, 5), times)
        schur = w[:, 2:, 2:] - w[:, 2:, :2] @ jnp.linalg.inv(w[:, :2, :2]) @ w[:, :2, 2:]
        s0 = (schur[0] + schur[0].T) / 2
        np.testing.assert_allclose(oracles.schur_complement(s0, l2, times), schur, rtol=0, atol=1e-13)
        flow = integrate(lambda s: (-l2[:, None] * s - s * l2 - 2 * s @ s,), (s0,), times)
        np.testing.assert_allclose([s for (s,) in flow], schur, rtol=0, atol=1e-12)

    def test_what_does_not_fit_vanishes_as_half_over_time(self):
        factor, t = 0.4 * normal(6, 3, 3), 1e9
        s0 = factor @ factor.T
        got = oracles.schur_complement(s0, np.zeros(3), np.array([2.0, t]))
        np.testing.assert_allclose(got[0], s0 @ np.linalg.inv(np.eye(3) + 4 * s0), rtol=0, atol=1e-15)
        np.testing.assert_allclose(t * np.linalg.norm(got[1], 2), 0.5, rtol=1e-6)
        w = oracles.symmetric(np.zeros((3, 3)), factor, t)  # where all of W is the Schur complement
        np.testing.assert_allclose(w, got[1], rtol=0, atol=1e-9 / t)


def weigh(matrix):
    return jnp.sum(normal(11, *matrix.shape) * matrix)


class TestDerivatives:
    """Reverse mode against central differences, where eigenvectors, square roots or quotients would have none."""

    @pytest.mark.parametrize(
        ("function", "point"),
        [
            pytest.param(
                lambda y, alpha, t: weigh(
                    oracles.single_layer(y, alpha * orthonormal_rows(4, 2, 4), t, steps=8).product
                ),
                (np.diag([2.0, 2.0, 0.0, 0.0]), 0.1, 2.0),
                id="one layer, with equal singular values and a kernel",
            ),
            pytest.param(
                lambda y, u, t: weigh(oracles.symmetric((y + y.T) / 2, u, t, steps=8)),
                (np.diag([2.0, 0.0, 0.0, 0.0]), 0.3 * normal(5, 4, 2), 2.0),
                id="symmetric, of rank 1",
            ),
            pytest.param(
                lambda u, l2, t: weigh(oracles.schur_complement(u @ u.T, l2, t)),
                (normal(6, 4, 4), np.array([0.5, 0.02, 1e-3, 0.5]), 2.0),
                id="the Schur complement",
            ),
        ],
    )
    def test_of_matrices(self, function, point):
        direction = [normal(7 + i, *np.shape(part)) for i, part in enumerate(point)]
        ahead, behind = (function(*(p + e * d for p, d in zip(point, direction, strict=True))) for e in (1e-5, -1e-5))
        gradient = jax.jit(jax.grad(function, argnums=(0, 1, 2)))(*point)
        slope = sum(np.vdot(g, d) for g, d in zip(gradient, direction, strict=True))
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-7, atol=1e-9)

    def test_of_modes(self):
        """With y = 0, u = v and u = -v among them."""
        y = np.array([0.0, 0.0, 0.0, 1.0, -1.0, 1.0, 2.0])
        u0 = np.array([0.0, 0.5, 0.4, 0.5, 0.5, 0.0, -0.1])
        v0 = np.array([0.0, 0.5, -0.3, -0.5, 0.5, 0.1, 0.7])
        gradient = jax.jit(jax.vmap(jax.jacrev(oracles.scalar, argnums=(0, 1, 2)), (0, 0, 0, None)))(y, u0, v0, 2.0)
        for index, step in enumerate(1e-5 * np.eye(3)):
            ahead, behind = (oracles.scalar(y + e[0], u0 + e[1], v0 + e[2], 2.0) for e in (step, -step))
            for got, after, before in zip(gradient, ahead, behind, strict=True):
                np.testing.assert_allclose(got[index], (after - before) / 2e-5, rtol=1e-6, atol=1e-8)

    def test_they_are_finite_on_the_way_into_the_saddle(self):
        y, t = np.repeat([2.0, -2.0], 4), np.tile([100.0, 178.0, 360.0, 1e8], 2)
        derivative = jax.jit(jax.vmap(jax.jacrev(oracles.scalar, argnums=(0, 1, 2, 3))))
        assert np.all(np.isfinite(derivative(y, np.full(8, 0.5), -0.5 * np.sign(y), t)))

    def test_the_mean_of_an_exponential_is_smooth_at_0_and_where_its_series_ends(self):
        """(e^x - 1)/x = sum of x^k/(k + 1)!, whose k-th derivative at 0 is 1/(k + 1)."""
        derivative = mean_exponential
        for order in range(3):
            at_0, inside, outside = jax.jit(jax.vmap(derivative))(jnp.array([0.0, 0.25 - 1e-12, 0.25 + 1e-12]))
            assert at_0 == pytest.approx(1 / (order + 1), rel=1e-15)
            assert inside == pytest.approx(float(outside), rel=1e-10)
            derivative = jax.grad(derivative)


ROWS = orthonormal_rows(1, 2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: oracles.riccati(np.eye(3), normal(1, 2, 3), np.zeros((3, 2)), 1.0),
            "w1 and w2 must have W2.T W2 - W1",
        ),
        (lambda: oracles.riccati(np.eye(3), np.eye(3), np.eye(2), 1.0), r"w2 must have shape \(3, 3\), got \(2, 2\)"),
        (
            lambda: oracles.single_layer(np.eye(4), ROWS * [[1], [2]], 1.0),
            "a must have orthogonal rows of equal length",
        ),
        (lambda: oracles.single_layer(np.eye(4), ROWS, 1.0, scaling=0.0), "scaling must be positive, got 0.0"),
        (
            lambda: oracles.single_layer(np.eye(4), ROWS, np.array([1.0, -1.0])),
            "t must be finite and at least 0, got -1 ... 1",
        ),
        (lambda: oracles.single_layer(np.eye(4), ROWS, np.nan), "t must be finite and at least 0, got nan"),
        (lambda: oracles.single_layer(np.eye(4), ROWS, 9.0, steps=2), "steps must be at least 3 to reach t = 9, got 2"),
        (lambda: oracles.single_layer(np.eye(4), ROWS, 1.0, steps=0), "steps must be at least 1, got 0"),
        (lambda: jax.jit(oracles.single_layer)(np.eye(4), ROWS, 1.0), "steps must be given where values are traced"),
        (
            lambda: oracles.first_layer(np.eye(4), normal(1, 4, 4), ROWS, 1.0),
            "w2 must have orthogonal columns of equal",
        ),
        (
            lambda: oracles.spectral(ROWS.T, np.ones(2), 2 * ROWS, np.zeros(2), np.ones(2), 1.0),
            "right must have orthonormal rows",
        ),
        (
            lambda: oracles.spectral(ROWS.T, np.ones(2), ROWS, np.zeros(2), np.ones(1), 1.0),
            r"a0 must have shape \(2,\), got \(1,\)",
        ),
        (lambda: oracles.symmetric(np.eye(2, k=1), np.eye(2), 1.0), "target must be symmetric"),
        (lambda: oracles.symmetric_mode(1.0, -1.0, 1.0), "p0 must be at least 0, got -1.0"),
        (
            lambda: oracles.schur_complement(-np.eye(2), np.ones(2), 1.0),
            "s0 must be positive semi-definite, got an eig",
        ),
        (lambda: oracles.schur_complement(np.eye(2), -np.ones(2), 1.0), "l2 must be at least 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_every_function_has_a_docstring_and_the_page_lists_the_module():
    assert all(inspect.getdoc(getattr(oracles, name)) for name in oracles.__all__)
    assert "::: lora_flow.oracles" in (Path(__file__).parents[2] / "docs/api.md").read_text()

"""What each flow conserves and how it moves W, of velocities and along trajectories."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flows import (
    DRIVEN,
    PLAIN,
    PROBLEM,
    RANK,
    SAVES,
    SHRINKING,
    START,
    T1,
    TIMES,
    WEIGHTS,
    M,
    N,
    adapter,
    along,
    conditioned,
    driven,
    every,
    few,
    random,
)
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from lora_flow import (
    Adapter,
    Chain,
    InputError,
    LoRAPlus,
    LoRAPro,
    Plain,
    ScaledGD,
    ShrinkA,
    SingleLayer,
    zero_adapters,
)

UNDAMPED = (ScaledGD(), LoRAPro())


def trajectory(flow):
    """From START at Gauss-Legendre nodes, by which what changes is integrated to rounding."""
    return _trajectory(DRIVEN.index(flow))


@functools.cache
def _trajectory(index):
    return along(DRIVEN[index], PROBLEM, START, saves=TIMES)


def over_time(flow, value):
    """value(A, B) at all times of the trajectory of START, as NumPy's array."""
    ((a, b),) = trajectory(flow).history
    return np.stack([value(*pair) for pair in zip(np.asarray(a), np.asarray(b), strict=True)])


def integral(values):
    return T1 / 2 * np.tensordot(WEIGHTS, values[1:-1], 1)


def projection(x):
    """The orthogonal projection on the column space of x."""
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    u = u[:, s > 1e-12 * s[0]]
    return u @ u.T


def moves(flow, g, a, b):
    """dW/dt = B' A + B A' where the negative gradient of W is g."""
    da, db = driven(flow, Adapter(b.T @ g, g @ a.T), Adapter(a, b))
    return np.asarray(db @ a + b @ da)


undamped = pytest.mark.parametrize("flow", UNDAMPED, ids=str)
a_seed = given(seed=st.integers(0, 10**6), spread=st.floats(0.0, 1.5))


def factors(seed, spread):
    """Gaussian factors whose rows and columns have sizes over `spread` decades either way, and a gradient."""
    generator = np.random.default_rng(seed)
    sizes = 10 ** (spread * generator.uniform(-1, 1, size=(2, RANK)))
    a, b = sizes[0][:, None] * generator.normal(size=(RANK, N)), generator.normal(size=(M, RANK)) * sizes[1]
    return jnp.asarray(generator.normal(size=(M, N))), jnp.asarray(a), jnp.asarray(b)


class TestConservation:
    @pytest.mark.parametrize(("flow", "weight"), [(PLAIN, 1.0), (DRIVEN[1], 4.0)], ids=str)
    def test_weighted_imbalance(self, flow, weight):
        """d/dt (w A A^T - B^T B) = 0: both parts change by w (B^T G A^T + A G^T B). `drift` reads just this."""
        imbalance = over_time(flow, lambda a, b: weight * a @ a.T - b.T @ b)
        change = np.linalg.norm(imbalance - imbalance[0], axis=(1, 2))
        sizes = over_time(flow, lambda a, b: np.linalg.norm(np.concatenate([b, a.T]), 2) ** 2)
        drift = trajectory(flow).observables["drift"]
        np.testing.assert_allclose(drift, change / sizes, rtol=1e-6, atol=1e-14)
        assert 0 < drift.max() < 1e-9
        moved = over_time(flow, lambda a, b: a @ a.T - 2 * b.T @ b)
        assert np.linalg.norm(moved[-1] - moved[0]) > 0.1, "nothing happens: the test sees nothing"

    @pytest.mark.long
    @undamped
    def test_ratio_of_determinants(self, flow):
        """With S = B^+ G A^+, both flows have B^+ B' = A' A^+, which is S for ScaledGD and S/2 for LoRA-Pro. Hence
        d/dt log det(B^T B) = 2 tr(B^+ B') = 2 tr(A' A^+) = d/dt log det(A A^T)."""
        logs = over_time(flow, lambda a, b: [np.linalg.slogdet(b.T @ b)[1], np.linalg.slogdet(a @ a.T)[1]])
        np.testing.assert_allclose(logs[:, 0] - logs[:, 1], logs[0, 0] - logs[0, 1], atol=1e-8)
        assert np.ptp(logs[:, 0]) > 0.5
        assert np.isnan(trajectory(flow).observables["drift"]).all()

    @every
    @pytest.mark.long
    def test_the_loss_falls_by_just_what_is_dissipated(self, flow):
        """-dL/dt = <G, W'>, integrated: ||P_B G||^2 + ||G P_A||^2 for ScaledGD, the projection's squared norm for
        LoRA-Pro, and of the others what -<dL/dA, A'> - <dL/dB, B'> is."""

        def dissipated(a, b):
            g = np.asarray(PROBLEM.shift) - b @ a
            p_b, p_a = projection(b), projection(a.T)
            if isinstance(flow, ScaledGD):
                return np.sum((p_b @ g) ** 2) + np.sum((g @ p_a) ** 2)
            if isinstance(flow, LoRAPro):
                return np.sum((p_b @ g + g @ p_a - p_b @ g @ p_a) ** 2)
            ratio, rate = (2.0, 0.3) if flow is SHRINKING else (float(flow.ratio), 0.0)
            return np.sum((b.T @ g) ** 2) + ratio * np.sum((g @ a.T) ** 2) - rate * np.sum(g * (b @ a))

        loss = np.asarray(trajectory(flow).observables["loss"])
        np.testing.assert_allclose(loss[0] - loss[-1], integral(over_time(flow, dissipated)), rtol=1e-8)
        if flow is not SHRINKING:  # which may rise again
            assert np.all(np.diff(loss) < 0)

    def test_shrinking_a_drains_the_imbalance(self):
        """d/dt (w A A^T - B^T B) = -2 w rate A A^T, with LoRA+'s w; w = 1 is the law of `ShrinkA` by itself."""
        imbalance = over_time(SHRINKING, lambda a, b: 2 * a @ a.T - b.T @ b)
        drained = -2 * 2 * 0.3 * integral(over_time(SHRINKING, lambda a, b: a @ a.T))
        np.testing.assert_allclose(imbalance[-1] - imbalance[0], drained, rtol=1e-8)


class TestMotionOfTheProduct:
    @few
    @a_seed
    def test_in_closed_form(self, seed, spread):
        g, a, b = factors(seed, spread)
        p_b, p_a = projection(b), projection(a.T)
        tolerance = 1e-10 * np.linalg.norm(g)
        np.testing.assert_allclose(moves(ScaledGD(), g, a, b), p_b @ g + g @ p_a, atol=tolerance)
        np.testing.assert_allclose(moves(LoRAPro(), g, a, b), p_b @ g + g @ p_a - p_b @ g @ p_a, atol=tolerance)

    @undamped
    @few
    @a_seed
    def test_is_that_of_any_other_factorisation(self, flow, seed, spread):
        g, a, b = factors(seed, spread)
        mixing = random(seed, RANK, RANK) + 3 * np.eye(RANK)
        b2, a2 = b @ mixing, np.linalg.solve(mixing, a)
        tolerance = 1e-10 * np.linalg.cond(mixing) ** 2 * np.linalg.norm(g)
        np.testing.assert_allclose(moves(flow, g, a, b), moves(flow, g, a2, b2), atol=tolerance)
        ours, theirs = (moves(Plain(), g, *pair) for pair in ((a, b), (a2, b2)))
        assert np.linalg.norm(ours - theirs) > 1e-3 * np.linalg.norm(ours)

    @few
    @a_seed
    def test_lora_pro_falls_steepest_among_the_motions_of_its_length(self, seed, spread):
        """It is the projection of G on the tangent space {B X + Y A}: what is left of G is orthogonal to that space."""
        g, a, b = factors(seed, spread)
        left = g - moves(LoRAPro(), g, a, b)
        sizes = np.linalg.norm(g) * np.linalg.norm(a), np.linalg.norm(g) * np.linalg.norm(b)
        assert np.abs(left @ a.T).max() < 1e-10 * sizes[0]
        assert np.abs(b.T @ left).max() < 1e-10 * sizes[1]

    @few
    @a_seed
    def test_both_factors_change_by_the_same_matrix(self, seed, spread):
        """B^+ B' = A' A^+, from which the conserved ratio follows."""
        g, a, b = factors(seed, spread)
        for flow in UNDAMPED:
            da, db = driven(flow, Adapter(b.T @ g, g @ a.T), Adapter(a, b))
            ours, theirs = np.linalg.pinv(b) @ db, da @ np.linalg.pinv(a)
            np.testing.assert_allclose(ours, theirs, atol=1e-9 * np.abs(theirs).max())

    @pytest.mark.parametrize("kind", [ScaledGD, LoRAPro])
    @few
    @a_seed
    def test_damping_leads_from_the_undamped_flow_to_the_plain_one(self, kind, seed, spread):
        """d (X + d)^{-1} = I - O(||X||/d) and (X + d)^{-1} = X^{-1} - O(d ||X^{-1}|| ||X^{-1}||)."""
        g, a, b = factors(seed, spread)
        descent, now = Adapter(b.T @ g, g @ a.T), Adapter(a, b)
        largest = np.linalg.norm(a, 2) ** 2 + np.linalg.norm(b, 2) ** 2
        smallest = min(np.linalg.svd(x, compute_uv=False)[-1] for x in (a, b)) ** 2
        size = np.linalg.norm(ravel_pytree(descent)[0])
        strong, weak = 1e5 * largest, 1e-5 * smallest
        plain, damped = ravel_pytree(descent)[0], ravel_pytree(driven(kind(strong), descent, now))[0]
        assert np.linalg.norm(strong * damped - plain) <= largest / strong * size
        limit, damped = (ravel_pytree(driven(kind(d), descent, now))[0] for d in (0.0, weak))
        assert np.linalg.norm(damped - limit) <= 3 * weak / smallest * np.linalg.norm(size / smallest)


class TestRates:
    """-d/dt log ||E|| = -1/2 d/dt log L, where the subspaces of the factors are those of the target."""

    times = np.linspace(0.0, 3.0, SAVES)

    def rate(self, flow, problem, start, times, rtol=1e-8):
        loss = np.asarray(along(flow, problem, start, t1=times[-1], saves=times, rtol=rtol).observables["loss"])
        return -0.5 * np.diff(np.log(loss)) / np.diff(times)

    @pytest.mark.parametrize("condition", [1, 10, 100, 1000])
    def test_preconditioned_flows_know_no_condition_number(self, condition):
        """E lies in both spaces and stays there: E' = -(P_B E + E P_A) = -2 E, and -E for LoRA-Pro, from the start."""
        u, sigma, vt = conditioned(condition)
        off = np.eye(RANK) + 0.1 * random(3, RANK, RANK)
        start = Adapter(jnp.asarray(np.sqrt(sigma)[:, None] * vt), jnp.asarray(u * np.sqrt(sigma) @ off))
        problem = SingleLayer(u * sigma @ vt)
        np.testing.assert_allclose(self.rate(ScaledGD(), problem, start, self.times), 2.0, rtol=1e-5)
        np.testing.assert_allclose(self.rate(LoRAPro(), problem, start, self.times), 1.0, rtol=1e-5)

    @undamped
    def test_what_lies_in_one_of_the_spaces_decays_at_rate_one(self, flow):
        """(I - U U^T) B decays like exp(-t) under ScaledGD, which is what is left of a start outside of the target's
        spaces; LoRA-Pro's rate is 1 for all."""
        u, sigma, vt = conditioned(100)
        rates = self.rate(flow, SingleLayer(u * sigma @ vt), adapter(5, 0.1, 0.1), np.linspace(0, 15.0, SAVES))
        assert rates[-1] == pytest.approx(1.0, rel=1e-3)

    @pytest.mark.parametrize("condition", [1, 10, 100])
    def test_the_plain_flow_takes_each_component_at_the_sum_of_its_singular_values(self, condition):
        """Balanced, E' = -(B B^T E + E A^T A) = -(S E + E S): component (i, j) decays at sigma_i + sigma_j."""
        u, sigma, vt = conditioned(condition)
        a, b = np.sqrt(sigma)[:, None] * vt, u * np.sqrt(sigma)
        size = 1e-6  # of the perturbation: what is neglected is as small in comparison
        start = Adapter(jnp.asarray(a + size * random(6, RANK, N)), jnp.asarray(b + size * random(7, M, RANK)))
        problem = SingleLayer(u * sigma @ vt)
        solved = along(PLAIN, problem, start, t1=1.0, saves=np.linspace(0, 1.0, SAVES), rtol=1e-9)
        ((a, b),) = solved.history
        components = u.T @ (np.asarray(problem.shift) - np.asarray(b @ a)) @ vt.T
        rates = np.log(np.abs(components[0] / components[-1]))
        np.testing.assert_allclose(rates, sigma[:, None] + sigma, atol=1e-4)


class TestComposition:
    g = jnp.asarray(random(30, M, N))
    now = adapter(31)
    descent = Adapter(now.b.T @ g, g @ now.a.T)

    def test_the_first_is_applied_first(self):
        inverse_b = np.linalg.inv(np.asarray(self.now.b.T @ self.now.b) + 0.1 * np.eye(RANK))
        inverse_a = np.linalg.inv(np.asarray(self.now.a @ self.now.a.T) + 0.1 * np.eye(RANK))
        shrunk, scaled = ShrinkA(0.3), ScaledGD(0.1)
        first = driven(Chain(shrunk, scaled), self.descent, self.now)
        second = driven(Chain(scaled, shrunk), self.descent, self.now)
        np.testing.assert_allclose(first.a, inverse_b @ (self.descent.a - 0.3 * self.now.a), rtol=1e-10)
        np.testing.assert_allclose(second.a, inverse_b @ self.descent.a - 0.3 * self.now.a, rtol=1e-10)
        for velocity_ in (first, second):
            np.testing.assert_allclose(velocity_.b, self.descent.b @ inverse_a, rtol=1e-10)

    @pytest.mark.parametrize("flows", [(LoRAPlus(2.0), LoRAPlus(3.0)), (LoRAPlus(2.0), ShrinkA(0.3), LoRAPlus(4.0))])
    def test_is_that_of_optax(self, flows):
        chain, start = optax.chain(*map(optax.stateless, flows)), (self.now,)
        updates, _ = jax.jit(chain.update)((self.descent,), chain.init(start), start)
        for ours, theirs in zip(driven(Chain(*flows), self.descent, self.now), updates[0], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-13)

    def test_the_plain_flow_is_a_ratio_of_one_and_an_empty_chain(self):
        for flow in (Plain(), Chain(), LoRAPlus(1.0), ShrinkA(0.0)):
            assert eqx.tree_equal(flow.velocity(self.descent, self.now), self.descent)

    def test_conserves_by_the_product_of_the_rates(self):
        assert Chain(LoRAPlus(2.0), Plain(), LoRAPlus(3.0)).conserves == 6
        assert Chain().conserves == 1
        assert np.isnan(Chain(LoRAPlus(2.0), ScaledGD()).conserves)

    def test_is_defined_where_all_of_it_is(self):
        half = zero_adapters(((M, N),), RANK)[0]._replace(a=self.now.a)
        assert Chain(ScaledGD(0.1), LoRAPlus(2.0)).always_defined
        assert not Chain(ScaledGD(0.1), LoRAPro()).always_defined
        with pytest.raises(InputError, match="damping must be positive"):
            Chain(LoRAPlus(2.0), LoRAPro()).check_start((half,))

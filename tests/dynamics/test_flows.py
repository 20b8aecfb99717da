"""What each flow conserves and how it moves W, of velocities and along trajectories; in `solve` and `sweep`."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from lora_flow import (
    FLOWS,
    Adapter,
    Chain,
    InputError,
    LoRAPlus,
    LoRAPro,
    Plain,
    RungeKuttaChebyshev,
    ScaledGD,
    ShrinkA,
    SingleLayer,
    aligned_problem,
    canonical,
    gaussian_init,
    lora_one_init,
    pad,
    solve,
    sweep,
    zero_adapters,
)
from lora_flow.dynamics.flows import _over_gram, parse_flow
from lora_flow.dynamics.solve import velocity
from lora_flow.solvers.automatic import Automatic

M, N, RANK, SAVES = 6, 5, 3, 61  # of every trajectory of one layer, so that a flow is compiled once
TIGHT = 1e-10
T1 = 3.0
NODES, WEIGHTS = np.polynomial.legendre.leggauss(SAVES - 2)
TIMES = np.concatenate([[0.0], T1 / 2 * (1 + NODES), [T1]])


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def adapter(seed, scale_a=1.0, scale_b=1.0):
    return Adapter(jnp.asarray(scale_a * random(seed, RANK, N)), jnp.asarray(scale_b * random(seed + 1, M, RANK)))


def conditioned(condition, seed=20):
    """(U, sigma, V^T) of an M x N matrix of rank RANK with singular values from 1 down to 1/condition."""
    u, v = (np.linalg.qr(random(seed + i, size, RANK))[0] for i, size in enumerate((M, N)))
    return u, np.geomspace(1.0, 1.0 / condition, RANK), v.T


def along(flow, problem, start, t1=T1, saves=SAVES, rtol=TIGHT):
    """One compiled program for each kind of flow: problem, start, tolerance and times are its arguments."""
    return solve(problem, (start,), t1=t1, saves=saves, flow=flow, rtol=rtol, solver="Tsit5", save_adapters=True)


PROBLEM = SingleLayer(random(1, M, N))
START = adapter(2, 0.8, 0.5)
PLAIN = LoRAPlus(1.0)  # the plain flow by the program of the other ratios
SHRINKING = Chain(LoRAPlus(2.0), ShrinkA(0.3))
DRIVEN = (PLAIN, LoRAPlus(4.0), ScaledGD(), LoRAPro(), SHRINKING)
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


@jax.jit
def driven(flow, descent, now):
    return flow.velocity(descent, now)


over_gram = jax.jit(_over_gram)


every = pytest.mark.parametrize("flow", DRIVEN, ids=str)
undamped = pytest.mark.parametrize("flow", UNDAMPED, ids=str)
a_seed = given(seed=st.integers(0, 10**6), spread=st.floats(0.0, 1.5))
few = settings(deadline=None, max_examples=30)


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


class TestOverGram:
    """(x^T x + damping I)^{-1} y."""

    @few
    @given(seed=st.integers(0, 10**6), damping=st.sampled_from([0.0, 1e-6, 0.3, 1e4]))
    def test_is_the_solution(self, seed, damping):
        x, y = random(seed, M, RANK), random(seed + 1, RANK, N)
        gram = x.T @ x + damping * np.eye(RANK)
        expected = np.linalg.solve(gram, y)
        got = over_gram(x, y, damping)
        np.testing.assert_allclose(got, expected, atol=1e-14 * np.linalg.cond(gram) * np.abs(expected).max())

    def test_keeps_digits_that_the_gram_matrix_loses(self):
        """Columns that nearly agree, with cond(x) = 1e7: x^T x is known to 1e-2 then, and x^+ to 1e-9."""
        u, v = np.linalg.qr(random(8, M, RANK))[0], np.linalg.qr(random(9, RANK, RANK))[0]
        x, y = u * [1.0, 1e-3, 1e-7] @ v, random(10, M, N)
        expected = np.linalg.pinv(x) @ y
        errors = [
            np.linalg.norm(x @ (z - expected)) for z in (over_gram(x, x.T @ y, 0.0), np.linalg.solve(x.T @ x, x.T @ y))
        ]
        assert errors[0] < 1e-2 * errors[1]

    def test_directions_that_padding_makes_stay_zero(self):
        x, y = random(11, M, RANK), random(12, RANK, N)
        padded = over_gram(np.pad(x, [(0, 0), (0, 2)]), np.pad(y, [(0, 2), (0, 0)]), 0.0)
        np.testing.assert_allclose(padded[:RANK], over_gram(x, y, 0.0), rtol=1e-12)
        assert not padded[RANK:].any()

    @pytest.mark.parametrize("damping", [0.0, 0.3])
    def test_derivatives(self, damping):
        """Against central differences of NumPy's solution, which takes a damping below 0 as well; both modes."""
        x, y, target = random(13, M, RANK), random(14, RANK, N), random(15, RANK, N)
        steps = random(16, M, RANK), random(17, RANK, N), 0.7

        def oracle(epsilon):
            x1, y1, d1 = (v + epsilon * dv for v, dv in zip((x, y, damping), steps, strict=True))
            return np.linalg.solve(x1.T @ x1 + d1 * np.eye(RANK), y1)

        difference = (oracle(1e-5) - oracle(-1e-5)) / 2e-5
        values, tangents = jax.tree.map(jnp.asarray, ((x, y, damping), steps))
        _, forward = jax.jvp(over_gram, values, tangents)
        np.testing.assert_allclose(forward, difference, rtol=1e-7, atol=1e-8)
        gradients = jax.grad(lambda *args: jnp.sum(target * over_gram(*args)), argnums=(0, 1, 2))(*values)
        reverse = sum(np.sum(g * t) for g, t in zip(gradients, tangents, strict=True))
        np.testing.assert_allclose(reverse, np.sum(target * difference), rtol=1e-8)


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


class TestNames:
    positive = st.floats(1e-300, 1e300)

    @settings(max_examples=100, deadline=None)
    @given(kind=st.sampled_from([LoRAPlus, ScaledGD, LoRAPro, ShrinkA]), number=positive)
    def test_round_trip(self, kind, number):
        flow = kind(number)
        assert eqx.tree_equal(parse_flow(str(flow)), flow)

    def test_without_a_number(self):
        assert parse_flow("plain") == Plain()
        assert eqx.tree_equal(parse_flow("scaled"), ScaledGD(0.0))
        assert [str(parse_flow(text)) for text in ("lora-plus:16", "scaled:1e-3", "plain")] == [
            "lora-plus:16",
            "scaled:0.001",
            "plain",
        ]
        assert set(FLOWS) == {"plain", "lora-plus", "scaled", "lora-pro", "shrink-a"}

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: parse_flow("sacled"), "flow must be 'plain', 'lora-plus', .*, got 'sacled'"),
            (lambda: parse_flow(""), "flow must be 'plain', .*, got ''"),
            (lambda: parse_flow("plain:2"), "flow must come without a number for 'plain', got 'plain:2'"),
            (
                lambda: parse_flow("lora-plus"),
                "flow must come with a number after a colon for 'lora-plus', got 'lora-p",
            ),
            (lambda: parse_flow("scaled:"), "flow must have a number after the colon, got 'scaled:'"),
            (lambda: parse_flow("scaled:a"), "flow must have a number after the colon, got 'scaled:a'"),
            (lambda: parse_flow("scaled:-1"), "damping must be at least 0, got -1.0"),
            (lambda: parse_flow("lora-plus:nan"), "ratio must be positive, got nan"),
            (lambda: LoRAPlus(0.0), "ratio must be positive, got 0.0"),
            (lambda: LoRAPro(np.inf), "damping must be at least 0, got inf"),
            (lambda: ShrinkA(-0.1), "rate must be at least 0, got -0.1"),
            (lambda: ScaledGD(jnp.ones(2)), "damping must be at least 0, got shape"),
        ],
    )
    def test_bad_ones_get_one_line(self, make, message):
        with pytest.raises(InputError, match=f"^{message}") as caught:
            make()
        assert "\n" not in str(caught.value)


class TestInSolveAndSweep:
    problem = aligned_problem(jax.random.key(1), m=4, n=3, h=9, delta_w=0.5, component=[0, 1], shift_scale=[3.0, 2.0])

    @pytest.mark.parametrize("name", ["scaled", "lora-pro"])
    def test_an_undamped_start_from_zero_is_refused(self, name):
        half = gaussian_init(jax.random.key(0), self.problem, rank=2, alpha=0.1)
        must = "damping must be positive where a factor's rank is below 2, the number of directions, got 0 with B_1 of"
        with pytest.raises(InputError, match=f"{must} rank 0"):
            solve(self.problem, half, t1=1.0, flow=name)
        with pytest.raises(InputError, match=rf"{must} rank 0 \(init gaussian, rank 2\)"):
            sweep(self.problem, init=("lora-one", "gaussian"), rank=2, t1=1.0, flow=name, progress=False)
        full = lora_one_init(jax.random.key(0), self.problem, rank=2, alpha=0.1)
        parse_flow(name).check_start(pad(full, 4))  # directions of padding are none
        parse_flow(f"{name}:1e-3").check_start(half)

    @pytest.mark.parametrize("solver", ["RKC", RungeKuttaChebyshev(), Automatic(RungeKuttaChebyshev())])
    def test_stabilised_methods_are_refused(self, solver):
        start = gaussian_init(jax.random.key(0), self.problem, rank=2, alpha=0.1)
        with pytest.raises(InputError, match="solver must be of another kind than RKC for a flow that is not plain"):
            solve(self.problem, start, t1=1.0, flow="lora-plus:2", solver=solver)

    @every
    def test_padding_changes_no_velocity(self, flow):
        descent = Adapter(START.b.T @ PROBLEM.shift, PROBLEM.shift @ START.a.T)
        (wide,) = pad((driven(flow, descent, START),), RANK + 2)
        for ours, theirs in zip(driven(flow, *pad((descent, START), RANK + 2)), wide, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)

    @pytest.mark.parametrize("flow", [ScaledGD(0.1), SHRINKING], ids=str)
    def test_canonical_coordinates_change_no_velocity(self, flow):
        """Sweeps solve factorisations there, where the parts of the factors outside the weights are turned as well."""
        turned = canonical(self.problem, rank=2)
        assert turned.problem.w1.shape[0] < self.problem.w1.shape[0]
        start = tuple(
            Adapter(*(jnp.asarray(random(i, *leaf.shape)) for leaf in pair))
            for i, pair in enumerate(zero_adapters(self.problem.layers, 2), 60)
        )
        inside, bases = turned.enter(start)
        back = turned.leave(jax.jit(velocity(turned.problem, flow))(inside), bases)
        expected = jax.jit(velocity(self.problem, flow))(start)
        for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(("flow", "init"), [("scaled", "lora-one"), ("scaled:0.1", "gaussian")])
    def test_a_sweep_is_solve(self, flow, init):
        """Rank RANK padded by one in the sweep; both have errors of about 1e-8."""
        swept = sweep(
            PROBLEM,
            init=init,
            alpha=0.5,
            rank=(RANK, RANK + 1),
            t1=T1,
            saves=TIMES,
            flow=flow,
            rtol=1e-8,
            progress=False,
        )
        draw = {"gaussian": gaussian_init, "lora-one": lora_one_init}[init]
        (start,) = draw(jax.random.key(0), PROBLEM, rank=RANK, alpha=0.5)
        alone = along(parse_flow(flow), PROBLEM, start, saves=TIMES, rtol=1e-8)
        lane = swept.sel(init=init, alpha=0.5, rank=RANK, seed=0)
        assert lane["status"] == alone.status == 0
        np.testing.assert_allclose(lane["loss"], alone.observables["loss"], rtol=1e-6)
        assert np.isnan(lane["drift"]).all()

    @pytest.mark.long
    def test_under_jit_vmap_and_grad(self):
        """One program gives the loss and its gradient at a point and around it: reverse mode against differences."""

        def log_loss(point):
            problem = SingleLayer(PROBLEM.shift + point[0] * jnp.asarray(random(40, M, N)))
            start = jax.tree.map(lambda leaf: point[1] * leaf, START)
            euler = {"solver": diffrax.Euler(), "stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.05}
            solved = solve(problem, (start,), t1=0.3, saves=2, flow=ScaledGD(damping=point[2]), **euler)
            return jnp.log(solved.observables["loss"][-1])

        at, step = jnp.array([[0.1, 1.2, 0.3]]), 1e-4
        points = at + step * jnp.concatenate([jnp.zeros((1, 3)), jnp.eye(3), -jnp.eye(3)])
        values, gradients = jax.jit(jax.vmap(jax.value_and_grad(log_loss)))(points)
        np.testing.assert_allclose(gradients[0], (values[1:4] - values[4:]) / (2 * step), rtol=1e-5)


class TestAccuracy:
    """The loss at the default tolerance beside diffrax's Dopri8 at rtol 1e-12, atol 1e-16."""

    @staticmethod
    def worst(problem, start, flow, times, ours):
        """In decades, above 1e-20."""
        loss = _reference(problem, start, flow, times)
        return jnp.max(jnp.where(loss > 1e-20, jnp.abs(jnp.log10(ours / loss)), 0.0)), loss

    @pytest.mark.parametrize("flow", [ScaledGD(), LoRAPlus(4.0)], ids=str)
    @pytest.mark.parametrize(("condition", "scales", "t1"), [(1, (0.1, 0.1), 20.0), (1000, (1e-2, 1e-4), 20.0)])
    def test_on_one_layer(self, flow, condition, scales, t1):
        u, sigma, vt = conditioned(condition)
        problem, start = SingleLayer(u * sigma @ vt), adapter(5, *scales)
        times = jnp.linspace(0, t1, SAVES)
        solved = along(flow, problem, start, t1=t1, saves=times, rtol=5e-4)
        worst, loss = self.worst(problem, (start,), flow, times, solved.observables["loss"])
        assert worst < 0.005
        assert loss[-1] < (1e-17 if condition == 1 or isinstance(flow, ScaledGD) else 1e-3)

    @pytest.mark.long
    @pytest.mark.parametrize("flow", [ScaledGD(), LoRAPlus(4.0)], ids=str)
    def test_on_two_layers(self, flow):
        problem = TestInSolveAndSweep.problem
        start = tuple(
            Adapter(*(1e-2 * jnp.asarray(random(i, *leaf.shape)) for i, leaf in enumerate(pair, 50)))
            for pair in zero_adapters(problem.layers, 3)
        )
        times = jnp.linspace(0, 6.0, SAVES)
        solved = solve(problem, start, t1=6.0, saves=times, flow=flow)
        worst, loss = self.worst(problem, start, flow, times, solved.observables["loss"])
        assert worst < 0.005
        assert loss[-1] < 1e-3


@eqx.filter_jit
def _reference(problem, start, flow, times):
    field, (state, unflatten) = velocity(problem, flow), ravel_pytree(start)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: ravel_pytree(field(unflatten(y)))[0]),
        diffrax.Dopri8(),
        t0=0.0,
        t1=times[-1],
        dt0=None,
        y0=state,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-12, atol=1e-16),
        adjoint=diffrax.ForwardMode(),
        max_steps=100_000,
    )
    return jax.vmap(lambda y: problem.loss(unflatten(y)))(solution.ys)

"""Flows that leave old inputs alone: what they conserve, that the exact one is the optimum, and where ranks end."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_flow import (
    Adapter,
    Chain,
    Factorization,
    InputError,
    LoRAPro,
    Protected,
    SafeGradient,
    SingleLayer,
    descend,
    gaussian_init,
    keep_away,
    pad,
    solve,
    sweep,
)
from lora_flow.theory import continual as theory

M, N, RANK, K = 7, 9, 4, 2


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def span(seed, k, n=N):
    return np.linalg.qr(random(seed, n, k))[0]


def adapter(seed, scale_a=1.0, scale_b=1.0, rank=RANK):
    return Adapter(jnp.asarray(scale_a * random(seed, rank, N)), jnp.asarray(scale_b * random(seed + 1, M, rank)))


@jax.jit
def change(flow, g, now):
    return flow.velocity(Adapter(now.b.T @ g, g @ now.a.T), now)


def motion(flow, g, now):
    """dW where the negative gradient of W is g."""
    moved = change(flow, jnp.asarray(g), now)
    return np.asarray(now.b @ moved.a + moved.b @ now.a)


V = span(1, K)
PROBLEM = SingleLayer(random(2, M, N) / 3)
SAFE = {
    "exact": (Protected(V, exact=True), adapter(3, 0.3, 0.3)),
    "damped": (Protected(V, exact=True, damping=0.01), adapter(3, 0.3, 0.0)),
    "safe start": (Protected(V), keep_away((adapter(3, 0.3, 0.0),), V)[0]),
}


class TestConservation:
    """B A V stays, to 1e-10, while W moves by a lot."""

    @pytest.mark.parametrize("name", SAFE)
    def test_by_the_flow_at_the_defaults(self, name):
        flow, start = SAFE[name]
        run = solve(PROBLEM, (start,), t1=20.0, saves=11, flow=flow, save_adapters=True)
        assert run.status == 0
        self.check(run.history, start)

    @pytest.mark.parametrize("name", SAFE)
    @pytest.mark.parametrize("order", ["simultaneous", "A first", "B first"])
    def test_by_descent_with_large_steps(self, name, order):
        flow, start = SAFE[name]
        run = descend(PROBLEM, (start,), steps=200, step=0.2, saves=11, flow=flow, order=order, save_adapters=True)
        assert run.status == 0
        self.check(run.history, start)

    def check(self, history, start):
        ((a, b),) = history
        change = np.asarray(b @ a) - np.asarray(start.b @ start.a)
        assert np.max(np.linalg.norm(change @ V, axis=(1, 2))) < 1e-10
        assert np.linalg.norm(change[-1]) > 0.3

    def test_project_a_by_itself_conserves_only_a_v(self):
        start = adapter(3, 0.3, 0.3)
        run = solve(PROBLEM, (start,), t1=5.0, saves=11, flow=Protected(V), save_adapters=True)
        ((a, b),) = run.history
        assert np.max(np.abs(np.asarray(a) @ V - np.asarray(start.a) @ V)) < 1e-12
        assert np.linalg.norm(np.asarray(b[-1] @ a[-1] - start.b @ start.a) @ V) > 0.1
        assert np.isnan(run.observables["drift"]).all()


class TestExactRule:
    @pytest.mark.parametrize(("rank", "k"), [(4, 2), (4, 4), (4, 6), (5, 3), (2, 1), (4, 0), (4, N)])
    def test_is_the_optimum_and_the_theorem(self, rank, k):
        for seed in range(5):
            g, now, basis = random(seed, M, N), adapter(seed + 10, rank=rank), span(seed + 20, k)
            found = motion(Protected(basis, exact=True), g, now)
            a, b = np.asarray(now.a), np.asarray(now.b)
            np.testing.assert_allclose(found, theory.exact_motion(g, a, b, basis), atol=1e-10)
            np.testing.assert_allclose(found, theory.constrained_optimum(g, a, b, basis), atol=1e-10)
            np.testing.assert_allclose(found @ basis, 0, atol=1e-12)

    def test_takes_the_steps_of_the_formula(self):
        """With pseudo-inverses of NumPy, damped and not; also where more rows than directions are free."""
        for rank, damping, k in ((4, 0.0, 3), (4, 0.3, 3), (6, 0.0, 5)):
            for away in (False, True):
                basis = span(5, k)
                (now,) = keep_away((adapter(30, rank=rank),), basis) if away else (adapter(30, rank=rank),)
                g, a, b = random(31, M, N), np.asarray(now.a), np.asarray(now.b)
                av = a @ basis if not away else np.zeros((rank, k))
                pi = np.eye(rank) - av @ np.linalg.pinv(av, rcond=1e-10)
                inverse = np.linalg.inv(b.T @ b + damping * np.eye(rank))
                inner = pi @ a @ a.T @ pi + damping * pi
                expected_a = inverse @ b.T @ g @ (np.eye(N) - basis @ basis.T)
                outside = (np.eye(M) - b @ inverse @ b.T) @ g @ a.T @ pi
                expected_b = outside @ np.linalg.pinv(inner, rcond=1e-10)
                moved = change(Protected(basis, exact=True, damping=damping), jnp.asarray(g), now)
                np.testing.assert_allclose(moved.a, expected_a, atol=1e-10)
                np.testing.assert_allclose(moved.b, expected_b, atol=1e-9)

    @pytest.mark.parametrize(("k", "rank"), [(1, 3), (2, 2), (3, 1), (4, 0), (6, 0)])
    def test_the_rank_outside_b_is_bounded(self, k, rank):
        g, now = random(40, M, N), adapter(41)
        moved = motion(Protected(span(42, k), exact=True), g, now)
        b = np.asarray(now.b)
        outside = moved - b @ np.linalg.pinv(b) @ moved
        assert np.linalg.matrix_rank(outside, tol=1e-9) == rank == theory.rank_outside(RANK, min(k, RANK))

    def test_rounding_is_no_direction(self):
        """Where Pi A = 0 or A V = 0, rounding beside A is not made a direction, at any size of A."""
        g = random(50, M, N)
        for size in (1e-6, 1.0, 1e6):
            now = adapter(51, size)
            assert np.abs(change(Protected(span(52, 6), exact=True), jnp.asarray(g), now).b).max() == 0
            basis = span(53, 3)
            (away,) = keep_away((now,), basis)
            dirty = away._replace(a=away.a + 1e-15 * size * random(54, RANK, N))
            moved = change(Protected(basis, exact=True), jnp.asarray(g), dirty)
            clean = change(Protected(basis, exact=True), jnp.asarray(g), away)
            np.testing.assert_allclose(moved.b, clean.b, atol=1e-10 * np.abs(clean.b).max())

    def test_padding_changes_no_velocity(self):
        g, now = jnp.asarray(random(60, M, N)), adapter(61)
        for flow in (Protected(V, exact=True), Protected(V, exact=True, damping=0.1), Protected(V)):
            (wide,) = pad((change(flow, g, now),), RANK + 2)
            (padded,) = pad((now,), RANK + 2)
            for ours, theirs in zip(change(flow, g, padded), wide, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-12)

    @pytest.mark.long
    def test_derivatives_are_differences(self):
        def loss(point):
            start = Adapter(point[0] * SAFE["exact"][1].a, point[1] * SAFE["exact"][1].b)
            euler = {"solver": diffrax.Euler(), "stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.05}
            flow = Protected(V, exact=True, damping=point[2])
            return solve(PROBLEM, (start,), t1=0.3, saves=2, flow=flow, **euler).observables["loss"][-1]

        at, step = jnp.array([[1.1, 0.9, 0.02]]), 1e-5
        points = at + step * jnp.concatenate([jnp.zeros((1, 3)), jnp.eye(3), -jnp.eye(3)])
        values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss)))(points)
        np.testing.assert_allclose(gradients[0], (values[1:4] - values[4:]) / (2 * step), rtol=1e-5)


class TestSafeGradient:
    def test_is_each_factors_gradient_of_the_safe_gradient(self):
        now = adapter(70)
        g = np.asarray(PROBLEM.shift) - np.asarray(now.b @ now.a)
        safe = g - g @ V @ V.T
        moved = change(SafeGradient(PROBLEM, V), jnp.zeros((M, N)), now)
        np.testing.assert_allclose(moved.a, now.b.T @ safe, rtol=1e-12)
        np.testing.assert_allclose(moved.b, safe @ now.a.T, rtol=1e-12)

    def test_with_lora_pro_is_the_least_squares_rule(self):
        """P_B G_s + (I - P_B) G_s P_A, of B^+ G_s and (I - P_B) G_s A^+."""
        for seed in range(5):
            now = adapter(71 + 2 * seed)
            a, b = np.asarray(now.a), np.asarray(now.b)
            safe = (np.asarray(PROBLEM.shift) - b @ a) @ (np.eye(N) - V @ V.T)
            p_b, inverse = b @ np.linalg.pinv(b), np.linalg.pinv(a)
            expected = b @ np.linalg.pinv(b) @ safe + (np.eye(M) - p_b) @ safe @ inverse @ a
            flow = Chain(SafeGradient(PROBLEM, V), LoRAPro())
            np.testing.assert_allclose(motion(flow, np.zeros((M, N)), now), expected, atol=1e-10)
            assert np.linalg.norm(expected @ V) > 1e-3

    def test_it_forgets_what_plain_training_does_not(self):
        """A shift that asks nothing of old inputs: A(0) has a part in V, which B switches on."""
        problem = SingleLayer(random(80, M, 2) @ (random(81, 2, N) @ (np.eye(N) - V @ V.T)) / 4)
        start = adapter(82, 0.3, 0.0)
        forgotten = []
        for flow in ("plain", SafeGradient(problem, V)):
            ((a, b),) = solve(problem, (start,), t1=200.0, saves=2, flow=flow).adapters
            forgotten.append(theory.forgetting(np.asarray(b @ a), V))
        assert forgotten[0] < 1e-6
        assert forgotten[1] > 1e-4


class TestFloor:
    """With exact protection the new loss ends where the new task asks of old inputs."""

    @pytest.mark.parametrize(("m", "n", "r", "k"), [(7, 9, 4, 2), pytest.param(12, 14, 2, 5, marks=pytest.mark.long)])
    def test_of_the_safe_start(self, m, n, r, k):
        basis = span(90 + k, k, n)
        shift = random(91, m, 2) @ random(92, 2, n) / np.sqrt(m * n)
        start = gaussian_init(jax.random.key(0), SingleLayer(shift), rank=r, alpha=0.3, away_from=basis)
        ended = solve(SingleLayer(shift), start, t1=400.0, saves=2, flow=Protected(basis))
        np.testing.assert_allclose(ended.observables["loss"][-1], theory.floor(shift, basis), rtol=0.02)

    def test_with_correlated_inputs_is_the_least_squares_solution(self):
        """Of all D with D V = 0, found by linear algebra in the complement of V."""
        basis, shift = span(93, K), random(94, M, N)
        x = random(95, 50, N) @ random(96, N, N)
        c = x.T @ x / 50
        rest = np.linalg.svd(basis)[0][:, K:]
        root = np.linalg.cholesky(c)
        best = np.linalg.lstsq(root.T @ rest, root.T @ shift.T, rcond=None)[0]
        least = 0.5 * np.sum((root.T @ (shift.T - rest @ best)) ** 2)
        np.testing.assert_allclose(theory.floor(shift, basis, c), least, rtol=1e-8)


class TestInUse:
    def test_a_sweep_is_solve(self):
        swept = sweep(PROBLEM, alpha=0.3, rank=(RANK, RANK + 1), t1=3.0, saves=4, flow=Protected(V), progress=False)
        start = gaussian_init(jax.random.key(0), PROBLEM, rank=RANK, alpha=0.3)
        alone = solve(PROBLEM, start, t1=3.0, saves=4, flow=Protected(V))
        np.testing.assert_allclose(swept["loss"].sel(rank=RANK).squeeze(), alone.observables["loss"], rtol=1e-6)
        assert swept.attrs["flow"] == str(Protected(V))

    def test_momentum_keeps_to_safe_directions_and_adam_does_not(self):
        flow, start = SAFE["safe start"]
        moved = []
        for optimiser in (optax.sgd(0.05, momentum=0.9), optax.adam(0.01)):
            ((a, b),) = descend(PROBLEM, (start,), steps=100, step=optimiser, saves=2, flow=flow).adapters
            moved.append(np.linalg.norm(np.asarray(b @ a) @ V))
        assert moved[0] < 1e-12
        assert moved[1] > 1e-2

    def test_its_name_tells_bases_apart(self):
        assert str(Protected(V)).startswith("protected from 2 of 9 directions (")
        assert str(Protected(V)) != str(Protected(span(7, K)))
        assert str(Protected(V, exact=True, damping=0.5)) == str(Protected(V)) + ", exact, damping 0.5"
        assert str(SafeGradient(PROBLEM, V)).startswith("safe-gradient from 2 of 9")

    def test_the_span_counts_and_not_the_columns(self):
        mixed = Protected(V @ (random(8, K, K) + 3 * np.eye(K)), exact=True)
        g, now = random(9, M, N), adapter(10)
        np.testing.assert_allclose(motion(mixed, g, now), motion(Protected(V, exact=True), g, now), atol=1e-12)

    two = Factorization(w1=random(1, 5, N), w2=random(2, M, 5), shift=random(3, M, N))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda: Protected(np.ones((N, 2))),
                "basis must have linearly independent columns, got 2 columns of rank 1",
            ),
            (lambda: Protected(np.ones(N)), "basis must be a matrix, got shape"),
            (lambda: Protected(np.full((N, 1), np.nan)), "basis must be finite, got 9 entries"),
            (lambda: Protected(V, True, -1.0), "damping must be at least 0, got -1.0"),
            (lambda: Protected(V, damping=0.1), "damping must be left out without exact=True, got 0.1"),
            (
                lambda: SafeGradient(TestInUse.two, V),
                "problem must adapt one layer, with a loss of the product B A, for S",
            ),
            (
                lambda: SafeGradient(PROBLEM, V[:-1]),
                "basis must have 9 rows, one for each input of the layer, got shape",
            ),
            (
                lambda: solve(PROBLEM, (adapter(1),), t1=1.0, flow=Protected(V[:-1])),
                "basis must have 9 rows, one for each input of the layer, got shape",
            ),
            (
                lambda: solve(PROBLEM, (adapter(1, 1.0, 0.0),), t1=1.0, flow=Protected(V, exact=True)),
                "damping must be positive where a factor's rank is below 4, the number of directions, got 0 with B_1",
            ),
            (
                lambda: sweep(TestInUse.two, alpha=0.1, rank=2, t1=1.0, flow=Protected(V), progress=False),
                "adapters must be of one layer, whose inputs the basis is of, got 2 layers",
            ),
        ],
    )
    def test_bad_ones_get_one_line(self, make, message):
        with pytest.raises(InputError, match=f"^{message}") as caught:
            make()
        assert "\n" not in str(caught.value)

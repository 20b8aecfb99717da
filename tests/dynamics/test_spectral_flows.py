"""Muon, LoRA-Muon and BaLoRA: against formulas in NumPy, optax's Muon, closed forms and the authors' projection."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flows import PROBLEM, RANK, M, N, adapter, conditioned, driven, few, random
from hypothesis import given
from hypothesis import strategies as st

from lora_flow import (
    Adapter,
    BaLoRA,
    Chain,
    InputError,
    LoRAMuon,
    LoRAPlus,
    Muon,
    SingleLayer,
    aligned_problem,
    balance,
    canonical,
    descend,
    gaussian_init,
    narrow,
    oracles,
    pad,
    solve,
    sweep,
    zero_adapters,
)
from lora_flow.algebra.polar import balanced_factors, orthogonalised
from lora_flow.dynamics.flows import parse_flow
from lora_flow.dynamics.steps import velocity
from lora_flow.theory import spectral_flows as theory


def of_all(factors):
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), factors)


WITHOUT_MOMENTUM = {"beta": 0.0, "nesterov": False, "weight_dimension_numbers": of_all}
NEWTON_SCHULZ = {"ns_coeffs": (1.5, -0.5, 0.0), "ns_steps": 60, **WITHOUT_MOMENTUM}


@jax.jit
def orthogonal(g, smoothing):
    return orthogonalised(g, jnp.asarray(smoothing))


def with_values(seed, values, rows=6, columns=5):
    u, v = (np.linalg.qr(random(seed + i, size, len(values)))[0] for i, size in enumerate((rows, columns)))
    return u * values @ v.T


class TestOrthogonalised:
    @pytest.mark.parametrize("values", [(1.0, 0.5, 0.2), (3.0, 3.0, 3.0), (2.0, 1e-3, 1e-6), (1e-5, 1e-6), (1.0,)])
    @pytest.mark.parametrize("shape", [(6, 5), (5, 6), (30, 4)])
    @pytest.mark.parametrize("smoothing", [1e-1, 1e-3, 1e-6])
    def test_is_that_of_a_singular_value_decomposition(self, values, shape, smoothing):
        """s/sqrt(s^2 + smoothing^2) in the place of s, repeated, absent and tiny singular values included."""
        g = with_values(1, np.array(values), *shape)
        np.testing.assert_allclose(orthogonal(g, smoothing), theory.msign(g, smoothing), atol=1e-11)

    def test_less_smoothing_than_can_be_is_1e_8_of_the_norm(self):
        g = with_values(2, np.array([3.0, 1.0, 1e-3]))
        np.testing.assert_allclose(orthogonal(g, 1e-12), theory.msign(g, 1e-8 * np.linalg.norm(g)), atol=1e-9)

    def test_zero_stays_zero_and_so_do_zero_columns(self):
        assert not np.any(orthogonal(np.zeros((4, 3)), 1e-3))
        wide = np.pad(with_values(3, np.array([1.0, 0.3])), ((0, 0), (0, 2)))
        got = np.asarray(orthogonal(wide, 1e-3))
        assert not np.any(got[:, 5:])
        np.testing.assert_allclose(got[:, :5], orthogonal(wide[:, :5], 1e-3), atol=1e-13)

    @pytest.mark.long
    @pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
    def test_derivatives_are_those_of_differences(self, mode):
        """At repeated singular values too, where those of singular vectors do not exist."""
        for g in (with_values(4, np.array([1.0, 0.4, 0.1]), 3, 3), np.diag([1.0, 1.0, 0.5])):
            towards = random(5, 3, 3)
            found = mode(lambda t, g=g, towards=towards: orthogonalised(g + t * towards, jnp.asarray(0.01)))(0.0)
            near = [theory.msign(g + t * towards, 0.01) for t in (1e-5, -1e-5)]
            np.testing.assert_allclose(found, (near[0] - near[1]) / 2e-5, atol=1e-6)


def formula(flow, g, a, b):
    """The velocities by NumPy, from the papers' formulas, with inverse roots by eigenvalues."""

    def inverse_root(gram):
        values, vectors = np.linalg.eigh(gram)
        return vectors / np.sqrt(values) @ vectors.T

    if isinstance(flow, Muon):
        return theory.msign(b.T @ g, float(flow.smoothing)), theory.msign(g @ a.T, float(flow.smoothing))
    r_a, r_b = (inverse_root(x + float(flow.damping) * np.eye(len(x))) for x in (a @ a.T, b.T @ b))
    smoothing = float(flow.smoothing)
    return 0.5 * r_b @ theory.msign(r_b @ b.T @ g, smoothing), 0.5 * theory.msign(g @ a.T @ r_a, smoothing) @ r_a


class TestVelocities:
    @pytest.mark.parametrize("flow", [Muon(0.02), LoRAMuon(0.0, 0.02), LoRAMuon(0.3, 0.02)], ids=str)
    @few
    @given(seed=st.integers(0, 10**6))
    def test_are_those_of_the_papers(self, flow, seed):
        g, a, b = random(seed, M, N), random(seed + 1, RANK, N), random(seed + 2, M, RANK)
        got = driven(flow, Adapter(b.T @ g, g @ a.T), Adapter(a, b))
        for ours, theirs in zip(got, formula(flow, g, a, b), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-10 * (1 + np.abs(theirs).max()))

    @few
    @given(seed=st.integers(0, 10**6))
    def test_lora_muon_moves_every_factorisation_alike(self, seed):
        g, a, b = random(seed, M, N), random(seed + 1, RANK, N), random(seed + 2, M, RANK)
        mixing = random(seed + 3, RANK, RANK) + 3 * np.eye(RANK)
        pairs = (a, b), (np.linalg.solve(mixing, a), b @ mixing), (a / 1e4, 1e4 * b)
        moved = []
        for one in pairs:
            da, db = driven(LoRAMuon(0.0, 0.02), Adapter(one[1].T @ g, g @ one[0].T), Adapter(*one))
            moved.append(np.asarray(db @ one[0] + one[1] @ da))
        for other in moved[1:]:
            np.testing.assert_allclose(other, moved[0], atol=1e-11 * np.linalg.cond(mixing))
        assert np.linalg.norm(moved[0], 2) <= 1 + 1e-12

    @pytest.mark.parametrize("flow", [Muon(0.01), LoRAMuon(0.1, 0.01), LoRAMuon(0.0, 0.01)], ids=str)
    def test_padding_changes_nothing(self, flow):
        now = adapter(40)
        descent = Adapter(now.b.T @ PROBLEM.shift, PROBLEM.shift @ now.a.T)
        (wide,) = pad((driven(flow, descent, now),), RANK + 2)
        for ours, theirs in zip(driven(flow, *pad((descent, now), RANK + 2)), wide, strict=True):
            np.testing.assert_array_equal(np.asarray(ours) == 0, np.asarray(theirs) == 0)
            np.testing.assert_allclose(ours, theirs, rtol=1e-11)

    @pytest.mark.parametrize("flow", [Muon(0.1), LoRAMuon(0.1, 0.1)], ids=str)
    def test_other_coordinates_change_nothing(self, flow):
        """Canonical ones of two layers, and fewer directions of a rank above out + in."""
        problem = aligned_problem(jax.random.key(1), m=4, n=3, h=9, delta_w=0.5)
        start = tuple(
            Adapter(*(jnp.asarray(random(i, *leaf.shape)) for leaf in pair))
            for i, pair in enumerate(zero_adapters(problem.layers, 2), 60)
        )
        turned = canonical(problem, rank=2)
        inside, bases = turned.enter(start)
        back = turned.leave(jax.jit(velocity(turned.problem, flow))(inside), bases)
        expected = jax.jit(velocity(problem, flow))(start)
        for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-9)
        wide = (Adapter(random(1, 14, N), random(2, M, 14)),)
        few_of_them = narrow(wide)
        moved = []
        for one in (wide, few_of_them):
            (rate,) = jax.jit(velocity(PROBLEM, flow))(one)
            moved.append(np.asarray(rate.b @ one[0].a + one[0].b @ rate.a))
        np.testing.assert_allclose(*moved, atol=1e-10)


class TestMuonBesideOptax:
    start = (adapter(3, 0.5, 0.4),)

    def test_descents_are_those_of_optax_with_the_exact_polar_factor(self):
        """Newton and Schulz's cubic iteration to its end, no momentum: U V^T up to its stop."""
        ours = descend(PROBLEM, self.start, steps=40, step=0.01, flow=Muon(1e-9), saves=[0, 40])
        chain = optax.chain(optax.contrib.scale_by_muon(**NEWTON_SCHULZ), optax.scale(-0.01))
        theirs = descend(PROBLEM, self.start, steps=40, step=chain, saves=[0, 40])
        for one, other in zip(ours.adapters[0], theirs.adapters[0], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
        assert ours.observables["loss"][-1] < 0.9 * ours.observables["loss"][0]

    def test_what_optax_takes_by_default_is_within_a_third(self):
        """Its five quintic steps leave singular values between about .7 and 1.2 (Jordan 2024)."""
        g = jnp.asarray(random(7, M, RANK))
        muon = optax.contrib.scale_by_muon(**WITHOUT_MOMENTUM)
        update, _ = muon.update(g, muon.init(g))
        left, right = (np.linalg.svd(x)[0][:, :RANK] for x in (np.asarray(orthogonal(g, 1e-9)), update))
        np.testing.assert_allclose(left @ left.T, right @ right.T, atol=1e-6)
        values = np.linalg.svd(update, compute_uv=False)
        assert np.all((values > 0.6) & (values < 1.3))

    def test_a_flow_is_a_transformation_of_optax(self):
        chain = optax.chain(optax.scale(-1.0), optax.stateless(LoRAMuon(1e-3)), optax.scale(0.05))
        ours = descend(PROBLEM, self.start, steps=10, step=0.05, flow=LoRAMuon(1e-3), saves=[0, 10])
        theirs = descend(PROBLEM, self.start, steps=10, step=chain, saves=[0, 10])
        for one, other in zip(ours.adapters[0], theirs.adapters[0], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12)


def sizes(seed, m, n, rank, scale=1.0):
    return Adapter(random(seed, rank, n), scale * random(seed + 1, m, rank))


class TestBalance:
    @pytest.mark.parametrize(("m", "n", "rank"), [(7, 5, 3), (5, 7, 5), (4, 5, 6), (9, 9, 1), (3, 4, 9)])
    @pytest.mark.parametrize("scale", [1.0, 1e-6, 1e5])
    def test_keeps_the_product_and_balances(self, m, n, rank, scale):
        a, b = sizes(1, m, n, rank, scale)
        ((ours_a, ours_b),) = balance((Adapter(a, b),))
        product = b @ a
        np.testing.assert_allclose(ours_b @ ours_a, product, atol=1e-13 * np.linalg.norm(product))
        gram = np.asarray(ours_a @ ours_a.T)
        np.testing.assert_allclose(ours_b.T @ ours_b, gram, atol=1e-13 * np.linalg.norm(gram))

    def test_is_the_nearest_such_pair(self):
        """Of all rotations of the pair, and the pair itself where it is balanced already."""
        a, b = sizes(3, 7, 5, 3, 0.1)
        ((near_a, near_b),) = balance((Adapter(a, b),))
        rng, own = np.random.default_rng(0), np.sum((near_a - a) ** 2) + np.sum((near_b - b) ** 2)
        for _ in range(50):
            turn = np.linalg.qr(np.eye(3) + 0.3 * rng.normal(size=(3, 3)))[0]
            assert np.sum((turn.T @ near_a - a) ** 2) + np.sum((near_b @ turn - b) ** 2) > own
        ((again_a, again_b),) = balance((Adapter(near_a, near_b),))
        np.testing.assert_allclose(again_a, near_a, atol=1e-14)
        np.testing.assert_allclose(again_b, near_b, atol=1e-14)

    def test_is_the_authors_projection_but_for_a_rotation(self):
        """Theirs is by singular values of the product: U S^{1/2} and S^{1/2} V^T; the Gram matrices are the same."""
        a, b = sizes(5, 8, 6, 3)
        ((ours_a, ours_b),) = balance((Adapter(a, b),))
        u, s, vt = np.linalg.svd(b @ a)
        theirs_a, theirs_b = np.sqrt(s[:3])[:, None] * vt[:3], u[:, :3] * np.sqrt(s[:3])
        np.testing.assert_allclose(ours_b @ ours_b.T, theirs_b @ theirs_b.T, atol=1e-13)
        np.testing.assert_allclose(ours_a.T @ ours_a, theirs_a.T @ theirs_a, atol=1e-13)

    def test_takes_lanes_padding_and_products_of_lower_rank(self):
        several = Adapter(random(1, 4, 3, 5), random(2, 4, 6, 3))
        (many,) = balance((several,))
        (one,) = balance((Adapter(several.a[2], several.b[2]),))
        np.testing.assert_allclose(many.a[2], one.a, atol=1e-13)
        (wide,) = balance(pad((one,), 5))
        assert not np.any(wide.a[3:])
        assert not np.any(wide.b[:, 3:])
        (low,) = balance((Adapter(several.a[0], several.b[0] @ np.diag([1.0, 0.0, 0.0])),))
        np.testing.assert_allclose(low.b @ low.a, several.b[0][:, :1] @ several.a[0][:1], atol=1e-13)
        assert np.linalg.matrix_rank(low.a, tol=1e-6) == 1
        (none,) = balance((Adapter(several.a[0], 0 * several.b[0]),))
        assert not np.any(none.a)

    @pytest.mark.long
    @pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
    def test_derivatives_are_those_of_differences(self, mode):
        """At repeated singular values of the product too."""
        for a, b in ((random(1, 3, 5), random(2, 6, 3)), (np.eye(3, 5), 0.2 * np.eye(6, 3))):
            da, db = random(3, *a.shape), random(4, *b.shape)
            moved = jax.jit(lambda t, a=a, b=b, da=da, db=db: balanced_factors(a + t * da, b + t * db))
            for found, *near in zip(mode(moved)(0.0), moved(1e-5), moved(-1e-5), strict=True):
                np.testing.assert_allclose(found, (near[0] - near[1]) / 2e-5, atol=1e-6)


class TestBaLoRA:
    u, sigma, vt = conditioned(5)
    problem = SingleLayer(u * sigma @ vt)
    start = (adapter(8, 1.0, 1e-2),)

    def closed(self, times):
        ((a, b),) = balance(self.start)
        return np.asarray(oracles.riccati(self.problem.shift, a, b, times).product)

    def test_flow_is_the_closed_form_with_no_imbalance(self):
        """From unbalanced factors, whose own gradient flow is another."""
        times = np.linspace(0.0, 20.0, 9)
        run = solve(self.problem, self.start, t1=20.0, saves=times, flow="balora", save_adapters=True, rtol=1e-9)
        product = np.asarray(run.history[0].b @ run.history[0].a)
        np.testing.assert_allclose(product, self.closed(times), atol=1e-9)
        plain = solve(self.problem, self.start, t1=20.0, saves=times, save_adapters=True, rtol=1e-9)
        assert np.abs(np.asarray(plain.history[0].b @ plain.history[0].a) - product).max() > 0.1
        assert run.observables["drift"].max() < 1e-6
        assert run.status == 0

    @pytest.mark.parametrize("order", ["simultaneous", "A first"])
    def test_descent_projects_after_each_step(self, order):
        """The loop written out, with the authors' projection: B A is the same for every rotation of the factors."""
        ours = descend(self.problem, self.start, steps=5, step=0.1, flow=BaLoRA(), order=order, saves=[0, 5])
        ((a, b),) = self.start
        for _ in range(5):
            left = self.problem.shift - b @ a
            da, db = b.T @ left, left @ a.T
            if order == "A first":
                a = a + 0.1 * da
                b = b + 0.1 * (self.problem.shift - b @ a) @ a.T
            else:
                a, b = a + 0.1 * da, b + 0.1 * db
            u, s, vt = np.linalg.svd(b @ a)
            a, b = np.sqrt(s[:RANK])[:, None] * vt[:RANK], u[:, :RANK] * np.sqrt(s[:RANK])
        ((ours_a, ours_b),) = ours.adapters
        np.testing.assert_allclose(ours_b @ ours_a, b @ a, atol=1e-12)
        np.testing.assert_allclose(ours_b.T @ ours_b, ours_a @ ours_a.T, atol=1e-12)

    def test_descents_converge_to_the_flow(self):
        """From balanced factors: else the first step comes before the projection."""
        errors = []
        for size in (0.02, 0.01):
            steps = round(4 / size)
            run = descend(self.problem, balance(self.start), steps=steps, step=size, flow="balora", saves=[0, steps])
            ((a, b),) = run.adapters
            errors.append(np.linalg.norm(b @ a - self.closed(np.array([4.0]))[0]))
        assert 0.4 * errors[0] < errors[1] < 0.6 * errors[0] < 0.01

    def test_a_start_without_a_product_is_a_saddle(self):
        """`solve` refuses it; a first step leaves it."""
        half = gaussian_init(jax.random.key(0), self.problem, rank=2, alpha=0.1)
        must = "adapters must have a product of rank 2, which the flow 'balora' balances at the start, got B_1 A_1 of"
        with pytest.raises(InputError, match=f"{must} rank 0"):
            solve(self.problem, half, t1=1.0, flow="balora")
        with pytest.raises(InputError, match=rf"{must} rank 0 \(init gaussian, rank 2\)"):
            sweep(self.problem, init=("lora-one", "gaussian"), rank=2, t1=1.0, flow=Chain(BaLoRA()), progress=False)
        run = descend(self.problem, half, steps=400, step=0.1, flow="balora", saves=[0, 400])
        assert run.observables["loss"][-1] < 0.1 * run.observables["loss"][0]

    @pytest.mark.long
    def test_goes_with_other_flows_and_optimisers(self):
        chain = descend(self.problem, self.start, steps=20, step=0.1, flow=Chain(LoRAPlus(2.0), BaLoRA()), saves=2)
        adam = descend(self.problem, self.start, steps=20, step=optax.adam(0.01), flow="balora", saves=2)
        for run in (chain, adam):
            assert np.abs(run.adapters[0].imbalance).max() < 1e-13
            assert run.observables["loss"][-1] < run.observables["loss"][0]


class TestInUse:
    @pytest.mark.parametrize(
        ("text", "flow"),
        [
            ("muon", Muon(1e-3)),
            ("muon:0.01", Muon(0.01)),
            ("lora-muon", LoRAMuon(0.0, 1e-3)),
            ("lora-muon:1e-4", LoRAMuon(1e-4, 1e-3)),
            ("lora-muon:0:0.01", LoRAMuon(0.0, 0.01)),
            ("balora", BaLoRA()),
        ],
    )
    def test_by_name(self, text, flow):
        assert eqx.tree_equal(parse_flow(text), flow)
        assert eqx.tree_equal(parse_flow(str(flow)), flow)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("muon:0", "smoothing must be positive, got 0.0"),
            ("muon:1:2", "flow must come with at most 1 number after colons for 'muon', got 'muon:1:2'"),
            ("lora-muon:-1", "damping must be at least 0, got -1.0"),
            ("lora-muon:1:0", "smoothing must be positive, got 0.0"),
            ("lora-muon:1:2:3", "flow must come with at most 2 numbers after colons for 'lora-muon', got"),
            ("balora:1", "flow must come without a number for 'balora', got 'balora:1'"),
            ("muon:x", "flow must have a number after the colon, got 'muon:x'"),
        ],
    )
    def test_bad_ones_get_one_line(self, text, message):
        with pytest.raises(InputError, match=f"^{message}"):
            parse_flow(text)

    def test_undamped_lora_muon_refuses_a_zero_factor(self):
        half = gaussian_init(jax.random.key(0), PROBLEM, rank=2, alpha=0.1)
        with pytest.raises(InputError, match="damping must be positive where a factor's rank is below 2"):
            solve(PROBLEM, half, t1=1.0, flow="lora-muon")
        LoRAMuon(1e-3).check_start(half)


def test_lora_muon_has_a_hint_where_the_rank_is_above_the_tasks():
    told = LoRAMuon().hint(4, 2)
    assert "rank 4, above the task's 2" in told
    assert "lora-muon:1e-3" in told
    assert [*map(len, (LoRAMuon().hint(2, 2), LoRAMuon(1e-3).hint(4, 2), Muon().hint(4, 2)))] == [0, 0, 0]

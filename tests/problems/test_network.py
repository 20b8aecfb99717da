"""Linear networks that are trained from scratch: the problem, its starts, sweeps, and what they hand over."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_flow import (
    Adapter,
    Factorization,
    InputError,
    LinearNetwork,
    Regression,
    ScaledGD,
    aligned_problem,
    balanced_init,
    descend,
    gaussian_both_init,
    gaussian_init,
    gaussian_wide_init,
    invariant_init,
    load_run,
    narrow,
    network_problem,
    oracles,
    pissa_init,
    pretrained_problem,
    solve,
    spectral_both_init,
    spectral_init,
    sweep,
)
from lora_flow.cli import main
from lora_flow.dynamics.flows import LoRAPlus, LoRAPro
from lora_flow.initialization import find_scheme, initialize
from lora_flow.theory import linear_networks as theory
from lora_flow.theory.linear_flow import trained_gains

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def matrix(rows, columns, rank=None):
    rank = rank or min(rows, columns)
    left, right = RNG.standard_normal((rows, rank)), RNG.standard_normal((rank, columns))
    return left @ right / np.sqrt(rank)


# fewer samples than inputs; more; dependent inputs; n != m either way; X = I
X_SHAPES = {"few": (5, 8, None), "many": (12, 4, None), "dependent": (9, 6, 3), "white": None}
DATA = {name: (None if shape is None else matrix(*shape)) for name, shape in X_SHAPES.items()}
TARGETS = {name: RNG.standard_normal((7 if x is None else len(x), 3)) for name, x in DATA.items()}


@pytest.fixture(params=DATA)
def case(request):
    return DATA[request.param], TARGETS[request.param]


def plain_loss(x, y, start):
    ((a, b),) = start
    return 0.5 * np.sum((y - (np.eye(len(y)) if x is None else x) @ a.T @ b.T) ** 2)


@jax.jit
def loss_field_and_gradient(problem, start):
    return problem.loss(start), problem.field(start), jax.grad(problem.loss)(start)


def test_the_loss_is_what_lies_above_the_least(case):
    x, y = case
    problem = LinearNetwork(y, x)
    least = 0.0 if x is None else 0.5 * np.sum((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2)
    np.testing.assert_allclose(problem.least_loss, least, rtol=1e-10, atol=1e-20)
    start = gaussian_both_init(KEY, problem, rank=6, alpha=0.7)
    loss, ((da, db),), (wanted,) = loss_field_and_gradient(problem, start)
    np.testing.assert_allclose(loss + problem.least_loss, plain_loss(x, y, start), rtol=1e-12)
    np.testing.assert_allclose(da, -wanted.a, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(db, -wanted.b, rtol=1e-10, atol=1e-12)


def test_the_same_network_in_the_theorys_words(case):
    """X of independent columns, and the same loss and products of the gradient."""
    x, y = case
    problem = LinearNetwork(y, x)
    start = gaussian_both_init(KEY, problem, rank=6, alpha=0.7, ratio=3.0)
    network = problem.network(start)
    assert theory.curvature(network[0]).mu > 1e-6
    np.testing.assert_allclose(theory.loss(*network), problem.loss(start), rtol=1e-12)
    slope = theory.product_gradient(*network)
    np.testing.assert_allclose(np.linalg.norm(slope), np.linalg.norm(problem.product_descent(start)), rtol=1e-12)
    np.testing.assert_allclose(problem.smoothness(), theory.curvature(network[0]).K, rtol=1e-9)


def test_the_least_loss_of_narrow_layers(case):
    """Eckart and Young: half the squared singular values of X W* that a width leaves out; zero from min(n, m) on."""
    x, y = case
    problem = LinearNetwork(y, x)
    fitted = y if x is None else x @ np.linalg.lstsq(x, y, rcond=None)[0]
    sigma = np.linalg.svd(fitted, compute_uv=False)
    for h in (1, 2, 3, 40):
        np.testing.assert_allclose(problem.lowest_loss(h), 0.5 * np.sum(sigma[h:] ** 2), rtol=1e-10, atol=1e-20)


def test_gradients_go_through_inputs_and_targets():
    x, y = DATA["few"], TARGETS["few"]
    start = gaussian_both_init(KEY, LinearNetwork(y, x), rank=4, alpha=0.5)

    def loss(x, y):
        return LinearNetwork(y, x, rank=5).loss(start)

    for i, at in enumerate((x, y)):
        slope = jax.grad(loss, i)(x, y)
        step = np.zeros_like(at)
        step[1, 2] = 1e-5
        ahead, behind = (
            loss(*(v + s * step * (j == i) if j == i else v for j, v in enumerate((x, y)))) for s in (1, -1)
        )
        np.testing.assert_allclose(slope[1, 2], (ahead - behind) / 2e-5, rtol=1e-6)


@pytest.mark.long
def test_a_linear_regression_is_the_same_flow_up_to_the_time():
    """`Regression` has the mean of squares, the network their sum: t counts N times as much."""
    x, y = DATA["many"], TARGETS["many"]
    network = LinearNetwork(y, x)
    layer = Regression(x, np.asarray(network.solution).T)
    start = gaussian_init(KEY, layer, rank=3, alpha=0.1)
    times = np.linspace(0, 1.0, 11)
    ours = solve(network, start, t1=1.0, saves=times).observables["loss"]
    theirs = solve(layer, start, t1=1.0 * len(x), saves=times * len(x)).observables["loss"]
    np.testing.assert_allclose(ours, len(x) * theirs, rtol=1e-8)


def test_a_start_along_the_singular_vectors_is_the_closed_form():
    y = RNG.standard_normal((6, 4))
    problem = LinearNetwork(y)
    start = spectral_both_init(KEY, problem, rank=9, alpha=0.2, ratio=5.0)
    run = solve(problem, start, t1=8.0, saves=9, rtol=1e-10, solver="Dopri8", save_adapters=True)
    u, sigma, vt = np.linalg.svd(y.T, full_matrices=False)
    at = oracles.spectral(u, sigma, vt, np.full(4, 0.2 / np.sqrt(5)), np.full(4, 0.2 * np.sqrt(5)), run.times)
    np.testing.assert_allclose(run.history[0].b @ run.history[0].a, at.b @ at.a, atol=1e-8)
    np.testing.assert_allclose(
        np.linalg.norm(run.history[0].a, axis=(1, 2)), np.linalg.norm(at.a, axis=(1, 2)), atol=1e-8
    )


def test_wide_layers_cost_no_more_than_their_ends():
    """Descent from the narrowed start is that from the start, but for the basis of the hidden layer."""
    problem = LinearNetwork(TARGETS["few"], DATA["few"])
    start = gaussian_wide_init(KEY, problem, rank=50, alpha=1.0)
    thin = narrow(start)
    assert thin[0].rank == 8 + 3
    assert narrow(thin) is not None
    assert narrow(thin)[0].a is thin[0].a
    one, other = (descend(problem, s, steps=40, step=0.05, saves=5) for s in (start, thin))
    np.testing.assert_allclose(one.observables["loss"], other.observables["loss"], rtol=1e-10)
    lanes = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), start)
    np.testing.assert_allclose(narrow(lanes)[0].a[0], thin[0].a, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("flow", ["plain", LoRAPlus(2.0), ScaledGD(1e-2), LoRAPro(1e-2)], ids=str)
def test_every_flow_stays_in_the_space_of_its_start(flow):
    problem = LinearNetwork(TARGETS["few"], DATA["few"])
    start = gaussian_wide_init(KEY, problem, rank=50, alpha=1.0)
    one, other = (
        solve(problem, s, t1=3.0, saves=7, flow=flow, rtol=1e-9, solver="Tsit5") for s in (start, narrow(start))
    )
    for name in ("loss", "distance", "norm_z1", "norm_b1a1"):
        np.testing.assert_allclose(one.observables[name], other.observables[name], rtol=1e-7, err_msg=name)


class TestStarts:
    problem = LinearNetwork(TARGETS["few"], DATA["few"])

    def test_sizes_of_the_gaussian_ones(self):
        ((a, b),) = gaussian_both_init(KEY, self.problem, rank=20000, alpha=0.3, ratio=4.0)
        np.testing.assert_allclose([np.std(a), np.std(b)], [0.6, 0.15], rtol=0.02)
        ((a, b),) = gaussian_wide_init(KEY, self.problem, rank=20000, alpha=2.0, p=0.375)
        np.testing.assert_allclose([np.std(a), np.std(b)], 2 * 20000**-0.375, rtol=0.02)

    def test_ratio_leaves_the_product(self):
        one, other = (gaussian_both_init(KEY, self.problem, rank=7, alpha=0.3, ratio=r)[0] for r in (1.0, 50.0))
        np.testing.assert_allclose(one.b @ one.a, other.b @ other.a, rtol=1e-12)

    @pytest.mark.parametrize("rank", [2, 7, 60])
    def test_balanced_is_balanced_with_the_same_product(self, rank):
        (adapter,) = balanced_init(KEY, self.problem, rank=rank, alpha=0.3)
        (drawn,) = gaussian_both_init(KEY, self.problem, rank=rank, alpha=0.3)
        np.testing.assert_allclose(adapter.b @ adapter.a, drawn.b @ drawn.a, atol=1e-13)
        np.testing.assert_allclose(adapter.imbalance, 0.0, atol=1e-14)

    @pytest.mark.parametrize("rank", [5, 40])
    def test_invariant_fulfils_both_conditions(self, rank):
        from lora_flow.theory import linear_flow

        (adapter,) = invariant_init(KEY, self.problem, rank=rank, alpha=0.5)
        reduced = linear_flow.reduce(DATA["few"], TARGETS["few"], adapter.a.T, adapter.b.T)
        for product in linear_flow.bias_invariants(reduced):
            np.testing.assert_allclose(product, 0.0, atol=1e-14)
        if rank == 40:  # and leaves something outside the rows of X, whereas 5 directions have no room for it
            assert np.linalg.norm(reduced.outside) > 0.5

    @pytest.mark.long
    def test_it_ends_at_the_solution_of_least_norm_and_others_do_not(self):
        runs = sweep(
            self.problem, init=("invariant", "gaussian-both"), alpha=0.5, rank=(8, 40), seeds=3, t1=300.0, saves=3
        )
        ends = runs.isel(time=-1)
        assert float(ends["loss"].max()) < 1e-20
        assert float(ends["distance"].sel(init="invariant").max()) < 1e-8
        assert float(ends["distance"].sel(init="gaussian-both").min()) > 0.1

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("gaussian-both:-1", "ratio must be positive and finite, got -1.0"),
            ("gaussian-both:x", "init must have a number after the colon, got 'gaussian-both:x'"),
            ("gaussian-wide:-1", "p must be at least 0, got -1.0"),
            ("balanced:2", "init must come without a number for 'balanced', got 'balanced:2'"),
            ("gaussian-boht:2", "init must be .*got 'gaussian-boht' .did you mean 'gaussian-both'"),
            ("pissa", "problem must know its pretrained weights, as `weights`, for pissa, got LinearNetwork without"),
            ("lora-one", "rank must lie between 1 and 3, the smallest layer dimension, got 20"),
            ("spectral", "rank must lie between 1 and 3, the smallest layer dimension, got 20"),
        ],
    )
    def test_what_is_not_defined_is_named(self, name, message):
        rank = 2 if name == "pissa" else 20
        with pytest.raises(InputError, match=f"^{message}"):
            sweep(self.problem, init=name, rank=rank, t1=1.0)

    def test_white_inputs_have_no_rows_to_be_invariant_in(self):
        with pytest.raises(
            InputError, match="problem must feed every layer with inputs that have principal directions"
        ):
            invariant_init(KEY, LinearNetwork(np.ones((3, 2))), rank=4, alpha=1.0)

    def test_a_number_after_a_colon_is_the_parameter(self):
        named = initialize("gaussian-both:25", KEY, self.problem, rank=6, alpha=0.1, side="A")
        np.testing.assert_array_equal(
            named[0].a, gaussian_both_init(KEY, self.problem, rank=6, alpha=0.1, ratio=25.0)[0].a
        )
        assert find_scheme("gaussian-wide:0.4").init.keywords == {"p": 0.4}


class TestSweep:
    @pytest.mark.long
    def test_lanes_are_what_solve_does_whatever_their_width(self):
        problem = LinearNetwork(TARGETS["many"], DATA["many"])
        how = {"t1": 2.0, "saves": 5, "solver": "Tsit5", "rtol": 1e-6}
        swept = sweep(problem, init="gaussian-wide:0.4", alpha=(0.5, 1.0), rank=(2, 5, 30), seeds=(3,), **how)
        for alpha in (0.5, 1.0):
            for rank in (2, 5, 30):
                start = initialize("gaussian-wide:0.4", jax.random.key(3), problem, rank=rank, alpha=alpha, side="A")
                lane, alone = swept.sel(alpha=alpha, rank=rank).squeeze(), solve(problem, start, **how)
                for name in ("loss", "distance", "norm_z1"):
                    np.testing.assert_allclose(lane[name], alone.observables[name], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(swept["least_loss"], problem.least_loss)
        assert not swept["dead_directions"].any()

    @pytest.mark.long
    def test_several_networks_share_a_program(self):
        problems = {i: network_problem(jax.random.key(i), m=2, n=5, samples=4) for i in range(2)}
        how = {"init": "balanced", "alpha": 0.5, "rank": 9, "t1": 50.0, "saves": 3}
        swept = sweep(problems, **how)
        assert swept["distance"].dims == ("problem", "init", "alpha", "rank", "seed", "time")
        for i, problem in problems.items():
            np.testing.assert_allclose(swept["loss"].sel(problem=i), sweep(problem, **how)["loss"], rtol=1e-6)
            np.testing.assert_allclose(swept["least_loss"].sel(problem=i), problem.least_loss)

    @pytest.mark.long
    def test_details_of_narrowed_lanes(self):
        problem = LinearNetwork(TARGETS["white"])
        swept = sweep(problem, init="gaussian-both", alpha=0.3, rank=30, t1=1.0, saves=3, details=True)
        assert np.all(np.isfinite(swept["gradient_norm"]))


class TestDraws:
    def test_inputs_have_the_spectrum_that_was_asked_for(self):
        x = network_problem(KEY, n=6, m=2, input_kappa=16.0, input_rank=4).inputs
        sigma = np.linalg.svd(x, compute_uv=False)
        np.testing.assert_allclose(sigma[:4] ** 2, np.geomspace(1, 1 / 16, 4), rtol=1e-10)
        assert x.shape[0] == 4 or sigma[4] < 1e-12
        assert network_problem(KEY).features is None
        many = network_problem(KEY, n=5, samples=20000).inputs
        np.testing.assert_allclose(many.T @ many, np.eye(5), atol=0.05)

    def test_noise_that_cannot_be_learned_is_the_least_loss(self):
        clean, loud = (network_problem(KEY, n=5, m=3, samples=50, target_noise=noise) for noise in (0.0, 0.5))
        assert clean.least_loss == 0
        share = float(2 * loud.least_loss) / (0.25 * np.linalg.norm(np.asarray(clean.inputs @ clean.solution)) ** 2)
        assert 0.8 < share < 1  # 45 of 50 dimensions of the noise are outside the inputs' columns

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"m": 0}, "m must be at least 1, got 0"),
            ({"samples": -1}, "samples must be at least 0, for infinitely many, got -1"),
            ({"input_rank": 11}, "input_rank must lie between 0, for all, and 10, the number of inputs, got 11"),
            ({"input_kappa": 0.5}, "input_kappa must be at least 1, got 0.5"),
            ({"target_noise": -1.0}, "target_noise must be at least 0, got -1.0"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(InputError, match=f"^{message}$"):
            network_problem(KEY, **arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((np.ones((3, 2)), np.ones((4, 2))), "inputs must have 3 rows, as the targets have, got shape"),
            ((np.ones(3),), "targets must be a matrix"),
            ((np.zeros((3, 2)),), "targets must have a non-zero entry, got nothing to learn"),
            ((np.ones((3, 1)), np.array([[1.0], [-1.0], [0.0]]) / 3), "targets must depend on the inputs, X"),
            ((np.ones((3, 2)), np.ones((3, 2)), 3), "rank must be from 1 to 2, got 3"),
            ((np.eye(2)[:1].T, np.eye(2)[1:].T), "targets must depend on the inputs"),
            ((np.array([[np.nan]]),), "targets must be finite"),
        ],
    )
    def test_bad_arrays_are_named(self, arguments, message):
        with pytest.raises(InputError, match=f"^{message}"):
            LinearNetwork(*arguments)

    def test_the_rank_of_traced_inputs_must_be_given(self):
        """Otherwise dependent columns would be taken for independent, and their least singular value for rounding."""
        y, x = TARGETS["dependent"], DATA["dependent"]

        def optimum(x, rank=None):
            return LinearNetwork(y, x, rank=rank).optimum

        with pytest.raises(InputError, match=r"^rank must be given where the inputs are traced, got None"):
            jax.jit(optimum)(x)
        np.testing.assert_allclose(jax.jit(optimum, static_argnums=1)(x, 3).T @ optimum(x), optimum(x).T @ optimum(x))

    def test_it_says_what_it_is(self):
        text = str(LinearNetwork(TARGETS["dependent"], DATA["dependent"]))
        assert text.startswith("LinearNetwork: n = 6, m = 3; X of rank 3 with singular values")
        assert "; solution of rank 3 with singular values" in text
        assert "L* = " in text


class TestFromPretrainingToFineTuning:
    @pytest.mark.long
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.integers(0, 2**31), st.floats(-1.5, 1.5), st.floats(0.2, 5.0))
    def test_the_gains_of_a_trained_scalar_network(self, seed, log_ratio, sigma):
        """n = m = 1, any width: d and the squared area p are conserved, and a . b ends at sigma (derived here)."""
        rng = np.random.default_rng(seed)
        ratio = 10**log_ratio
        start = (Adapter(rng.standard_normal((5, 1)) * ratio, rng.standard_normal((1, 5)) / ratio),)
        gains = trained_gains(sigma, start[0].a[:, 0], start[0].b[0])
        t1 = 20 / (gains.first**2 + gains.second**2)
        end = solve(LinearNetwork(np.array([[sigma]])), start, t1=t1, saves=2, rtol=1e-9)
        (final,) = end.adapters
        np.testing.assert_allclose(np.linalg.norm(final.a), gains.first, rtol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(final.b), gains.second, rtol=1e-6)

    @pytest.mark.parametrize(
        ("init", "within"), [pytest.param("spectral-both:4", 1e-7, marks=pytest.mark.long), ("gaussian-both:4", 0.05)]
    )
    def test_delta_w_is_what_the_start_says(self, init, within):
        """Exactly for modes that do not meet, nearly for a wide layer; product and shift are those asked for."""
        problem, drawn = pretrained_problem(KEY, init=init), aligned_problem(KEY)
        goal = np.asarray(drawn.w2 @ drawn.w1)
        np.testing.assert_allclose(problem.w2 @ problem.w1, goal, atol=1e-7)
        np.testing.assert_array_equal(problem.shift, drawn.shift)
        u, sigma, vt = np.linalg.svd(goal)
        (start,) = initialize(init, jax.random.fold_in(KEY, 3), LinearNetwork(goal.T), rank=100, alpha=0.1, side="A")
        predicted = trained_gains(sigma[0], start.a @ vt[0], start.b.T @ u[:, 0])
        np.testing.assert_allclose(problem.spectrum()["delta_w"], predicted.ratio, rtol=within)
        assert problem.spectrum()["aligned"] == init.startswith("spectral")

    def test_descent_hands_over_as_well(self):
        y, shift = RNG.standard_normal((4, 3)), RNG.standard_normal((3, 4))
        network = LinearNetwork(y)
        start = gaussian_wide_init(KEY, network, rank=30, alpha=1.0)
        trained = descend(network, start, steps=400, step=0.1)
        lora = network.for_lora(trained.adapters, shift=shift)
        assert isinstance(lora, Factorization)
        np.testing.assert_allclose(lora.w2 @ lora.w1, y.T, atol=1e-10)
        same = network.for_lora(trained.adapters, target=shift + np.asarray(lora.w2 @ lora.w1))
        np.testing.assert_allclose(same.shift, shift, atol=1e-12)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"pretraining_t1": 0.1},
                "pretraining from gaussian-both must come to a loss of 1e-18 of its first within",
            ),
            ({"init": "gaussien"}, "init must be"),
            ({"alpha": -1.0}, "alpha must be positive"),
        ],
    )
    def test_what_cannot_be_trained_is_refused(self, arguments, message):
        with pytest.raises(InputError, match=f"^{message}"):
            pretrained_problem(KEY, **arguments)


class Watched(eqx.Module):
    """A problem with quantities of its own."""

    layers: tuple = eqx.field(static=True, default=((3, 2),))
    named: Any = eqx.field(static=True, default=("trace", 0))

    def loss(self, adapters):
        ((a, b),) = adapters
        return 0.5 * jnp.sum((1 - b @ a) ** 2)

    def observe(self, adapters):
        name, axes = self.named
        return {name: jnp.sum(adapters[0].a ** 2) if axes == 0 else adapters[0].a}


class TestObservablesOfAProblem:
    start = gaussian_init(KEY, Watched(), rank=2, alpha=0.1)

    def test_they_are_recorded_by_flow_descent_and_sweep(self):
        flow = solve(Watched(), self.start, t1=1.0, saves=3, solver="Tsit5", save_adapters=True)
        np.testing.assert_allclose(flow.observables["trace"], jnp.sum(flow.history[0].a ** 2, axis=(1, 2)))
        steps = descend(Watched(), self.start, steps=3, step=0.1, save_adapters=True)
        np.testing.assert_allclose(steps.observables["trace"], jnp.sum(steps.history[0].a ** 2, axis=(1, 2)))

    @pytest.mark.parametrize(
        ("named", "message"),
        [
            (("loss", 0), "the problem's observables must have names of their own, got loss"),
            (("step_size", 0), "the problem's observables must have names of their own, got step_size"),
            (("trace", 2), "the observable 'trace' of the problem must be a scalar, got shape"),
        ],
    )
    def test_they_take_no_others_place(self, named, message):
        with pytest.raises(InputError, match=f"^{message}"):
            solve(Watched(named=named), self.start, t1=1.0, saves=3, solver="Tsit5")


def test_lora_schemes_are_there_for_thin_layers_of_a_network():
    problem = LinearNetwork(TARGETS["white"])
    assert spectral_init(KEY, problem, rank=3, alpha=0.1)[0].rank == 3
    assert gaussian_init(KEY, problem, rank=50, alpha=0.1)[0].rank == 50
    with pytest.raises(InputError, match="must know its pretrained weights"):
        pissa_init(KEY, problem, rank=2, alpha=1.0)


class TestCommandLine:
    @pytest.mark.long
    def test_a_network_is_swept_stored_and_drawn(self, tmp_path, capsys):
        network = "--problem network --samples 4 --n 8 --m 2 --init gaussian-both:4 invariant"
        grid = "--alpha 0.5 --rank 20 --seeds 2 --t1 300 --saves 21"
        assert main(["sweep", *network.split(), *grid.split(), "--out", str(tmp_path / "run")]) == 0
        told = capsys.readouterr().out
        assert "LinearNetwork: n = 8, m = 2; X of rank 4" in told
        dataset = load_run(tmp_path / "run")
        assert float(dataset["distance"].sel(init="invariant").isel(time=-1).max()) < 1e-8
        assert list((tmp_path / "run" / "figures").glob("*.png"))
        assert main(["sweep", "--out", str(tmp_path / "run"), "--resume"]) == 0

    @pytest.mark.long
    def test_pretraining_is_an_axis(self, tmp_path, capsys):
        problem = "--problem pretrained --m 5 --n 5 --h 20 --pretraining gaussian-both:0.01 balanced"
        assert main(["sweep", *problem.split(), "--alpha", "1e-3", "--t1", "1", "--out", str(tmp_path / "run")]) == 0
        dataset = load_run(tmp_path / "run")
        ratio = dataset["sigma_w1"] / dataset["sigma_w2"]
        assert list(dataset["pretraining"].values) == ["gaussian-both:0.01", "balanced"]
        assert float(ratio.sel(pretraining="gaussian-both:0.01")) < 0.8
        np.testing.assert_allclose(ratio.sel(pretraining="balanced"), 1.0, atol=1e-3)
        assert not [path for path in (tmp_path / "run" / "figures").iterdir() if ":" in path.name]

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--problem", "network", "--h", "5"], "h must be left out with problem 'network', got 5"),
            (["--problem", "network", "--angle", "5"], "angle must be left out with problem 'network', got (5.0,)"),
            (["--problem", "network", "--init", "gaussian-both:x"], "init must have a number after the colon"),
            (["--problem", "network", "--rank", "0"], "rank must be at least 1, got 0"),
            (
                ["--problem", "aligned", "--pretraining", "balanced"],
                "pretraining must be left out with problem 'aligned'",
            ),
            (["--problem", "pretrained", "--pretraining", "gausian"], "pretraining: init must be 'gaussian', "),
        ],
    )
    def test_bad_flags_are_named_in_one_line(self, flags, message, tmp_path, capsys):
        assert main(["sweep", *flags, "--out", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"lora-flow: {message}")
        assert said.count("\n") == 1
        assert not (tmp_path / "run").exists()

"""Starts as small as the floating-point type has, losses without a scale, and runs that cannot go on."""

import subprocess
import sys

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from scipy.integrate import solve_ivp

from lora_flow import (
    Adapter,
    Factorization,
    ScaledGD,
    SingleLayer,
    aligned_problem,
    analyse,
    canonical,
    gaussian_init,
    load_run,
    loram_init,
    solve,
    sweep,
)
from lora_flow.dynamics.descend import MuKlabjan
from lora_flow.dynamics.measurements import Direction, measure
from lora_flow.dynamics.observables import observables
from lora_flow.dynamics.solve import STATUS
from lora_flow.initialization.directions import frame_of

TINY = {"single": (1e-20, 1e-23, 1e-30), "double": (1e-160, 1e-200)}
SIZES = {"m": 4, "n": 5, "h": 6}


def drawn(alpha, single=False):
    """A problem and a start, as they are drawn in one precision, in double precision."""
    with jax.enable_x64(not single):
        problem = aligned_problem(jax.random.key(0), **SIZES)
        start = gaussian_init(jax.random.key(0), problem, rank=2, alpha=alpha)
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), float), (problem, start))


def in_double(problem, start, t1=10.0):
    return solve(problem, start, t1=t1, saves=201)


@pytest.fixture(scope="module")
def in_single():
    with jax.enable_x64(False):
        problem = aligned_problem(jax.random.key(0), **SIZES)
        return sweep(problem, alpha=TINY["single"], rank=2, t1=10.0, saves=201, progress=False)


@pytest.mark.parametrize("alpha", TINY["single"])
def test_single_precision_follows_tiny_starts_as_double_precision_does(in_single, alpha):
    """Squares of single precision underflow below 1e-19: errors were then 0, and steps without a bound."""
    doubled = in_double(*drawn(alpha, single=True))
    expected = {name: np.asarray(values) for name, values in doubled.observables.items()}
    run = in_single.sel(alpha=alpha).squeeze()
    assert run["status"] == 0
    assert run["steps"] < 500
    lane = {name: run[name].values for name in expected}
    seen = expected["loss"] > 1e-8 * expected["loss"][0]
    assert 40 < np.sum(seen) < 140
    assert np.max(np.abs(np.log10(lane["loss"] / expected["loss"]))[seen]) < 0.05
    for name in ("norm_z1", "norm_along2"):
        np.testing.assert_allclose(lane[name][seen], expected[name][seen], rtol=0.02, err_msg=name)
    early = slice(0, 20)  # until the rest of Z has grown away from what is across
    np.testing.assert_allclose(lane["norm_across2"][early], expected["norm_across2"][early], rtol=0.05)
    sines = (np.sqrt(of["alignment_error"][early]) for of in (lane, expected))  # over sqrt(2), of rounded directions
    np.testing.assert_allclose(*sines, rtol=0.025, atol=2 * np.finfo(np.float32).eps)  # one for each of two roundings


def test_the_command_line_in_single_precision_follows_tiny_starts(tmp_path):
    """For as long as the others of this file, and until the loss is at rounding."""
    alphas = TINY["single"]
    flags = f"--precision single --t1 20 --saves 201 --rank 2 --m 4 --n 5 --h 6 --out {tmp_path / 'run'}"
    script = "from lora_flow.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", script, "sweep", *flags.split(), "--alpha", *map(str, alphas)]
    subprocess.run(command, check=True, capture_output=True)
    run = load_run(tmp_path / "run").squeeze()
    for alpha in alphas:
        problem, start = drawn(alpha, single=True)
        doubled = in_double(problem, start, t1=20.0)
        lane, expected = run.sel(alpha=alpha), np.asarray(doubled.observables["loss"])
        assert lane["status"] == 0
        seen = expected > 1e-8 * expected[0]
        assert np.max(np.abs(np.log10(lane["loss"].values / expected))[seen]) < 0.05
        assert lane["loss"].values[-1] < 1e-8 * expected[0]


def test_what_is_small_grows_in_proportion_to_its_start():
    """The flow is linear there; 1e-100 has squares in double precision, the others have not."""
    of = {alpha: in_double(*drawn(alpha)) for alpha in (1e-100, *TINY["double"])}
    for alpha in TINY["double"]:
        assert of[alpha].status == 0
        for name in ("norm_z1", "norm_z2", "norm_across1"):
            grown, expected = (of[scale].observables[name][:40] / scale for scale in (alpha, 1e-100))
            np.testing.assert_allclose(grown, expected, rtol=5e-3, err_msg=name)
        for name in ("alignment_error", "alignment_error_2"):
            np.testing.assert_allclose(of[alpha].observables[name], of[1e-100].observables[name], rtol=5e-3, atol=1e-28)
        drift, expected = (of[scale].observables["drift"] for scale in (alpha, 1e-100))
        np.testing.assert_allclose(drift, expected, rtol=1e-5, atol=1e-13)


def test_observables_of_tiny_adapters_are_those_of_larger_ones_scaled():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 3)), rng.normal(size=(4, 2))
    direction = (Direction(jnp.eye(4)[0], jnp.eye(3)[0]),)

    @jax.jit
    def seen(a_scale, b_scale):
        both = [measure((Adapter(s * a_scale * a, b_scale * b),), direction) for s in (1.0, 1.5)]
        return observables(jax.tree.map(lambda x, y: jnp.stack([x, y]), *both))

    plain, tiny, uneven = seen(1.0, 1.0), seen(1e-180, 1e-180), seen(1e-180, 1.0)
    for name in ("alignment_error", "drift"):
        np.testing.assert_allclose(tiny[name], plain[name], rtol=1e-12)
    for name in ("norm_z1", "norm_along1", "norm_across1"):
        np.testing.assert_allclose(tiny[name], 1e-180 * plain[name], rtol=1e-12)
    np.testing.assert_allclose(uneven["norm_b1a1"], 1e-180 * plain["norm_b1a1"], rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-170, 1e-90])
def test_what_is_analysed_of_tiny_adapters_is_that_of_larger_ones_scaled(scale):
    """The flow is linear there; 1e-12 is small enough, and its squares hold."""
    rng = np.random.default_rng(2)
    problem = aligned_problem(jax.random.key(0), **SIZES)
    shapes = [((2, n_in), (n_out, 2)) for n_out, n_in in problem.layers]
    start = tuple(Adapter(rng.normal(size=a), rng.normal(size=b)) for a, b in shapes)
    tiny, small = (analyse(problem, jax.tree.map(lambda leaf, by=by: by * leaf, start)) for by in (scale, 1e-12))
    for name in ("growth_rate_1", "growth_rate_2", "alignment_error", "update_alignment_error", "loss_signal"):
        np.testing.assert_allclose(tiny[name], small[name], rtol=1e-10, err_msg=name)
    np.testing.assert_allclose(tiny["gradient_norm"] / scale, small["gradient_norm"] / 1e-12, rtol=1e-10)
    for name in ("term_1", "term_2", "update_singular_values"):  # products of two factors, which may be 0
        expected = (scale / 1e-12) ** 2 * small[name] if scale > 1e-150 else np.zeros_like(small[name])
        np.testing.assert_allclose(tiny[name], expected, rtol=1e-10, atol=1e-12 * np.max(expected), err_msg=name)


@pytest.mark.parametrize("scale", [1e-170, 1e70])
def test_starts_from_weights_of_any_scale(scale):
    """LoRAM's size is the root of the weight's; the frame of OLoRA has none."""
    w = np.random.default_rng(3).normal(size=(4, 5))
    scaled = Factorization(w1=scale * w, w2=np.eye(4), shift=np.ones((4, 5)))
    plain = Factorization(w1=w, w2=np.eye(4), shift=np.ones((4, 5)))
    starts = (loram_init(jax.random.key(0), problem, rank=2, alpha=1.0) for problem in (scaled, plain))
    for got, expected in zip(*(start[0] for start in starts), strict=True):
        np.testing.assert_allclose(got / np.sqrt(scale), expected, rtol=1e-12)
    np.testing.assert_allclose(frame_of(scale * w, 4), frame_of(w, 4), rtol=1e-12)


def test_the_size_of_a_zero_weight_has_a_finite_derivative():
    def size(w1):
        problem = Factorization(w1=w1, w2=jnp.eye(3), shift=jnp.ones((3, 3)))
        return jnp.sum(loram_init(jax.random.key(0), problem, rank=2, alpha=1.0)[0].a)

    assert jnp.isfinite(jax.grad(size)(jnp.zeros((3, 3)))).all()


@pytest.mark.parametrize("scale", [1e-170, 1e-30])
def test_canonical_coordinates_of_tiny_weights_are_those_of_larger_ones_scaled(scale):
    plain = aligned_problem(jax.random.key(0), **SIZES)
    tiny = Factorization(w1=scale * plain.w1, w2=plain.w2, shift=plain.shift)
    scaled, expected = (canonical(problem, rank=2).problem for problem in (tiny, plain))
    assert type(scaled) is type(expected)
    for name in ("w1", "w2", "shift"):
        by = scale if name == "w1" else 1.0
        one, other = (np.abs(np.asarray(getattr(problem, name))) for problem in (scaled, expected))
        np.testing.assert_allclose(np.sort(one / by, axis=None), np.sort(other, axis=None), rtol=1e-10, atol=1e-13)


class TestTheStepOfMuKlabjan:
    def test_it_is_differentiable_where_the_slope_vanishes(self):
        problem, zero = SingleLayer(np.ones((2, 2))), Adapter(jnp.ones((1, 2)), jnp.ones((2, 1)))
        rule = MuKlabjan()

        @jax.jit
        @jax.value_and_grad
        def size(adapters):
            return rule.size(None, problem, adapters, jnp.zeros((), int))

        value, slope = size((zero,))
        assert value == pytest.approx(1 / (4 * np.sqrt(2) * 4))
        for leaf in jax.tree.leaves(slope):
            np.testing.assert_allclose(leaf, -2 / (4 * np.sqrt(2) * 16), rtol=1e-12)

    def test_slopes_whose_squares_do_not_hold_count(self):
        class Steep(SingleLayer):
            def product_descent(self, adapters):
                return jnp.full((2, 2), 1e200)

        start = (Adapter(jnp.ones((1, 2)), jnp.ones((2, 1))),)
        size = MuKlabjan(1.0).size(None, Steep(np.ones((2, 2))), start, jnp.zeros((), int))
        assert size == pytest.approx(1 / (4 * np.sqrt(2) * 2e200))


def test_the_ranks_of_tiny_factors_are_known():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 3)), rng.normal(size=(4, 2))
    for by in (1.0, 1e-170, 1e170):
        ScaledGD(0.0).check_start((Adapter(by * a, by * b),))
        with pytest.raises(ValueError, match="of rank 1"):
            ScaledGD(0.0).check_start((Adapter(by * a, by * b * np.array([[1, 0]])),))


class Terms(eqx.Module):
    """`fit` 1/2 ||Y - B A||^2 + `size` 1/2 ||B A||^2 + `constant`."""

    y: Array
    fit: Array
    size: Array
    constant: Array

    @property
    def layers(self):
        return (self.y.shape,)

    def loss(self, adapters):
        ((a, b),) = adapters
        return 0.5 * (self.fit * jnp.sum((self.y - b @ a) ** 2) + self.size * jnp.sum((b @ a) ** 2)) + self.constant


LANES = {
    "fit": (1.0, 0.0, 0.0),
    "zero at zero adapters": (0.0, 1.0, 0.0),
    "zero everywhere": (0.0, 0.0, 0.0),
    "below zero": (1.0, 0.0, -100.0),
    "undefined": (np.nan, 0.0, 0.0),
    "infinite": (np.inf, 0.0, 0.0),
    "grows without bound": (0.0, -2.0, 0.0),
}
ONES = (Adapter(jnp.ones((2, 5)), jnp.ones((4, 2))),)


@pytest.fixture(scope="module")
def solved():
    """All of them in one batch, in which none may cost the others its `max_steps`."""
    y = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)))
    coefficients = map(jnp.asarray, zip(*LANES.values(), strict=True))

    @jax.vmap
    def lane(fit, size, constant):
        return solve(Terms(y, fit, size, constant), ONES, t1=1.0, saves=5, max_steps=2000)

    batch = lane(*coefficients)
    return {name: jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], batch) for i, name in enumerate(LANES)}


class TestLossesWithoutAScale:
    def test_each_ends_as_what_it_is(self, solved):
        ended = {name: STATUS[int(one.status)] for name, one in solved.items()}
        lost = {"undefined", "infinite", "grows without bound"}
        assert ended == {name: "failed" if name in lost else "success" for name in LANES}
        assert solved["undefined"].stats["num_steps"] == solved["infinite"].stats["num_steps"] == 1
        assert max(int(one.stats["num_steps"]) for one in solved.values()) < 300

    def test_the_start_is_saved_where_nothing_else_is(self, solved):
        for name, first in (("grows without bound", -80.0), ("infinite", np.inf), ("undefined", np.nan)):
            np.testing.assert_array_equal(solved[name].observables["loss"], [first, *[np.nan] * 4])
            np.testing.assert_array_equal(solved[name].initial_loss, first)
        lost = solved["grows without bound"].observables
        np.testing.assert_allclose(lost["norm_z1"], [np.sqrt(18.0), *[np.nan] * 4], rtol=1e-12)

    def test_the_flow_to_zero_is_that_of_two_numbers(self, solved):
        """B = x 1 and A = y 1 stay so: x' = -10 x y^2 and y' = -8 x^2 y, the loss is 40 x^2 y^2."""
        one = solved["zero at zero adapters"]
        end = solve_ivp(
            lambda t, z: [-10 * z[0] * z[1] ** 2, -8 * z[0] ** 2 * z[1]],
            (0, 1),
            [1.0, 1.0],
            t_eval=np.asarray(one.times),
            method="DOP853",
            rtol=1e-12,
            atol=1e-14,
        )
        assert end.y[0, -1] < 0.2
        error = np.log10(np.asarray(one.observables["loss"]) / (40 * end.y[0] ** 2 * end.y[1] ** 2))
        assert np.max(np.abs(error)) < 0.005

    def test_a_constant_moves_nothing(self, solved):
        np.testing.assert_allclose(
            solved["below zero"].observables["loss"], solved["fit"].observables["loss"] - 100.0, rtol=1e-6
        )
        np.testing.assert_array_equal(solved["zero everywhere"].adapters[0].a, ONES[0].a)

    def test_a_run_whose_end_is_not_finite_failed_wherever_its_saves_lie(self):
        """With steps of a fixed length nothing stops it: saved is what comes before it overflows."""
        lost = Terms(jnp.zeros((4, 5)), *map(jnp.asarray, LANES["grows without bound"]))
        fixed = {"solver": diffrax.Euler(), "stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.1}
        run = solve(lost, ONES, t1=1.0, saves=[0.0, 0.1], **fixed)
        assert jnp.isfinite(run.observables["loss"]).all()
        assert not jnp.isfinite(run.adapters[0].a).all()
        assert STATUS[int(run.status)] == "failed"

"""The level below which a loss is rounding: what it is, that converged runs lie below it, and how it is told."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import xarray as xr

from lora_flow import (
    Adapter,
    Offset,
    SingleLayer,
    SoftmaxRegression,
    aligned_problem,
    canonical,
    descend,
    gaussian_init,
    rounding_floor,
    solve,
    spectral_init,
    sweep,
    zero_adapters,
)
from lora_flow.experiments import lora_one as toys
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.levels import clipped, told

KEY = jax.random.key(0)
EPS = np.finfo(float).eps
SMALL = {"m": 4, "n": 5, "h": 6}


class OfOnes:
    """1/2 ||B A||^2, which has no loss without adapters."""

    layers = ((3, 2),)

    def loss(self, adapters):
        ((a, b),) = adapters
        return 0.5 * jnp.sum((b @ a) ** 2)


def test_it_is_relative_to_what_is_to_be_learned_or_to_what_the_adapters_make():
    problem = aligned_problem(KEY, **SMALL)
    start = gaussian_init(KEY, problem, rank=2, alpha=1e-3)
    expected = (100 * EPS) ** 2 * 0.5 * np.sum(np.asarray(problem.shift) ** 2)
    np.testing.assert_allclose(rounding_floor(problem, start), expected, rtol=1e-12)
    layer = SingleLayer(np.ones((3, 2)))
    large = (Adapter(jnp.full((1, 2), 10.0), jnp.full((3, 1), 10.0)),)
    for one in (layer, Offset(layer, large)):  # 99^2 in each of six entries
        np.testing.assert_allclose(rounding_floor(one, large), (100 * EPS) ** 2 * 0.5 * 6 * 99**2, rtol=1e-12)
    ones = (Adapter(jnp.ones((2, 2)), jnp.ones((3, 2))),)
    np.testing.assert_allclose(rounding_floor(OfOnes(), ones), (100 * EPS) ** 2 * 0.5 * 6 * 4, rtol=1e-12)


def test_it_is_of_the_precision_in_use():
    with jax.enable_x64(False):
        problem = aligned_problem(KEY, **SMALL)
        floor = rounding_floor(problem, zero_adapters(problem.layers, 1))
    np.testing.assert_allclose(floor, (100 * np.finfo(np.float32).eps) ** 2 * 12.5, rtol=1e-5, atol=0)


def test_a_cross_entropy_is_known_to_eps_not_to_its_square():
    problem = SoftmaxRegression(np.eye(2), np.array([0, 1]), np.zeros((2, 2)))
    np.testing.assert_allclose(rounding_floor(problem, zero_adapters(problem.layers, 1)), 100 * EPS, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_above_its_floor_a_cross_entropy_is_known_to_a_hundredth_of_it(size):
    """Against 60 digits, for logits of that size: one that is twice the floor, and one that is far above it."""
    rng = np.random.default_rng(0)
    for gap in (-np.log(200 * EPS), 10.0):
        logits = size + rng.normal(size=(4, 3))
        logits[0] = logits[1:].max(0) + gap
        problem = SoftmaxRegression(np.eye(3), np.zeros(3, int), logits)
        start = zero_adapters(problem.layers, 1)
        with mpmath.workdps(60):
            sums = [mpmath.fsum(mpmath.exp(mpmath.mpf(z) - mpmath.mpf(row[0])) for z in row) for row in logits.T]
            exact = float(mpmath.fsum(map(mpmath.log, sums)) / 3)
        assert exact > float(rounding_floor(problem, start))
        np.testing.assert_allclose(problem.loss(start), exact, rtol=0, atol=max(EPS, 1e-14 * exact))


@pytest.mark.parametrize("coordinates", ["given", "canonical"])
def test_runs_that_have_converged_lie_below_it(coordinates):
    problem = aligned_problem(KEY, **SMALL)
    start = spectral_init(KEY, problem, rank=2, alpha=1e-2)
    if coordinates == "canonical":
        turned = canonical(problem, rank=2)
        problem, (start, _) = turned.problem, turned.enter(start)
    run = solve(problem, start, t1=12.0)
    assert float(run.observables["loss"][50:].max()) < float(run.rounding_floor)
    assert "-> at rounding" in str(run)


def test_an_offset_start_of_large_factors_rounds_at_their_size():
    """A weight 1e4 times the shift is subtracted and added again: the loss ends far above (100 eps)^2 of its start."""
    drawn = {}
    for seed in range(6):
        rng = np.random.default_rng(seed)
        drawn[seed] = SingleLayer(rng.normal(size=(4, 5)), weight=1e4 * rng.normal(size=(4, 5)))
    run = sweep(drawn, init="pissa", rank=4, alpha=1.0, t1=5e-2, progress=False).squeeze()
    last = run["loss"].isel(time=slice(50, None)).max("time")
    assert ((100 * EPS) ** 2 * run["initial_loss"] < last).all()
    assert (last < run["rounding_floor"]).all()
    assert (last > 1e-4 * run["rounding_floor"]).all()
    assert (run["rounding_floor"] < 1e-14 * run["initial_loss"]).all()


def test_gradient_descent_has_it_too():
    problem = SingleLayer(np.eye(3))
    start = (Adapter(jnp.eye(3), 0.5 * jnp.eye(3)),)
    run = descend(problem, start, steps=400, step=0.2)
    np.testing.assert_allclose(run.rounding_floor, (100 * EPS) ** 2 * 1.5, rtol=1e-12, atol=0)
    assert float(run.observables["loss"][-1]) < float(run.rounding_floor)
    assert "-> at rounding" in str(run)


def test_results_that_do_not_hold_it_get_it_from_their_largest_loss():
    loss = xr.DataArray([[4.0, 1.0, 1e-40]], dims=("seed", "time"))
    np.testing.assert_allclose(rounding_floors(xr.Dataset({"loss": loss})), (100 * EPS) ** 2 * 4, rtol=1e-12, atol=0)
    single = xr.Dataset({"loss": loss}, attrs={"dtype": "float32"})
    np.testing.assert_allclose(rounding_floors(single), (100 * np.finfo(np.float32).eps) ** 2 * 4, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ([1e-12, 1e-14], "-13.00 ± 1.00"),
        ([1e-12], "-12.00"),
        ([1e-12, np.nan], "-12.00"),
        ([0.0, 1e-70], "at rounding"),
        ([1e-12, 1e-14, 1e-29, 0.0], "-13.00 ± 1.00, 2 of 4 at rounding"),
        ([np.nan], "-"),
    ],
)
def test_losses_are_told_above_it(losses, text):
    assert told(np.array(losses), 1e-27) == text


def test_what_is_drawn_is_not_below_it():
    loss = xr.DataArray([[1.0, 1e-30], [1.0, np.nan]], dims=("seed", "time"))
    shown = clipped(loss, xr.DataArray([1e-27, 1e-27], dims="seed"))
    np.testing.assert_array_equal(shown, [[1.0, 1e-27], [1.0, np.nan]])


@pytest.mark.parametrize("stored", [True, False])
def test_a_study_tells_risks_below_it_as_at_rounding(stored):
    """Of a folder of an older version, too, which holds no floor."""
    dims = ("inputs", "init", "flow", "seed", "iteration")
    coordinates = {"inputs": list(toys.INPUTS), "init": ["lora-one-theory", "lora-ga"], "flow": ["plain", "scaled"]}
    risk = np.broadcast_to([1.0, 1e-30], (2, 2, 2, 3, 2))
    told = {"risk": (dims, risk), "floor": (("inputs", "init", "seed"), np.zeros((2, 2, 3)))}
    told |= {"rounding_floor": (("inputs", "init", "seed"), np.full((2, 2, 3), 1e-27))} if stored else {}
    notes = toys.preconditioning_notes(xr.Dataset(told, coords=coordinates))
    assert notes.count("at rounding") == 8
    assert "-69" not in notes

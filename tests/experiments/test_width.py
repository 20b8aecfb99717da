"""Where wide linear networks end, and how well conditioned they begin, at sizes at which the flow takes seconds."""

import jax
import numpy as np
import pytest
import xarray as xr

from lora_flow import LinearNetwork
from lora_flow.experiments import width
from lora_flow.initialization import gaussian_wide_init, invariant_init

pytestmark = pytest.mark.long

KEY = jax.random.key(0)
WIDTHS = width.Sizes(samples=8, inputs=20, widths=(200, 3200), side=4, condition_widths=(1000, 2000, 16000))


@pytest.fixture(scope="module")
def widened():
    return width.run(4, lambda items: items, WIDTHS)


def test_the_results_have_the_dims_that_are_promised(widened):
    assert dict(widened.sizes) == {"seed": 4, "p": 2, "width": 2, "condition_p": 3, "condition_width": 3}
    assert widened["distance"].dims == widened["theorem2"].dims == ("seed", "p", "width")
    assert widened["invariant"].dims == ("seed", "width")
    assert widened["ratio"].dims == widened["b2"].dims == ("seed", "condition_p", "condition_width")


def test_the_end_comes_to_the_solution_of_least_norm_as_the_root_of_the_width(widened):
    found = width.exponents(widened["distance"], "width").mean("seed")
    np.testing.assert_allclose(found, 0.5 - 2 * np.array(width.POWERS), atol=0.1)
    assert bool((widened["distance"] <= widened["theorem2"]).all())


def test_the_invariant_start_ends_at_it_and_random_ones_do_not(widened):
    assert float(widened["invariant"].max()) < 1e-8
    assert float(widened["distance"].min()) > 1e-3


@pytest.mark.parametrize("init", [gaussian_wide_init, invariant_init])
def test_distances_are_those_of_the_whole_network(init):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((3, 7)), rng.standard_normal((3, 1))
    problem, start = LinearNetwork(y, x), init(KEY, LinearNetwork(y, x), rank=20, alpha=0.7)
    x_seen, y_seen, _, _ = problem.network(start)
    _, whole = width._solve(problem, start)
    found = width._distance(problem, LinearNetwork(y_seen, x_seen), start)
    np.testing.assert_allclose(found, problem.observe(whole)["distance"], rtol=1e-6, atol=1e-12)


def test_conditions_come_to_one_the_sooner_the_smaller_p(widened):
    ratio = widened["ratio"]
    assert bool((ratio.diff("condition_width") > 0).all())
    assert bool((ratio.mean("seed").diff("condition_p") < 0).all())
    assert float(ratio.max()) < 1
    fall = width.exponents(1 - ratio.isel(condition_width=slice(1, None)), "condition_width").mean("seed")
    bounds = 2 * np.array(width.CONDITION_POWERS) - 1
    assert bool((fall <= bounds + 0.05).all()), "Theorem 3.3"


def test_exponents_are_those_of_power_laws():
    h = np.array([10.0, 30.0, 1000.0])
    values = xr.DataArray(np.array([2 * h**-0.3, 5 * h]), dims=("case", "h"), coords={"h": h})
    np.testing.assert_allclose(width.exponents(values, "h"), [-0.3, 1.0], rtol=1e-12)


def test_the_report_has_both_tables(widened, reported):
    report = reported("width", widened)
    assert report.count("\n| --- |") == 2
    assert "nan" not in report
    assert "which is rounding" in report


def test_the_published_experiment_of_widths():
    """Min et al. 2021: exponent -1/2 within .1, with the invariant start at X^+ Y at every width."""
    found = width.run(2, lambda items: items, width.FULL._replace(widths=(500, 4000), condition_widths=(500, 1000)))
    slopes = width.exponents(found["distance"].sel(p=0.5), "width")
    np.testing.assert_allclose(slopes, -0.5, atol=0.1)
    assert float(found["invariant"].max()) < 1e-8

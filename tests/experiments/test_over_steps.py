"""Runs over the product of axes, and what is taken from curves over iterations."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

from lora_flow import gaussian_both_init
from lora_flow.experiments.over_steps import curves, first_iteration, middle, over
from lora_flow.problems.network import LinearNetwork


def test_every_point_is_in_its_place_and_progress_is_of_the_first_axis():
    seen = []

    def progress(items):
        for item in items:
            seen.append(item)
            yield item

    def one(letter, number):
        curve = number * np.arange(3.0)
        return {"curve": curve, "end": curve[-1]} if letter == "a" else {"curve": -curve}

    found = over(one, {"letter": ["a", "b"], "number": (1, 2)}, progress)
    assert seen == ["a", "b"]
    assert found["curve"].dims == ("letter", "number", "iteration")
    assert found["end"].dims == ("letter", "number")
    np.testing.assert_array_equal(found["curve"].sel(letter="b", number=2), [0.0, -2.0, -4.0])
    np.testing.assert_array_equal(found["end"], [[2.0, 4.0], [np.nan, np.nan]])


def test_curves_are_of_every_iteration_with_what_is_seen_there():
    """On a scalar product a b towards 1: the loss is (1 - a b)^2/2, and gradient descent is by hand."""
    problem = LinearNetwork(np.ones((1, 1)))
    ((a, b),) = start = gaussian_both_init(jax.random.key(0), problem, rank=1, alpha=0.5)
    found = curves(
        problem,
        start,
        jnp.asarray(0.1),
        3,
        lambda adapters, loss, step: {"a": adapters[0].a[0, 0], "both": loss + step},
    )
    a, b, losses, first = float(a[0, 0]), float(b[0, 0]), [], []
    for _ in range(4):
        error = 1 - a * b
        losses.append(0.5 * error**2)
        first.append(a)
        a, b = a + 0.1 * error * b, b + 0.1 * error * a
    np.testing.assert_allclose(found["loss"], losses, rtol=1e-12)
    np.testing.assert_allclose(found["a"], first, rtol=1e-12)
    np.testing.assert_allclose(found["both"], found["loss"] + found["step"], rtol=1e-12)


def test_the_first_iteration_is_the_median_of_the_draws_and_infinite_for_most_that_never_come_there():
    below = xr.DataArray([[0, 1, 1], [0, 0, 1], [0, 0, 0]], dims=("seed", "iteration")).astype(bool)
    assert float(first_iteration(below)) == 2
    assert float(first_iteration(below.isel(seed=[1, 2, 2]))) == np.inf


def test_the_middle_is_drawn_where_every_draw_is():
    values = xr.DataArray(
        [[1.0, 2.0], [3.0, np.nan], [5.0, 6.0]], dims=("seed", "iteration"), coords={"iteration": [0, 1]}
    )
    ax = plt.subplots()[1]
    middle(ax, values, color="red")
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_ydata(), [3.0, np.nan])
    assert line.get_color() == "red"
    plt.close(ax.figure)

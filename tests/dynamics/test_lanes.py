"""Many starts in one program: each lane is what `solve` makes of it alone."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import Adapter, InputError, SingleLayer, solve
from lora_flow.dynamics.lanes import finished, solve_lanes, stack

TIMES = np.linspace(0.0, 3.0, 5)
HOW = {"solver": "Tsit5", "rtol": 1e-9}
LEAN = {**HOW, "keep": ("loss",)}


def start(seed):
    rng = np.random.default_rng(seed)
    return (Adapter(jnp.asarray(rng.normal(size=(2, 4))), jnp.asarray(rng.normal(size=(3, 2)))),)


def layer(seed):
    return SingleLayer(np.random.default_rng(seed).normal(size=(3, 4)))


def alone(problem, one, times=TIMES):
    return solve(problem, one, t1=times[-1], saves=times, **HOW)


def test_lanes_are_solved_as_each_is_alone_and_only_what_is_wanted_is_kept():
    starts = stack([stack([start(3 * i + j) for j in range(3)]) for i in range(2)])
    run = solve_lanes(layer(9), starts, TIMES, save_adapters=True, **LEAN)
    assert set(run.observables) == {"loss"}
    assert str(run) == "Trajectory of 6 lanes (6 success), 5 times"
    ((a, b),) = run.history
    assert (a.shape, b.shape) == ((2, 3, 5, 2, 4), (2, 3, 5, 3, 2))
    losses = 0.5 * np.sum((np.asarray(layer(9).shift) - np.asarray(b @ a)) ** 2, axis=(-2, -1))
    np.testing.assert_allclose(run.observables["loss"], losses, rtol=1e-9)
    for i, j in np.ndindex(2, 3):
        expected = alone(layer(9), start(3 * i + j))
        np.testing.assert_allclose(losses[i, j], expected.observables["loss"], rtol=1e-6)


def test_each_lane_has_its_problem_and_its_times():
    starts = stack([start(i) for i in range(3)])
    problems = stack([layer(i) for i in range(3)])
    times = np.array([1.0, 2.0, 0.5])[:, None] * TIMES
    run = solve_lanes(problems, starts, times, each=True, **LEAN)
    np.testing.assert_allclose(run.times, times, rtol=1e-15)
    for i in range(3):
        expected = alone(layer(i), start(i), times[i])
        np.testing.assert_allclose(run.observables["loss"][i], expected.observables["loss"], rtol=1e-6)


def test_lanes_that_do_not_finish_raise_where_asked():
    starts = stack([start(i) for i in range(3)])
    few = {**LEAN, "max_steps": 2}
    run = solve_lanes(layer(9), starts, TIMES, **few)  # the same program as below
    assert np.all(run.status == 1)
    with pytest.raises(RuntimeError, match=r"^3 of 3 lanes did not come to their end: 3 max_steps$"):
        solve_lanes(layer(9), starts, TIMES, throw=True, **few)
    one = eqx.tree_at(lambda run: run.status, run, np.array([0, 2, 1]))
    with pytest.raises(RuntimeError, match=r"^2 of 3 lanes did not come to their end: 1 max_steps, 1 failed$"):
        finished(one)
    done = eqx.tree_at(lambda run: run.status, run, np.zeros(3, int))
    assert finished(done) is done


def test_a_start_without_lanes_is_refused():
    with pytest.raises(InputError, match=r"^starts must have axes of lanes in front, got shape \(2, 4\)$"):
        solve_lanes(layer(9), start(0), TIMES)

"""The benchmarks' own arithmetic: what counts as an error, how times are summed up, where tables go."""

import numpy as np
import pytest

from benchmarks.peers import jax_peers
from benchmarks.races import RACES
from benchmarks.report import filled
from benchmarks.tasks import Task, error, figure1, stiff_tail
from benchmarks.timing import interleaved
from lora_flow import Factorization


def test_an_error_is_the_worst_over_lanes_and_times_above_the_floor():
    reference = np.array([[1.0, 1e-10, 1e-21], [2.0, 1e-5, 1e-6]])
    assert error(reference, reference) == 0
    np.testing.assert_allclose(error(reference * [[1, 1, 1e9], [1, 10**0.03, 1]], reference), 0.03)
    assert error(np.where(reference == 1e-10, np.nan, reference), reference) == np.inf
    assert error(np.where(reference == 1e-10, 0.0, reference), reference) == np.inf


def test_rounds_go_round_and_a_slow_call_leaves_when_its_budget_is_spent():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert interleaved(calls, rounds=3, budget=10.0)["a"]["rounds"] == 3
    assert order == list("ababab")
    assert interleaved(calls, rounds=3, budget=1e-12)["a"]["rounds"] == 1


def test_tasks_are_what_the_page_says():
    task = figure1(2)
    assert (task.rank, task.alphas, task.t1, len(task.times)) == (4, (1e-3, 1e-4, 1e-5), 5.0, 101)
    assert task.starts[0].b.shape == (6, 100, 4)
    assert not np.any(task.starts[0].a)
    stiff = stiff_tail(1e4).problem
    assert not stiff.spectrum()["aligned"]
    assert len(stiff.spectrum()["sigma_shift"]) == 4


def test_a_page_keeps_the_tables_that_are_not_measured_again():
    page = "<!-- table a -->\nold\n<!-- end -->\n"
    assert filled(page, [{"machine": {}, "jobs": {}}]) == page


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_peer_has_the_coordinates_without_the_step_control(name):
    told = [peer.name for peer in RACES[name](True).peers]
    assert "diffrax Dopri8 in canonical coordinates" in told
    assert "diffrax Dopri8, plain vmap" in told


def test_in_canonical_coordinates_the_losses_are_the_same():
    problem = Factorization(*(np.random.default_rng(0).normal(size=size) for size in ((9, 5), (4, 9), (4, 5))))
    task = Task(problem, 2, (1e-1, 1e-2), 2, np.linspace(0.0, 1.0, 5))
    (plain,) = (peer for peer in jax_peers.DIFFRAX if "Dopri8" in peer.name)
    reference = plain.prepare(task)(1e-10)
    assert reference.shape == (4, 5)
    np.testing.assert_allclose(jax_peers.DOPRI8_CANONICAL.prepare(task)(1e-10), reference, rtol=1e-6)

"""Narrow starts compute the same, and become wide again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import DeepLinear, LinearNetwork, descend, gaussian_wide_init, narrow, pad, zero_adapters
from lora_flow.coordinates.narrow import Narrow

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
NETWORK = LinearNetwork(RNG.normal(size=(6, 3)), RNG.normal(size=(6, 5)))


def start_of(rank):
    return gaussian_wide_init(KEY, NETWORK, rank=rank, alpha=1.0)


def assert_close(ours, theirs, atol=1e-13):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


@pytest.mark.parametrize(("rank", "inside"), [(3, 8), (8, 8), (40, 8)])
def test_there_and_back(rank, inside):
    """Starts of all widths have one shape in there, and the product, the field and the start itself are the same.

    They leave with the width that the coordinates were made for, and zeros in the directions that they had not.
    """
    (coordinates,) = Narrow.of([NETWORK], rank=40)
    start = start_of(rank)
    entered, bases = coordinates.enter(start)
    assert entered[0].rank == coordinates.rank == inside
    assert_close(coordinates.leave(entered, bases), pad(start, 40))
    assert_close(entered[0].b @ entered[0].a, start[0].b @ start[0].a)
    assert_close(
        coordinates.leave(coordinates.problem.field(entered), bases), pad(NETWORK.field(start), 40), atol=1e-12
    )
    assert_close(narrow(start)[0].a, entered[0].a[: narrow(start)[0].rank], atol=0)


def test_a_descent_ends_at_the_same_wide_adapters():
    (coordinates,) = Narrow.of([NETWORK], rank=40)
    entered, bases = coordinates.enter(start_of(40))
    ends = [descend(NETWORK, one, steps=50, step=0.02, saves=2).adapters for one in (entered, start_of(40))]
    assert float(jnp.abs(ends[1][0].a - start_of(40)[0].a).max()) > 0.1
    assert_close(coordinates.leave(ends[0], bases), ends[1], atol=1e-11)


def test_lanes_and_layers_of_several_widths():
    problem = DeepLinear([RNG.normal(size=(2, 1)), RNG.normal(size=(3, 2))], RNG.normal(size=(3, 1)))
    (coordinates,) = Narrow.of([problem], rank=9)
    assert coordinates.rank == 5
    rest = jax.tree.map(lambda leaf: RNG.normal(size=(7, *leaf.shape)), zero_adapters(problem.layers, 9))
    entered, bases = coordinates.enter(rest)
    assert [one.a.shape for one in entered] == [(7, 5, 1), (7, 5, 2)]
    assert_close(coordinates.leave(entered, bases), rest)
    assert_close(jax.vmap(problem.loss)(entered), jax.vmap(problem.loss)(rest), atol=1e-11)

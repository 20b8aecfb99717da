"""Coordinates that change nothing, and a kind of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import AbstractProblem, Adapter, InputError, SingleLayer, gaussian_init, pad, solve, sweep
from lora_flow.coordinates.base import Coordinates

KEY = jax.random.key(0)
SHIFT = np.random.default_rng(0).normal(size=(4, 5))


class Backwards(Coordinates):
    """The inputs in the opposite order: shift and A are turned round."""

    changes_problem = True

    @classmethod
    def of(cls, problems, *, rank):
        return tuple(cls(Layer(problem.shift[:, ::-1]), rank) for problem in problems)

    def enter(self, adapters):
        ((a, b),) = pad(adapters, self.rank)
        return (Adapter(a[:, ::-1], b),), None

    def leave(self, adapters, bases):
        ((a, b),) = adapters
        return (Adapter(a[:, ::-1], b),)


class Layer(AbstractProblem):
    """A matrix to learn, of which `details` sees the first input alone."""

    shift: jax.Array

    coordinates = Backwards

    @property
    def layers(self):
        return (self.shift.shape,)

    def loss(self, adapters):
        ((a, b),) = adapters
        return 0.5 * jnp.sum((self.shift - b @ a) ** 2)

    def details(self, adapters):
        return {"term_1": np.linalg.norm(adapters[0].a[..., 0], axis=-1)}


HOW = {"alpha": 0.3, "t1": 2.0, "saves": 5, "rtol": 1e-10, "solver": "Tsit5"}


def test_these_change_nothing_but_the_padding():
    problem = SingleLayer(SHIFT)
    start = gaussian_init(KEY, problem, rank=2, alpha=1.0)
    (coordinates,) = Coordinates.of([problem], rank=3)
    assert coordinates.problem is problem
    assert not coordinates.changes_problem
    entered, bases = coordinates.enter(start)
    for ours, theirs in zip(coordinates.leave(entered, bases), pad(start, 3), strict=True):
        np.testing.assert_array_equal(ours.a, theirs.a)
        np.testing.assert_array_equal(ours.b, theirs.b)
    with pytest.raises(InputError, match="rank must be at least 2"):
        Coordinates.of([problem], rank=1)[0].enter(start)


def test_a_sweep_is_solved_in_the_coordinates_that_a_problem_names():
    """The details are of adapters that have left the coordinates again, the losses those of the plain problem."""
    problem = Layer(jnp.asarray(SHIFT))
    swept = sweep({0: problem, 1: Layer(2 * problem.shift)}, rank=(1, 2), details=True, **HOW)
    start = gaussian_init(KEY, problem, rank=1, alpha=0.3)
    run = solve(problem, start, **{name: HOW[name] for name in HOW if name != "alpha"}, save_adapters=True)
    one = swept.sel(problem=0, rank=1).squeeze()
    np.testing.assert_allclose(one["loss"], run.observables["loss"], rtol=1e-7)
    np.testing.assert_allclose(one["term_1"], np.linalg.norm(run.history[0].a[..., 0], axis=-1), rtol=1e-7)

"""Which coordinates problems are swept in, and that several share theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import (
    AbstractProblem,
    Canonical,
    DeepLinear,
    Factorization,
    InputError,
    LinearNetwork,
    Offset,
    Regression,
    SingleLayer,
    aligned_problem,
    gaussian_init,
)
from lora_flow.algebra.diagonal import WRITTEN_OUT
from lora_flow.coordinates.base import Coordinates
from lora_flow.coordinates.narrow import Narrow
from lora_flow.coordinates.shared import coordinates_of

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
W1, W2, SHIFT = RNG.normal(size=(4, 5)), RNG.normal(size=(3, 4)), RNG.normal(size=(3, 5))
WIDE = np.ones((WRITTEN_OUT + 1, 1))


class Watched(Factorization):
    def observe(self, adapters):
        return {"entry": adapters[0].a[0, 0]}


class Looking(LinearNetwork):
    def observe(self, adapters):
        return {"largest": jnp.abs(adapters[0].a).max()}


class Vouched(LinearNetwork):
    coordinates = Narrow

    def observe(self, adapters):
        return {"size": jnp.linalg.norm(adapters[0].a)}


class Decayed(Factorization):
    def loss(self, adapters):
        return super().loss(adapters) + sum(jnp.sum(leaf**4) for leaf in jax.tree.leaves(adapters))


class OnlyLoss:
    layers = ((3, 5),)
    coordinates = (0, 1)  # a word with other meanings

    def loss(self, adapters):
        ((a, b),) = adapters
        return 0.5 * jnp.sum((SHIFT - b @ a) ** 2)


class Named(OnlyLoss, AbstractProblem):
    pass


def start_of(problem, rank=2):
    return gaussian_init(KEY, problem, rank=rank, alpha=1.0)


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (Factorization(W1, W2, SHIFT), Canonical),
        (aligned_problem(KEY, m=4, n=5, h=6), Canonical),
        (Factorization(WIDE, WIDE.T, np.eye(1)), Narrow),  # which would be written out
        (Watched(W1, W2, SHIFT), Narrow),  # and its own observable is not invariant
        (Decayed(W1, W2, SHIFT), Coordinates),
        (SingleLayer(SHIFT), Narrow),
        (Regression(RNG.normal(size=(9, 5)), SHIFT), Narrow),
        (LinearNetwork(SHIFT), Narrow),
        (Looking(SHIFT), Coordinates),  # whose entries are others in another basis
        (Vouched(SHIFT), Narrow),
        (DeepLinear([W1, W2], SHIFT), Narrow),
        (Offset(SingleLayer(SHIFT), start_of(SingleLayer(SHIFT))), Coordinates),
        (OnlyLoss(), Coordinates),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_problem_says_which(problem, kind):
    """A problem that stays as it is stays the same object. The loss is that of the plain problem in any."""
    (coordinates,) = coordinates_of([problem], rank=2)
    assert type(coordinates) is kind
    assert coordinates.changes_problem == (coordinates.problem is not problem)
    start = start_of(problem, rank=1)
    np.testing.assert_allclose(coordinates.problem.loss(coordinates.enter(start)[0]), problem.loss(start), rtol=1e-12)


def test_several_problems_share_a_program():
    """In coordinates of one shape, large enough for each."""
    frozen = [aligned_problem(KEY, m=12, n=13, h=5, component=list(range(k))) for k in (1, 3)]
    problems = [*frozen, Factorization(frozen[0].w1, frozen[0].w2, RNG.normal(size=(12, 13)))]
    for chosen in (problems[:2], problems):
        found = coordinates_of(chosen, rank=2)
        shapes = [jax.tree.map(jnp.shape, one) for one in found]
        assert all(shape == shapes[0] for shape in shapes)
        for one, problem in zip(found, chosen, strict=True):
            start = start_of(problem)
            np.testing.assert_allclose(one.problem.loss(one.enter(start)[0]), problem.loss(start), rtol=1e-12)


def test_problems_that_disagree_stay_as_they_are():
    problems = [Factorization(W1, W2, SHIFT), Watched(W1, W2, SHIFT)]
    found = coordinates_of(problems, rank=2)
    assert [type(one) for one in found] == [Coordinates] * 2
    assert [one.problem for one in found] == problems


def test_what_is_no_kind_of_coordinates_is_refused():
    with pytest.raises(InputError, match=r"must be a class that derives from Coordinates, got \(0, 1\)"):
        coordinates_of([Named()], rank=1)

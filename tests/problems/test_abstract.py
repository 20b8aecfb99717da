"""The methods of a problem: their defaults, what may stand in their place, and that the page lists them all."""

import inspect
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas_in_use import formula

from lora_flow import (
    AbstractProblem,
    Adapter,
    Factorization,
    InputError,
    LinearNetwork,
    MuKlabjan,
    Offset,
    SingleLayer,
    as_problem,
    descend,
    gaussian_init,
    pissa_init,
    sweep,
)
from lora_flow.problems.formulas import BESIDE, FORMULAS

PAGE = Path(__file__).parents[2] / "docs" / "problems.md"
RNG = np.random.default_rng(0)
SHIFT, WEIGHT = RNG.normal(size=(3, 4)), RNG.normal(size=(3, 4))
STATE = (Adapter(jnp.asarray(RNG.normal(size=(2, 4))), jnp.asarray(RNG.normal(size=(3, 2)))),)
ATTRIBUTES = {"layers", "scaling", "weights", "layer_inputs", "any_width", "of_products"}
METHODS = {name for name in vars(AbstractProblem) if not name.startswith("_")} | {"layers"}


class Mine(AbstractProblem):
    """A layer whose attributes are fields, the first ones without a default."""

    layers: tuple = eqx.field(static=True)
    scaling: jax.Array
    weights: tuple
    shift: jax.Array

    def loss(self, adapters):
        ((a, b),) = adapters
        return 0.5 * jnp.sum((self.shift - self.scaling * (b @ a)) ** 2)


def mine(kind=Mine):
    return kind(((3, 4),), jnp.asarray(2.0), (jnp.asarray(WEIGHT),), jnp.asarray(SHIFT))


class LossOnly:
    layers = ((3, 4),)

    def loss(self, adapters):
        return mine().loss(adapters)


def test_the_page_lists_every_method():
    listed = re.findall(r"^\| `(\w+)", PAGE.read_text(), flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == METHODS
    assert FORMULAS | ATTRIBUTES | (BESIDE & METHODS) | {"loss"} == METHODS


def test_the_example_of_the_page_runs_and_its_field_is_that_of_its_loss(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    (example,) = (block for block in blocks if "AbstractProblem" in block)
    namespace = {"jax": jax, "rng": np.random.default_rng(0), "sweep": sweep, "__name__": "page"}
    exec(compile(example, "docs/problems.md", "exec"), namespace)
    assert "unseen" in capsys.readouterr().out
    problem = namespace["completion"]
    state = gaussian_init(jax.random.key(0), problem, rank=2, alpha=1.0)
    state = jax.tree.map(lambda leaf: leaf + 0.1, state)
    gradient = jax.grad(problem.loss)(state)
    for ours, theirs in zip(jax.tree.leaves(problem.field(state)), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, -theirs, atol=1e-12)


def test_a_field_may_stand_in_the_place_of_an_attribute():
    problem = mine()
    assert problem.layers == ((3, 4),)
    assert problem.layer_inputs is None
    doubled = jax.tree.map(lambda leaf: 2 * leaf, problem)
    np.testing.assert_array_equal(doubled.scaling, 4.0)
    np.testing.assert_array_equal(doubled.weights[0], 2 * WEIGHT)
    ((a, b),) = pissa_init(jax.random.key(0), problem, rank=3, alpha=1.0)
    np.testing.assert_allclose(problem.scaling * (b @ a), WEIGHT, atol=1e-12)
    with pytest.raises(TypeError, match="abstract"):
        AbstractProblem()


@pytest.mark.parametrize("make", [mine, LossOnly])
def test_defaults_are_what_the_formulas_of_a_layer_are(make):
    """`SingleLayer` has them all in closed form."""
    known, asked = SingleLayer(SHIFT, 2.0), as_problem(make())
    for ours, theirs in (
        (asked.field(STATE)[0].a, known.field(STATE)[0].a),
        (asked.field(STATE)[0].b, known.field(STATE)[0].b),
        (asked.linearised_task()[0], known.linearised_task()[0]),
        (asked.fastest_rate(), known.fastest_rate()),
        (asked.product_descent(STATE), known.product_descent(STATE)),
        (asked.rounding_floor(STATE), known.rounding_floor(STATE)),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)
    assert asked.task_rank() == known.task_rank() == (3, "-dL/dW of layer 1 without adapters")
    assert asked.smoothness() is asked.growth_bound() is None
    assert np.isnan(asked.lowest_loss(1))
    assert not asked.any_width
    assert not asked.of_products
    assert asked.observe(STATE) == asked.details(STATE) == asked.characteristics() == asked.summary() == {}
    assert asked.meanings() == {}
    moved = asked.offset(STATE)
    np.testing.assert_allclose(moved.loss(STATE), 0.5 * np.sum(SHIFT**2), rtol=1e-12)
    inner, joined = moved.pretrained()
    assert inner is asked  # at whose weights progress is measured
    np.testing.assert_array_equal(inner.loss(joined(STATE)), moved.loss(STATE))


def test_what_an_object_has_of_its_own_is_handed_on():
    class Own(LossOnly):
        scaling = 3.0
        any_width = True
        weights = (WEIGHT,)

        def smoothness(self):
            return 5.0

        def observe(self, adapters):
            return {"entry": adapters[0].a[0, 0]}

        def meanings(self):
            return {"entry": "first entry of A"}

    asked = as_problem(Own())
    assert (asked.scaling, asked.any_width, asked.smoothness()) == (3.0, True, 5.0)
    assert asked.weights[0] is WEIGHT
    assert asked.observe(STATE) == {"entry": STATE[0].a[0, 0]}
    assert asked.meanings() == {"entry": "first entry of A"}
    assert as_problem(asked) is asked
    for wrong in (3, LossOnly, None):
        with pytest.raises(InputError, match="problem must have layers and loss"):
            as_problem(wrong)


def test_a_new_loss_puts_the_defaults_in_place_of_inherited_formulas():
    class Squared(SingleLayer):
        def loss(self, adapters):
            return super().loss(adapters) ** 2

    class Known(Squared):  # whose author knows the new loss
        def lowest_loss(self, rank, frozen=None):
            return 0.0

    class Penalty:
        def loss(self, adapters):
            return super().loss(adapters) + jnp.sum(adapters[0].a ** 2)

    class Mixed(Penalty, LinearNetwork):
        pass

    class Elsewhere(Offset):
        def joined(self, adapters):
            return adapters

    class Fielded(Factorization):
        residual: jax.Array  # in the place of the method that the loss is made of

        def __init__(self, *arrays):
            super().__init__(*arrays)
            self.residual = lambda adapters: self.shift

    for kind in (Squared, Mixed, Elsewhere, Fielded):
        for name in ("field", "linearised_task", "pretrained", "growth_bound", "characteristics", "of_products"):
            assert inspect.getattr_static(kind, name) is vars(AbstractProblem)[name], (kind, name)
    assert Known(SHIFT).lowest_loss(1) == 0.0
    assert formula(Known(SHIFT), "lowest_loss") is not None
    assert formula(Known(SHIFT), "field") is None
    (ours,), (theirs,) = Known(SHIFT).field(STATE), SingleLayer(SHIFT).field(STATE)
    np.testing.assert_allclose(ours.a, 2 * SingleLayer(SHIFT).loss(STATE) * theirs.a, rtol=1e-12)
    assert SingleLayer(SHIFT).lowest_loss(1) > 0  # as before


def test_a_rule_for_one_layer_takes_a_layer_of_your_own():
    class Products(Mine):
        of_products = True

    runs = [
        descend(problem, STATE, steps=3, saves=2, step=MuKlabjan(smoothness=4.0)).observables["loss"]
        for problem in (mine(Products), SingleLayer(SHIFT, 2.0))
    ]
    np.testing.assert_allclose(*runs, rtol=1e-12)
    with pytest.raises(InputError, match="smoothness must be given"):
        descend(mine(Products), STATE, steps=1, step=MuKlabjan())
    with pytest.raises(InputError, match="problem must adapt one layer"):
        descend(mine(), STATE, steps=1, step=MuKlabjan(smoothness=4.0))

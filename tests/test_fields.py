"""Subclasses with fields of their own, of classes that make their fields from their arguments."""

import inspect
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import (
    DeepLinear,
    Factorization,
    InputError,
    LinearNetwork,
    MuKlabjan,
    Offset,
    Regression,
    ScaledGD,
    SingleLayer,
    SoftmaxRegression,
    gaussian_init,
    solve,
    sweep,
    zero_adapters,
)

RNG = np.random.default_rng(0)
W1, W2, SHIFT = RNG.normal(size=(4, 5)), RNG.normal(size=(3, 4)), RNG.normal(size=(3, 5))
LAYER = SingleLayer(SHIFT)


class Decayed(Factorization):
    """A factorisation with weight decay."""

    decay: float

    def loss(self, adapters):
        return super().loss(adapters) + self.decay * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(adapters))


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Factorization, (W1, W2, SHIFT)),
        (SingleLayer, (SHIFT,)),
        (Regression, (RNG.normal(size=(7, 5)), SHIFT)),
        (SoftmaxRegression, (RNG.normal(size=(7, 5)), [0, 1, 2, 0, 1, 2, 0], SHIFT)),
        (DeepLinear, ([W1, W2], SHIFT)),
        (LinearNetwork, (SHIFT,)),
        (Offset, (LAYER, zero_adapters(LAYER.layers, 1))),
        (ScaledGD, (0.5,)),
        (MuKlabjan, (2.0,)),
    ],
)
def test_a_subclass_takes_its_new_fields_by_name(kind, arguments):
    class Mine(kind):
        weight_of: float
        name_of: str = eqx.field(static=True, default="mine")
        counts: ClassVar[int] = 3

    class More(Mine):
        extra: jax.Array

    plain, mine, more = kind(*arguments), Mine(*arguments, weight_of=0.5), More(*arguments, weight_of=2.0, extra=SHIFT)
    assert (mine.weight_of, mine.name_of, mine.counts) == (0.5, "mine", 3)
    assert (more.weight_of, more.name_of) == (2.0, "mine")
    assert more.extra is SHIFT
    assert Mine(*arguments, weight_of=0.5, name_of="other").name_of == "other"
    for name in kind.__dataclass_fields__:
        for ours, theirs in zip(
            jax.tree.leaves(getattr(mine, name)), jax.tree.leaves(getattr(plain, name)), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    parameters = inspect.signature(Mine).parameters
    assert list(parameters)[-2:] == ["weight_of", "name_of"]
    assert parameters["weight_of"].default is inspect.Parameter.empty
    with pytest.raises(TypeError, match=r"missing a required (keyword-only )?argument: 'weight_of'"):
        Mine(*arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'wait_of'"):
        Mine(*arguments, weight_of=0.5, wait_of=0.5)


def test_the_checks_of_the_parent_are_kept():
    with pytest.raises(InputError, match=r"shift must have shape \(3, 5\), got \(4, 5\)"):
        Decayed(W1, W2, W1, decay=0.1)
    with pytest.raises(InputError, match="shift or target must be given, and not both, got neither"):
        Decayed(w1=W1, w2=W2, decay=0.1)
    target = Decayed(W1, W2, target=SHIFT + W2 @ W1, decay=0.1)
    np.testing.assert_allclose(target.shift, SHIFT, atol=1e-14)
    with pytest.raises(InputError, match="the field 'target' of Taken must have another name than the arguments of"):

        class Taken(Factorization):
            target: float


def test_a_default_of_a_field_is_made_for_each_object():
    class Mine(Factorization):
        seen: list = eqx.field(default_factory=list)
        steps: int = 3

    first, second = Mine(W1, W2, SHIFT), Mine(W1, W2, SHIFT, steps=4)
    assert first.seen == second.seen == []
    assert first.seen is not second.seen
    assert (first.steps, second.steps) == (3, 4)


def test_a_default_that_is_declared_last_counts():
    class Half(Decayed):
        decay: float = 0.5

    class Quarter(Half):
        label: str = "quarter"
        decay: float = 0.25

    class Again(Quarter):
        decay: float

    assert [kind(W1, W2, SHIFT).decay for kind in (Half, Quarter, Again)] == [0.5, 0.25, 0.25]
    assert Half(W1, W2, SHIFT, decay=2.0).decay == 2.0
    with pytest.raises(InputError, match="the field 'shift' of Still must have no default, since the __init__ of Fact"):

        class Still(Factorization):
            shift: float = 0.0


def test_two_subclasses_combine():
    """All of the fields are taken, with the default of the nearest class in the order of Python's lookup."""

    class Half(Decayed):
        decay: float = 0.5

    class Named(Decayed):
        label: str

    class Counted(eqx.Module):
        count: int = 3

    class Both(Named, Half):
        pass

    class Mixed(Counted, Decayed):
        pass

    both, mixed = Both(W1, W2, SHIFT, label="both"), Mixed(W1, W2, SHIFT, decay=0.1)
    assert (both.decay, both.label, Named(W1, W2, SHIFT, decay=0.1, label="one").label) == (0.5, "both", "one")
    assert (mixed.decay, mixed.count, Mixed(W1, W2, SHIFT, decay=0.1, count=4).count) == (0.1, 3, 4)
    np.testing.assert_array_equal(both.shift, SHIFT)
    with pytest.raises(InputError, match=r"shift must have shape \(3, 5\), got \(4, 5\)"):
        Mixed(W1, W2, W1, decay=0.1)


def test_parents_that_do_not_call_each_other_are_refused():
    class Own(Factorization):
        def __init__(self, shift):
            super().__init__(W1, W2, shift)

    class Labelled(Own, eqx.Module):
        label: str = "labelled"

    assert Labelled(SHIFT).label == "labelled"
    for parents in ((Own, Decayed), (Decayed, SingleLayer)):
        names = " and ".join(("Own" if Own in parents else "Factorization", parents[1].__name__))
        must = f"Both must have an __init__ of its own, which calls those of {names}, got none"
        with pytest.raises(InputError, match=must):
            type("Both", parents, {"__module__": __name__})

    class Both(Own, Decayed):
        def __init__(self, shift):
            Decayed.__init__(self, W1, W2, shift, decay=0.125)

    assert Both(SHIFT).decay == 0.125


def test_a_class_with_an_init_of_its_own_is_left_alone():
    class Mine(Decayed):
        twice: float

        def __init__(self, shift):
            super().__init__(W1, W2, shift, decay=0.25)
            self.twice = 2 * self.decay

    assert Mine(SHIFT).twice == 0.5


def test_such_a_problem_runs_with_its_own_loss():
    """The flow of 0.01 ||A||^2 + 0.01 ||B||^2 beside the shift's: the loss is that of the definition, at every time."""
    problem = Decayed(W1, W2, SHIFT, decay=0.01)
    start = gaussian_init(jax.random.key(0), problem, rank=2, alpha=0.1)
    how = {"t1": 1.0, "saves": 5, "solver": "Tsit5"}
    trajectory = solve(problem, start, save_adapters=True, **how)
    for i, loss in enumerate(trajectory.observables["loss"]):
        (a1, b1), (a2, b2) = (jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], one) for one in trajectory.history)
        missing = SHIFT - ((W2 + b2 @ a2) @ (W1 + b1 @ a1) - W2 @ W1)
        decay = sum(np.sum(leaf**2) for leaf in (a1, b1, a2, b2))
        assert float(loss) == pytest.approx(0.5 * np.sum(missing**2) + 0.01 * decay, rel=1e-12)
    swept = sweep(problem, alpha=0.1, rank=2, progress=False, **how)
    np.testing.assert_allclose(swept["loss"].squeeze(), trajectory.observables["loss"], rtol=1e-3)
    with pytest.raises(InputError, match="what differs between them in arrays, to be swept together, got Decayed of 2"):
        sweep({d: Decayed(W1, W2, SHIFT, decay=d) for d in (0.1, 0.2)}, t1=1.0)

"""What was constant in a compiled program stays in it: a problem that has changed since is refused."""

import dataclasses
import gc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import Adapter, InputError, Offset, analyse, descend, solve, sweep
from lora_flow.problems import stale
from lora_flow.problems.stale import check_problem

SHIFT = np.asarray([[3.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
START = (Adapter(jnp.full((1, 3), 0.1), jnp.zeros((2, 1))),)
TOLD = "problem must not change once it has been solved, nor equal another: make it anew, got another "


class Held:
    layers = ((2, 3),)

    def __init__(self):
        self.shift, self.weight = SHIFT.copy(), np.ones(2)

    def loss(self, adapters):
        ((a, b),) = adapters
        return 0.5 * jnp.sum((self.shift - self.weight[:, None] * (b @ a)) ** 2)


class Compiled(Held):
    """Its loss is a program of its own, in which the arrays are constants as well."""

    def __init__(self):
        super().__init__()
        self.loss = jax.jit(super().loss)


class Inside(eqx.Module):
    """A PyTree with something in it that is none."""

    held: Any
    scale: jax.Array
    layers: tuple = eqx.field(static=True, default=((2, 3),))

    def loss(self, adapters):
        return self.scale * self.held.loss(adapters)


@dataclasses.dataclass(frozen=True)
class Named:
    """Equal to whatever has the same name."""

    name: str
    held: Held = dataclasses.field(compare=False)
    layers = ((2, 3),)

    def loss(self, adapters):
        return self.held.loss(adapters)


RUNS = {
    "solve": lambda one: solve(one, START, t1=0.1, saves=[0.05, 0.1], solver="Tsit5", derivatives="forward"),
    "descend": lambda one: descend(one, START, steps=1, step=0.1, saves=2),
    "sweep": lambda one: sweep(one, alpha=0.1, rank=1, t1=0.1, saves=2, solver="Tsit5", progress=False),
    "analyse": lambda one: analyse(one, START),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_problem_that_was_changed_is_refused_in_every_path(run):
    """The weight's product vanishes at the start, where B = 0: a loss there would not tell."""
    problem = Held()
    for _ in range(2):  # as long as nothing changes
        check_problem(problem)
    problem.weight[0] = 5.0
    with pytest.raises(InputError, match=TOLD):
        RUNS[run](problem)


@pytest.mark.parametrize("make", [Compiled, Held, lambda: Offset(Held(), START), lambda: Inside(Held(), jnp.ones(()))])
@pytest.mark.parametrize("entry", ["shift", "weight"])
def test_whatever_holds_the_arrays(make, entry):
    problem = make()
    held = problem
    while not isinstance(held, Held):
        held = getattr(held, "held", None) or held.problem
    check_problem(problem)
    getattr(held, entry)[...] *= 1.01
    with pytest.raises(InputError, match=TOLD):
        check_problem(problem)


def test_an_object_that_equals_another_does_not_get_its_numbers():
    first, second = Named("mine", Held()), Named("mine", Held())
    check_problem(first)
    check_problem(second)  # the same numbers
    second.held.shift[0, 0] = 4.0
    check_problem(first)
    with pytest.raises(InputError, match=TOLD):
        check_problem(second)


def test_jax_arrays_of_equal_objects_are_compared_by_their_values():
    class Named(Held):
        def __eq__(self, other):
            return isinstance(other, Named)

        def __hash__(self):
            return 1

    first, second, third = Named(), Named(), Named()
    first.shift, second.shift, third.shift = (jnp.asarray(s * SHIFT) for s in (1.0, 1.0, 2.0))
    check_problem(first)
    check_problem(second)
    with pytest.raises(InputError, match=f"{TOLD}shift$"):
        check_problem(third)


class Slotted:
    __slots__ = ("shift",)
    layers = ((2, 3),)

    def __init__(self, shift):
        self.shift = shift

    def loss(self, adapters):
        return jnp.sum(self.shift)


FACTORS = [1.0, {"inner": SHIFT.copy()}]


class OfModule:
    layers = ((2, 3),)

    def loss(self, adapters):
        return FACTORS[0] * jnp.sum(FACTORS[1]["inner"])


def in_closure(shift):
    class Problem:
        layers = ((2, 3),)

        def loss(self, adapters):
            return jax.vmap(lambda row: jnp.sum(row))(shift)

    return Problem()


@pytest.mark.parametrize("make", [Slotted, in_closure, lambda shift: _with(shift, [{"a": (shift,)}])])
def test_wherever_an_array_is_held(make):
    shift = SHIFT.copy()
    problem = make(shift)
    for _ in range(2):
        check_problem(problem)
    shift[0, 1] = 1e-3
    with pytest.raises(InputError, match=TOLD):
        check_problem(problem)


def _with(shift, parts):
    problem = Held()
    problem.parts, problem.itself = parts, problem  # a cycle
    return problem


@pytest.mark.parametrize("entry", [0, 1])
def test_arrays_and_numbers_of_its_module(entry):
    problem = OfModule()
    check_problem(problem)
    before = FACTORS[entry]
    FACTORS[entry] = 2.0 if entry == 0 else {"inner": 2 * SHIFT}
    with pytest.raises(InputError, match=TOLD):
        check_problem(problem)
    FACTORS[entry] = before
    check_problem(problem)


def test_the_loss_is_only_traced_and_what_it_keeps_for_itself_is_no_change():
    calls = []

    class Counted(Held):
        def loss(self, adapters):
            calls.append(1)
            self.kept = self._filled = np.ones(3)
            return super().loss(adapters)

    problem = Counted()
    problem._filled = None
    check_problem(problem)
    assert not calls
    RUNS["descend"](problem)
    traced = len(calls)
    for _ in range(3):
        RUNS["descend"](problem)
    assert len(calls) == traced


def test_what_was_held_is_forgotten_with_the_problem():
    problem = Held()
    check_problem(problem)
    before = len(stale._weak)
    del problem
    gc.collect()
    assert len(stale._weak) < before


def test_a_pytree_is_asked_nothing_and_may_be_replaced():
    calls = []

    class Counted(eqx.Module):
        shift: jax.Array
        name: str = "mine"
        layers: tuple = eqx.field(static=True, default=((2, 3),))

        def loss(self, adapters):
            calls.append(1)
            return jnp.sum(self.shift)

    for scale in (1.0, 2.0):
        check_problem(Counted(scale * jnp.asarray(SHIFT)))
    assert not calls


def test_under_jit_and_with_traced_arrays_nothing_is_in_the_way():
    problem = Held()

    @jax.jit
    def inside(x):
        check_problem(problem)
        made = Held()
        made.shift = x * made.shift
        check_problem(made)
        return made.loss(START)

    assert np.isfinite(inside(2.0))
    problem.shift[0, 0] = 7.0
    with pytest.raises(InputError, match=TOLD):
        check_problem(problem)

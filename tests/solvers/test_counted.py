"""Loops of a number of turns that only a run knows, differentiated, against the same loop written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow.solvers.counted import counted, kept_of, turned

MOST = 25  # of which the last three states are kept, the last three of every third, and every ninth
START = np.array([0.3, -0.5])
MATRIX = np.array([[0.9, 0.4], [-0.3, 0.8]])
COUNTS = (0, 1, 2, 3, 4, 9, 10, 18, 19, 24, MOST)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def by_turns(matrix, start, count):
    """A turn depends on its number, and on a matrix that it closes over."""
    state = {"x": start, "turns": jnp.zeros((), int)}

    def turn(number, state):
        x = jnp.sin(matrix @ state["x"]) + 0.1 * number
        return {"x": x, "turns": state["turns"] + 1}

    return counted(turn, state, count, MOST)


def value(matrix, start, count):
    return jnp.sum(by_turns(matrix, start, count)["x"] ** 2)


def written_out(matrix, start, count):
    for number in range(count):
        start = jnp.sin(matrix @ start) + 0.1 * number
    return jnp.sum(start**2)


def compare(got, expected):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


@functools.cache
def expected(count):
    both = jax.value_and_grad(written_out, argnums=(0, 1))
    return jit(both, static_argnums=2)(MATRIX, START, count)


def test_gradients_of_loops_of_any_number_of_turns():
    gradient = jit(jax.value_and_grad(value, argnums=(0, 1)))
    for count in COUNTS:
        compare(gradient(MATRIX, START, count), expected(count))


def test_gradients_of_lanes_with_numbers_of_turns_of_their_own():
    lanes = jit(jax.vmap(jax.value_and_grad(value, argnums=(0, 1)), in_axes=(None, None, 0)))
    compare(lanes(MATRIX, START, np.array(COUNTS)), jax.tree.map(lambda *one: np.stack(one), *map(expected, COUNTS)))


def test_the_gradient_has_a_forward_mode():
    along = jit(lambda x, step, count: jax.jvp(lambda x: jax.grad(value)(x, START, count), (x,), (step,)))
    for count in (1, 4, MOST):
        of = jax.jacfwd(jax.grad(lambda x, count=count: written_out(x, START, count)))
        product = np.einsum("ijkl,kl->ij", jit(of)(MATRIX), np.ones((2, 2)))
        np.testing.assert_allclose(along(MATRIX, np.ones((2, 2)), count)[1], product, rtol=1e-11)


def test_as_many_states_are_kept_as_are_needed():
    known = {1: 1, 2: 2, 8: 2, 9: 3, 25: 3, 27: 3, 28: 4, 1000: 10, 1001: 11, 100_000: 47}
    assert {most: kept_of(most) for most in known} == known


def test_integers_are_carried_and_nothing_else_is_counted():
    assert int(by_turns(MATRIX, START, jnp.asarray(7))["turns"]) == 7
    assert int(turned(lambda number, state: state + number, jnp.zeros((), int), jnp.asarray(4))) == 6


def test_loops_that_follow_each_other_carry_integers_and_keys():
    """Within `scan`, whose carry is taken for differentiated where any turn makes it so."""

    def turn(number, state):
        x, turns, key = state
        key, now = jax.random.split(key)
        return jnp.sin(MATRIX @ x) + 0.1 * jax.random.uniform(now, (2,)) * turns, turns + 1, key

    def of(loop):
        def value(start):
            begin = start, jnp.zeros((), int), jax.random.key(0)
            return jnp.sum(jax.lax.scan(lambda state, _: (loop(state), None), begin, length=2)[0][0] ** 2)

        return value

    def written(state):
        for number in range(3):
            state = turn(number, state)
        return state

    ours, plain = of(lambda state: counted(turn, state, jnp.asarray(3), 3)), of(written)
    compare(*(jit(jax.grad(one))(START) for one in (ours, plain)))


def test_a_second_derivative_in_reverse_is_an_error_and_no_wrong_number():
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(value)(x, START, jnp.asarray(3)))))(MATRIX)

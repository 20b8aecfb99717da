"""Deep linear networks against products written out, and with two layers against `Factorization`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from loss_only import LossOnly, tasks
from scipy.integrate import solve_ivp

from lora_flow import (
    Adapter,
    DeepLinear,
    Factorization,
    InputError,
    eva_init,
    gaussian_init,
    solve,
    zero_adapters,
)

KEY = jax.random.key(7)
WIDTHS = (4, 6, 3, 5)  # from the first layer's input to the last one's output
SEEDS = st.integers(0, 2**31)
DEPTH = st.sampled_from([1, 3])  # each compiles anew


def draw(seed, depth, size=1.0):
    rng = np.random.default_rng(seed)
    weights = [rng.standard_normal((out, n)) for n, out in itertools.pairwise(WIDTHS[: depth + 1])]
    problem = DeepLinear(weights, shift=rng.standard_normal((WIDTHS[depth], WIDTHS[0])))
    adapters = tuple(
        Adapter(jnp.asarray(size * rng.standard_normal((2, n))), jnp.asarray(size * rng.standard_normal((out, 2))))
        for out, n in problem.layers
    )
    return problem, adapters


def product(matrices):
    """W_L ... W_1."""
    whole = np.eye(matrices[0].shape[1])
    for matrix in matrices:
        whole = np.asarray(matrix) @ whole
    return whole


@jax.jit
def update_and_loss(problem, adapters):
    return problem.update(adapters), problem.loss(adapters)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, depth=DEPTH)
def test_loss_and_update_are_the_products_written_out(seed, depth):
    problem, adapters = draw(seed, depth)
    weights, shift = [np.asarray(w) for w in problem.weights], np.asarray(problem.shift)
    changed = [w + np.asarray(b) @ np.asarray(a) for w, (a, b) in zip(weights, adapters, strict=True)]
    gained = product(changed) - product(weights)
    update, loss = update_and_loss(problem, adapters)
    np.testing.assert_allclose(update, gained, rtol=0, atol=1e-12 * (1 + np.abs(gained).max()))
    np.testing.assert_allclose(loss, 0.5 * np.sum((shift - gained) ** 2), rtol=1e-11)
    _, at_rest = update_and_loss(problem, zero_adapters(problem.layers, 2))
    np.testing.assert_allclose(at_rest, 0.5 * np.sum(shift**2), rtol=1e-15)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, size=st.sampled_from([1e-2, 1e-6, 1e-10]))
def test_a_small_update_keeps_all_its_digits(seed, size):
    """Relative to itself, not to the weights: the six further terms of three layers are added up one by one."""
    problem, adapters = draw(seed, 3, size)
    (w1, w2, w3), (c1, c2, c3) = map(np.asarray, problem.weights), (np.asarray(b @ a) for a, b in adapters)
    terms = [w3 @ w2 @ c1, w3 @ c2 @ w1, c3 @ w2 @ w1, w3 @ c2 @ c1, c3 @ w2 @ c1, c3 @ c2 @ w1, c3 @ c2 @ c1]
    size_of_terms = sum(map(np.linalg.norm, terms))
    assert np.linalg.norm(problem.update(adapters) - sum(terms)) < 1e-14 * size_of_terms


@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_the_linearised_task_and_inputs_are_those_of_the_frozen_network(seed):
    problem, _ = draw(seed, 3)
    for ours, generic in zip(*map(tasks, (problem, LossOnly(problem))), strict=True):
        np.testing.assert_allclose(ours, generic, rtol=0, atol=1e-12 * (1 + np.abs(generic).max()))
    first, *fed = problem.layer_inputs
    assert first is None
    for i, inputs in enumerate(fed, start=1):  # white inputs, one a sample, sent through the layers below
        np.testing.assert_allclose(inputs, product(problem.weights[:i]).T, rtol=1e-12, atol=1e-12)


def test_with_two_layers_it_is_a_factorisation():
    """The same tasks, weights and inputs, and over a trajectory the flow that SciPy makes of the other's formulas."""
    deep, _ = draw(0, 2)
    two = Factorization(*deep.weights, shift=deep.shift)
    assert deep.layers == two.layers
    for ours, theirs in zip(
        jax.tree.leaves((deep.weights, deep.layer_inputs, deep.linearised_task())),
        jax.tree.leaves((two.weights, two.layer_inputs, two.linearised_task())),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)
    start = gaussian_init(KEY, deep, rank=2, alpha=0.1)
    ours = solve(deep, start, t1=2.0, saves=5, rtol=1e-8, solver="Tsit5")
    flat, unflatten = ravel_pytree(start)
    velocity = jax.jit(lambda state: ravel_pytree(two.field(unflatten(state)))[0])
    how = {"method": "DOP853", "t_eval": ours.times, "rtol": 1e-10, "atol": 1e-13}
    states = solve_ivp(lambda t, state: velocity(state), (0, 2), flat, **how).y.T
    losses = [two.loss(unflatten(state)) for state in states]
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(ours.observables["loss"], losses, rtol=1e-6)
    np.testing.assert_allclose(ravel_pytree(ours.adapters)[0], states[-1], rtol=0, atol=1e-6)


def test_a_target_is_the_same_as_its_shift():
    problem, _ = draw(0, 3)
    same = DeepLinear(problem.weights, target=problem.shift + product(problem.weights))
    np.testing.assert_allclose(same.shift, problem.shift, rtol=0, atol=1e-13)
    assert str(same) == "DeepLinear: 3 layers, 6 x 4, 3 x 6, 5 x 3"


def test_the_first_layers_white_inputs_have_no_principal_directions():
    problem, _ = draw(0, 3)
    with pytest.raises(InputError, match=r"for eva, got white inputs of layer 1$"):
        eva_init(KEY, problem, rank=2, alpha=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "weights must hold at least one matrix, got none"),
        ({"weights": [np.ones(3)]}, "weights[0] must be a matrix, got shape (3,)"),
        ({"weights": [np.nan * np.ones((2, 3))]}, "weights[0] must be finite, got 6 entries that are NaN or infinite"),
        (
            {"weights": [np.ones((2, 3)), np.ones((4, 3))]},
            "weights[1] must have 2 columns, as weights[0] has rows, got (4, 3)",
        ),
        ({"shift": None}, "shift or target must be given, and not both, got neither"),
        ({"target": np.ones((4, 3))}, "shift or target must be given, and not both, got both"),
        ({"shift": np.ones((3, 4))}, "shift must have shape (4, 3), got (3, 4)"),
        ({"shift": None, "target": np.ones((3, 4))}, "target must have shape (4, 3), got (3, 4)"),
        ({"shift": np.zeros((4, 3))}, "shift must have a non-zero entry, got nothing to learn"),
    ],
)
def test_a_bad_network_is_refused_in_one_line(change, message):
    good = {"weights": [np.ones((2, 3)), np.ones((4, 2))], "shift": np.ones((4, 3))}
    with pytest.raises(InputError) as refused:
        DeepLinear(**(good | change))
    assert str(refused.value) == message

"""Frozen weights offset by the start: the same function at t = 0, and then the flow of the weights that are left."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp

from lora_flow import (
    Adapter,
    DeepLinear,
    Factorization,
    Offset,
    Regression,
    SingleLayer,
    SoftmaxRegression,
    analyse,
    pissa_init,
    solve,
    sweep,
    zero_adapters,
)
from lora_flow.problems.base import vector_field
from lora_flow.problems.offset import offset_where

SEEDS = st.integers(0, 2**31)
KINDS = ("matrix", "linear", "relu", "softmax", "two", "deep", "only a loss")


class OnlyLoss(eqx.Module):
    """A network with a hidden layer that is not linear, and nothing but its loss."""

    layers = ((4, 3), (2, 4))
    frozen: list

    def loss(self, adapters):
        first, second = (w + b @ a for w, (a, b) in zip(self.frozen, adapters, strict=True))
        return jnp.mean((second @ jnp.tanh(first) - 1) ** 2)


def family(kind, seed):
    """Makes the problem whose weights are less by what is given for each layer, with the same goal."""
    rng = np.random.default_rng(seed)
    w1, w2, w3, shift, goal = (rng.standard_normal(size) for size in ((4, 3), (2, 4), (5, 2), (4, 3), (5, 3)))
    inputs, labels = rng.standard_normal((8, 3)), rng.integers(0, 4, 8)

    def make(*less):
        frozen = [w - x for w, x in zip((w1, w2, w3), less, strict=False)]
        if kind == "matrix":
            return SingleLayer(shift + less[0], 0.6, frozen[0])
        if kind in ("linear", "relu"):
            return Regression(inputs, shift + less[0], frozen[0], kind, 0.6)
        if kind == "softmax":
            return SoftmaxRegression(inputs, labels, frozen[0], 0.6)
        if kind == "two":
            return Factorization(*frozen[:2], target=goal[:2])
        if kind == "deep":
            return DeepLinear(frozen, target=goal)
        return OnlyLoss(frozen[:2])

    return make


def draw(kind, seed):
    """A problem, a start and other adapters for it, and the problem with the start taken off its weights."""
    make, rng = family(kind, seed), np.random.default_rng(seed + 1)
    problem = make(np.zeros((4, 3)), np.zeros((2, 4)), np.zeros((5, 2)))

    def adapters():
        return tuple(
            Adapter(jnp.asarray(rng.standard_normal((2, n))), jnp.asarray(rng.standard_normal((out, 2))))
            for out, n in problem.layers
        )

    start = adapters()
    scaling = float(getattr(problem, "scaling", 1.0))
    taken = [scaling * np.asarray(b @ a) for a, b in start]
    return problem, start, adapters(), make(*taken, *np.zeros(2))


@jax.jit
def loss(problem, adapters):
    return problem.loss(adapters)


@jax.jit
def slopes(offset, moved, adapters):
    return offset.field(adapters), vector_field(moved)(adapters), jax.grad(offset.loss)(adapters)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_it_is_the_problem_with_the_start_taken_off_the_weights(kind, seed):
    """The loss and the flow, from anywhere; at the start, the loss of the pretrained weights."""
    problem, start, elsewhere, moved = draw(kind, seed)
    offset = Offset(problem, start)
    pretrained = loss(problem, zero_adapters(problem.layers, 2))
    np.testing.assert_allclose(loss(offset, start), pretrained, rtol=1e-11)
    expected = float(loss(moved, elsewhere))
    size = 1 + expected
    np.testing.assert_allclose(loss(offset, elsewhere), expected, rtol=0, atol=1e-12 * size)
    for ours, theirs, down in zip(*map(jax.tree.leaves, slopes(offset, moved, elsewhere)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11 * size)
        np.testing.assert_allclose(ours, -np.asarray(down), rtol=0, atol=1e-11 * size)


@pytest.mark.parametrize("kind", ["relu", "two"])
def test_a_start_has_no_influence_on_the_loss_there(kind):
    """The function at t = 0 is the pretrained one whatever the start: the derivative along both roles of it is zero."""
    problem, start, _, _ = draw(kind, 0)
    both = jax.jit(jax.grad(lambda start: Offset(problem, start).loss(start)))(start)
    alone = jax.jit(jax.grad(lambda adapters: Offset(problem, start).loss(adapters)))(start)
    for slope, part in zip(jax.tree.leaves(both), jax.tree.leaves(alone), strict=True):
        assert np.linalg.norm(part) > 1e-2
        np.testing.assert_allclose(slope, 0.0, atol=1e-12 * np.linalg.norm(part))


def test_one_program_serves_weights_that_are_offset_and_weights_that_are_not():
    problem, start, elsewhere, _ = draw("two", 0)
    assert offset_where(None, problem, start) is problem
    np.testing.assert_array_equal(
        offset_where(jnp.array(True), problem, start).loss(elsewhere), Offset(problem, start).loss(elsewhere)
    )
    plain = offset_where(jnp.array(False), problem, start)
    np.testing.assert_allclose(plain.loss(elsewhere), problem.loss(elsewhere), rtol=1e-14)


RNG = np.random.default_rng(0)
TWO = Factorization(*(RNG.standard_normal(shape) / 2 for shape in ((7, 6), (5, 7), (5, 6))))
HOW = {"t1": 2.0, "saves": 5, "solver": "Tsit5", "rtol": 1e-7}


class Watched(Factorization):
    def observe(self, adapters):
        return {"learned": jnp.linalg.norm(adapters[1].b @ adapters[1].a)}


WATCHED = Watched(TWO.w1, TWO.w2, TWO.shift)


@pytest.fixture(scope="module")
def swept():
    return sweep(TWO, init="pissa", alpha=0.5, rank=(1, 2), **HOW, details=True, progress=False).squeeze()


def solved(alpha):
    start = pissa_init(jax.random.key(0), WATCHED, rank=2, alpha=alpha)
    return solve(Offset(WATCHED, start), start, **HOW, derivatives="forward", save_adapters=True)


def test_a_sweep_tells_of_the_offset_problem_what_analyse_does(swept):
    """Of the network that the adapters make, although it is solved in other coordinates and at a padded rank."""
    alone = solved(0.5)
    start = jax.tree.map(lambda leaf: leaf[0], alone.history)
    lane = swept.sel(rank=2)
    for name, values in (alone.observables | analyse(Offset(TWO, start), alone.history)).items():
        if name in ("drift", "learned"):
            continue  # which is an error itself, and which the sweep's problem does not record
        later = slice(name == "update_alignment_error", None)  # of the update, which is nothing at t = 0
        size = float(np.nanmax(np.abs(values)))
        np.testing.assert_allclose(lane[name][later], values[later], rtol=1e-5, atol=1e-9 * size, err_msg=name)


def test_in_a_sweep_the_parts_of_the_loss_add_up_and_nothing_is_learned_at_first(swept):
    np.testing.assert_allclose(swept["loss_signal"] + swept["loss_rest"], swept["loss"], rtol=1e-10)
    first = swept.isel(time=0)
    np.testing.assert_allclose(first["loss"], 0.5 * np.sum(TWO.shift**2), rtol=1e-12)
    np.testing.assert_allclose(first["update_singular_values"], 0.0, atol=1e-13)
    assert np.all(swept["update_singular_values"].isel(time=-1).max("mode") > 0.1)
    assert np.all(swept["loss"].diff("time") < 0)
    assert np.all(np.isnan(swept["loss_floor"]))  # which is known of one layer only


@pytest.mark.parametrize("rank", [1, 2])
def test_in_a_sweep_the_flow_is_that_of_the_weights_that_are_left(swept, rank):
    """The factorisation with the start taken off its weights and with the same target, solved by SciPy."""
    start = pissa_init(jax.random.key(0), TWO, rank=rank, alpha=0.5)
    (a1, b1), (a2, b2) = start
    left = Factorization(TWO.w1 - b1 @ a1, TWO.w2 - b2 @ a2, target=TWO.shift + TWO.w2 @ TWO.w1)
    flat, unflatten = ravel_pytree(start)
    velocity = jax.jit(lambda state: ravel_pytree(left.field(unflatten(state)))[0])
    times = swept["time"].values
    states = solve_ivp(lambda t, state: velocity(state), (0, 2), flat, "DOP853", t_eval=times, rtol=1e-9, atol=1e-12)
    losses = [left.loss(unflatten(state)) for state in states.y.T]
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_allclose(swept["loss"].sel(rank=rank), losses, rtol=1e-5)


def test_a_trajectory_can_be_differentiated_along_with_its_offset():
    _, slope = jax.jvp(lambda alpha: solved(alpha).observables["loss"][-1], (0.5,), (1.0,))
    above, below = (float(solved(alpha).observables["loss"][-1]) for alpha in (0.505, 0.495))
    np.testing.assert_allclose(slope, (above - below) / 0.01, rtol=1e-3)


def test_own_observables_are_of_the_network_that_is_left():
    """All along the way: of what has been learned, which is nothing at t = 0."""

    seen = solved(0.5)
    start = jax.tree.map(lambda leaf: leaf[0], seen.history)
    learned = seen.history[1].b @ seen.history[1].a - (start[1].b @ start[1].a)[None]
    np.testing.assert_allclose(seen.observables["learned"], np.linalg.norm(learned, axis=(1, 2)), rtol=1e-9, atol=1e-12)
    assert seen.observables["learned"][-1] > 0.1

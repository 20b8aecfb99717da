"""The noise of minibatches, and optimisers that share a program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_flow import Adapter, InputError, SingleLayer, descend, gradient_noise
from lora_flow.dynamics.optimizers import OPTIMIZERS, one_of

RNG = np.random.default_rng(0)
PROBLEM = SingleLayer(RNG.normal(size=(5, 4)), scaling=2.0)
START = (Adapter(jnp.asarray(RNG.normal(size=(2, 4))), jnp.asarray(RNG.normal(size=(5, 2)))),)


def test_the_noise_is_that_of_the_weight_gradient():
    """With A = I and B = 0 the gradient of B is s (dL/dW + N): N has the standard deviation, is new at each step."""
    size, std, scaling = 40, 0.3, 2.0
    zero, one = jnp.zeros((size, size)), jnp.eye(size)
    noise = gradient_noise(std, jax.random.key(1), scaling)
    state, seen = noise.init(None), []
    for _ in range(2):
        (drawn,), state = noise.update((Adapter(zero, zero),), state, (Adapter(one, zero),))
        np.testing.assert_array_equal(drawn.a, 0.0)
        seen.append(np.asarray(drawn.b) / scaling)
    for one_draw in seen:
        assert np.std(one_draw) == pytest.approx(std, rel=5 / np.sqrt(2 * size**2))
        assert abs(np.mean(one_draw)) < 5 * std / size
    assert abs(np.corrcoef(*map(np.ravel, seen))[0, 1]) < 5 / size
    (both,), _ = noise.update((Adapter(zero, zero),), state, (Adapter(one, one),))
    np.testing.assert_allclose(both.a, both.b, rtol=1e-12)  # B^T N and N A^T, of one N


def test_noise_shifts_gradient_descent_by_what_the_factors_see():
    """One step from A, B with noise N is the step of the problem whose dL/dW is N more."""
    key = jax.random.key(3)
    drawn = 0.5 * jax.random.normal(jax.random.split(jax.random.fold_in(key, 0), 1)[0], (5, 4))
    noisy = optax.chain(gradient_noise(0.5, key, PROBLEM.scaling), optax.sgd(0.1))
    told = descend(PROBLEM, START, steps=1, step=noisy, saves=2).adapters
    off = SingleLayer(PROBLEM.shift - drawn, PROBLEM.scaling)
    for found, expected in zip(told[0], descend(off, START, steps=1, step=0.1, saves=2).adapters[0], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_noise_wants_both_factors_at_once():
    noisy = optax.chain(gradient_noise(0.5, jax.random.key(0)), optax.sgd(0.1))
    with pytest.raises(InputError, match=r"^order must be 'simultaneous' with gradient_noise, got another one"):
        descend(PROBLEM, START, steps=2, step=noisy, order="A first")


@pytest.mark.parametrize("which", range(len(OPTIMIZERS)))
def test_the_chosen_optimiser_is_the_one_that_moves(which):
    """In a program that holds all of them, with a traced choice and step size."""
    makers = {"gd": optax.sgd, "sign": optax.sign_sgd, "adam": optax.adam}
    assert list(makers) == list(OPTIMIZERS)

    @jax.jit
    def trained(which, step):
        optimizer = optax.chain(one_of([make() for make in OPTIMIZERS.values()], which), optax.scale(-step))
        return descend(PROBLEM, START, steps=9, step=optimizer, saves=4).observables["loss"]

    alone = descend(PROBLEM, START, steps=9, step=[*makers.values()][which](0.02), saves=4)
    np.testing.assert_allclose(trained(which, 0.02), alone.observables["loss"], rtol=1e-12)

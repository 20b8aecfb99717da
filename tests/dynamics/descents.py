"""Problems, starts and loops by hand that descents are compared with."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_flow import Adapter, SingleLayer, descend

RANK = 2
STOPS = (0, 1, 2, 3, 4, 5, 100, 200, 400)
STEPS = 402  # two beyond the last iteration that is saved


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def adapters_for(problem, seed, scale=0.5, rank=RANK):
    shapes = (((rank, n_in), (n_out, rank)) for n_out, n_in in problem.layers)
    return tuple(Adapter(*(scale * random(seed + shape[0], *shape) for shape in pair)) for pair in shapes)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


SINGLE = SingleLayer(0.6 * random(1, 4, 3))


def descended(problem, start, step, order="simultaneous", **options):
    """One program for each kind of problem, step and order."""
    return descend(problem, start, steps=STEPS, step=step, saves=STOPS, order=order, save_adapters=True, **options)


@eqx.filter_jit
def gradient(problem, adapters):
    return jax.grad(problem.loss)(adapters)


def at(history, index):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], history)


def by_hand(problem, start, eta, steps, order="simultaneous"):
    """A and B less eta times their gradients; in the other orders all A move, then all B by the gradient there."""
    turns, now = {"A first": "ab", "B first": "ba"}.get(order, ["ab"]), start
    for _ in range(steps):
        for factors in turns:
            slope = gradient(problem, now)
            now = tuple(
                x._replace(**{f: np.asarray(getattr(x, f)) - eta * np.asarray(getattr(dx, f)) for f in factors})
                for x, dx in zip(now, slope, strict=True)
            )
    return now


def by_optax(problem, start, optimiser, steps):
    @jax.jit
    def advance(adapters, state):
        updates, state = optimiser.update(jax.grad(problem.loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    adapters, state = start, optimiser.init(jax.tree.map(jnp.asarray, start))
    for _ in range(steps):
        adapters, state = advance(adapters, state)
    return adapters


def assert_same(ours, theirs, rtol=1e-11):
    ours, theirs = flat(ours), flat(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * np.abs(theirs).max())

"""What the tests of `solve` share."""

import jax.numpy as jnp
import numpy as np

from lora_flow import Adapter, SingleLayer, sweep


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


SQUARE = SingleLayer(random(8, 6, 6))
START = (Adapter(jnp.asarray(0.1 * random(9, 2, 6)), jnp.zeros((6, 2))),)


def swept(problem, **how):
    """One lane of a sweep: of its time alone."""
    return sweep(problem, alpha=0.1, rank=2, solver="Tsit5", progress=False, **how).squeeze()

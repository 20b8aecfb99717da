"""A three-layer perceptron of each kind that people have: plain JAX, Flax NNX, Flax Linen, Equinox; with its loss."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

SIZES = (3, 5, 4, 2)
COUNT = 7
rng = np.random.default_rng(0)
WEIGHTS = [rng.normal(size=(n_out, n_in)) / np.sqrt(n_in) for n_in, n_out in itertools.pairwise(SIZES)]
X, Y = rng.normal(size=(COUNT, SIZES[0])), rng.normal(size=(COUNT, SIZES[-1]))


def squares(predicted, y):
    return 0.5 * jnp.sum((predicted - y) ** 2) / len(y)


def plain():
    def loss(params, x, y):
        hidden = jnp.tanh(jnp.tanh(x @ params["w1"]) @ params["w2"])
        return squares(hidden @ params["w3"], y)

    return loss, {f"w{i}": w.T.copy() for i, w in enumerate(WEIGHTS, start=1)}


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        pairs = itertools.pairwise(SIZES)
        self.layers = nnx.List([nnx.Linear(*pair, use_bias=False, rngs=rngs, param_dtype=float) for pair in pairs])
        for layer, weight in zip(self.layers, WEIGHTS, strict=True):
            layer.kernel[...] = weight.T

    def __call__(self, x):
        *first, last = self.layers
        for layer in first:
            x = jnp.tanh(layer(x))
        return last(x)


def in_nnx():
    return lambda model, x, y: squares(model(x), y), Perceptron(nnx.Rngs(0))


def in_equinox():
    model = eqx.nn.MLP(
        SIZES[0], SIZES[-1], 4, 2, activation=jnp.tanh, use_bias=False, use_final_bias=False, key=jax.random.key(0)
    )
    layers = [eqx.tree_at(lambda of: of.weight, model.layers[0], jnp.asarray(w)) for w in WEIGHTS]
    model = eqx.tree_at(lambda of: of.layers, model, tuple(layers))
    return lambda model, x, y: squares(jax.vmap(model)(x), y), model


class InLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        for size in SIZES[1:-1]:
            x = jnp.tanh(linen.Dense(size, use_bias=False)(x))
        return linen.Dense(SIZES[-1], use_bias=False)(x)


def in_linen():
    params = {"params": {f"Dense_{i}": {"kernel": w.T} for i, w in enumerate(WEIGHTS)}}
    return lambda params, x, y: squares(InLinen().apply(params, x), y), params


MODELS = {"plain": plain, "nnx": in_nnx, "equinox": in_equinox, "linen": in_linen}
PATHS = {
    "plain": ("w1", "w2", "w3"),
    "nnx": ("layers/0", "layers/1", "layers/2"),
    "equinox": ("layers/0", "layers/1", "layers/2"),
    "linen": ("params/Dense_0", "params/Dense_1", "params/Dense_2"),
}

"""A network that trains in a test, with entries so large that each of its parts shows in the logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lora_flow_vision.config import ViTConfig
from lora_flow_vision.lora import linear_layers
from lora_flow_vision.model import ViT

from lora_flow import Adapter

CONFIG = ViTConfig(8, 4, 3, width=16, depth=2, heads=2, hidden=32, eps=1e-3)
SHALLOW = dataclasses.replace(CONFIG, depth=1)


def network(config=CONFIG, seed=0, dtype=jnp.float32):
    """Every parameter is drawn, biases and those of normalisations too."""
    graph, state = _split(config, dtype)
    rng, drawn = np.random.default_rng(seed), []
    for path, param in nnx.to_flat_state(state):
        centre = 1.0 if path[-1] == "scale" else 0.0
        drawn.append((path, param.replace(jnp.asarray(rng.normal(centre, 0.3, param.shape), jnp.float32))))
    return nnx.merge(graph, nnx.from_flat_state(drawn))


def shapes(config, dtype=jnp.float32):
    """The model without its numbers."""
    return nnx.merge(*_split(config, dtype))


@functools.cache
def _split(config, dtype):
    return nnx.split(nnx.eval_shape(lambda: ViT(config, nnx.Rngs(0), dtype)))


def logits(model, x):
    """In one compiled program, which is kept for models of the same structure."""
    return _logits(*nnx.split(model), jnp.asarray(x))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, state, x):
    return nnx.merge(graph, state)(x)


def images(count=6, config=CONFIG, seed=1):
    size = config.image_size
    return np.random.default_rng(seed).standard_normal((count, size, size, config.channels)).astype(np.float32)


def adapters(model, paths, rank=2, seed=2, scale=0.2):
    """Both factors drawn, by path."""
    rng, layers = np.random.default_rng(seed), linear_layers(model)
    shapes = {path: ((rank, layers[path].in_features), (layers[path].out_features, rank)) for path in paths}
    return {
        path: Adapter(*(jnp.asarray(scale * rng.standard_normal(s)) for s in both)) for path, both in shapes.items()
    }

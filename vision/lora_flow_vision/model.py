"""A Vision Transformer in Flax NNX. Its linear layers are the ones that LoRA adapts, by the paths of `lora.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lora_flow_vision.config import ViTConfig

DTYPE = jnp.float32  # of the weights, also where JAX's default is double precision


class PatchEmbedding(nnx.Module):
    """Tokens of an image: its patches times one matrix, behind the class token, plus positions.

    The matrix is that of a convolution whose stride is its size, with the patch flattened row by row, channels last.
    """

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.patch_size, self.dtype = config.patch_size, dtype
        normal = nnx.initializers.truncated_normal(0.02)
        entries = config.patch_size**2 * config.channels
        self.kernel = nnx.Param(normal(rngs.params(), (entries, config.width), DTYPE))
        self.bias = nnx.Param(jnp.zeros(config.width, DTYPE))
        self.class_token = nnx.Param(normal(rngs.params(), (config.width,), DTYPE))
        self.positions = nnx.Param(normal(rngs.params(), (config.tokens, config.width), DTYPE))

    def __call__(self, images: Float[Array, "batch size size channels"]) -> Float[Array, "batch tokens width"]:
        batch, size, _, channels = images.shape
        p, across = self.patch_size, size // self.patch_size
        patches = images.reshape(batch, across, p, across, p, channels).swapaxes(2, 3)
        patches = patches.reshape(batch, across**2, p * p * channels).astype(self.dtype)
        tokens = patches @ self.kernel[...].astype(self.dtype) + self.bias[...].astype(self.dtype)[None, None]
        first = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (batch, 1, tokens.shape[-1]))
        return jnp.concatenate([first, tokens], axis=1) + self.positions[...].astype(self.dtype)[None]


class Attention(nnx.Module):
    def __init__(self, config: ViTConfig, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.heads = config.heads
        self.query, self.key, self.value, self.output = (
            _linear(config.width, config.width, rngs, dtype) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(scores.astype(DTYPE), axis=-1).astype(x.dtype)
        return self.output(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape))

    def _split(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens heads depth"]:
        return x.reshape(*x.shape[:-1], self.heads, -1)


class Perceptron(nnx.Module):
    def __init__(self, config: ViTConfig, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.up = _linear(config.width, config.hidden, rngs, dtype)
        self.down = _linear(config.hidden, config.width, rngs, dtype)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class Block(nnx.Module):
    def __init__(self, config: ViTConfig, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.norm_attention, self.norm_mlp = _norm(config, rngs, dtype), _norm(config, rngs, dtype)
        self.attention, self.mlp = Attention(config, rngs, dtype), Perceptron(config, rngs, dtype)

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class ViT(nnx.Module):
    """Images `(batch, image_size, image_size, channels)` to logits `(batch, classes)`.

    `dtype` is that of activations and products (mixed precision with `jnp.bfloat16`); weights are single precision.
    """

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs, dtype: jnp.dtype = DTYPE):
        self.config = config
        self.embedding = PatchEmbedding(config, rngs, dtype)
        self.blocks = nnx.List([Block(config, rngs, dtype) for _ in range(config.depth)])
        self.norm = _norm(config, rngs, dtype)
        self.head = _linear(config.width, config.classes, rngs, dtype)

    def __call__(self, images: Float[Array, "batch size size channels"]) -> Float[Array, "batch classes"]:
        return self.head(self.features(images)).astype(DTYPE)

    def features(self, images: Float[Array, "batch size size channels"]) -> Float[Array, "batch width"]:
        """The class token behind the last normalisation, the head's input."""
        x = self.embedding(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


def _linear(n_in: int, n_out: int, rngs: nnx.Rngs, dtype: jnp.dtype) -> nnx.Linear:
    normal = nnx.initializers.truncated_normal(0.02)
    return nnx.Linear(n_in, n_out, kernel_init=normal, dtype=dtype, param_dtype=DTYPE, rngs=rngs)


def _norm(config: ViTConfig, rngs: nnx.Rngs, dtype: jnp.dtype) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.width, epsilon=config.eps, dtype=dtype, param_dtype=DTYPE, rngs=rngs)

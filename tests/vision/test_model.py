"""The Vision Transformer is the published one: against NumPy, a convolution, symmetry, and published sizes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lora_flow_vision.config import CONFIGS, ViTConfig
from lora_flow_vision.model import Perceptron
from lora_flow_vision.pretrain import Pretraining, pretrain
from lora_flow_vision.weights import layout, parameters
from scipy.special import erf, softmax
from small import CONFIG, images, logits, network, shapes

from lora_flow import InputError


def by_numpy(model, x):
    """Equations 1 to 4 of Dosovitskiy et al. 2021 in double precision, image by image and head by head."""
    config, weights = model.config, {path: np.asarray(value[...], float) for path, value in parameters(model).items()}
    p, depth = config.patch_size, config.width // config.heads

    def linear(path, z):
        return z @ weights[f"{path}/kernel"] + weights[f"{path}/bias"]

    def norm(path, z):
        centred = z - z.mean(-1, keepdims=True)
        spread = np.sqrt(centred.var(-1, keepdims=True) + config.eps)
        return centred / spread * weights[f"{path}/scale"] + weights[f"{path}/bias"]

    def one(image):
        corners = range(0, config.image_size, p)
        patches = np.stack([image[i : i + p, j : j + p].ravel() for i in corners for j in corners])
        z = np.vstack([weights["embedding/class_token"], linear("embedding", patches)]) + weights["embedding/positions"]
        for block in (f"blocks/{number}" for number in range(config.depth)):
            query, key, value = (
                np.split(linear(f"{block}/attention/{name}", norm(f"{block}/norm_attention", z)), config.heads, axis=1)
                for name in ("query", "key", "value")
            )
            heads = [softmax(q @ k.T / math.sqrt(depth), axis=1) @ v for q, k, v in zip(query, key, value, strict=True)]
            z = z + linear(f"{block}/attention/output", np.hstack(heads))
            inner = linear(f"{block}/mlp/up", norm(f"{block}/norm_mlp", z))
            z = z + linear(f"{block}/mlp/down", inner * (1 + erf(inner / math.sqrt(2))) / 2)
        return linear("head", norm("norm", z[0]))

    return np.stack([one(image) for image in x.astype(float)])


def test_the_logits_are_those_of_the_equations():
    """To single precision: 30 sums of 100 numbers of order 1."""
    model, x = network(), images()
    seen = logits(model, x)
    assert (seen.shape, seen.dtype) == ((6, 10), jnp.float32)
    np.testing.assert_allclose(seen, by_numpy(model, x), atol=2e-5)
    assert np.ptp(seen, axis=0).min() > 0.1  # the images differ, so equal logits say something


def test_the_patch_embedding_is_a_convolution_whose_stride_is_its_size():
    embedding, x = network().embedding, jnp.asarray(images())
    kernel = embedding.kernel[...].reshape(4, 4, 3, 16)
    convolved = jax.lax.conv_general_dilated(x, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    tokens = np.asarray(embedding(x) - embedding.positions[...][None])
    expected = np.asarray(convolved.reshape(6, 4, 16)) + np.asarray(embedding.bias[...])
    np.testing.assert_allclose(tokens[:, 1:], expected, atol=1e-5)
    np.testing.assert_allclose(tokens[:, 0], np.tile(embedding.class_token[...], (6, 1)), atol=1e-6)


def test_patches_may_change_places_if_they_take_their_positions_with_them():
    model, x = network(), images()
    order = np.random.default_rng(3).permutation(CONFIG.patches)
    assert np.any(order != np.arange(CONFIG.patches))
    tiles = x.reshape(-1, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(-1, 4, 4, 4, 3)[:, order]
    moved = tiles.reshape(-1, 2, 2, 4, 4, 3).swapaxes(2, 3).reshape(x.shape)
    before, without_positions = np.asarray(logits(model, x)), logits(model, moved)
    positions = model.embedding.positions
    positions[...] = positions[...][np.r_[0, 1 + order]]
    np.testing.assert_allclose(logits(model, moved), before, atol=1e-5)
    assert np.abs(without_positions - before).max() > 0.1


def test_attention_moves_its_outputs_as_its_inputs_are_moved():
    attention = network().blocks[0].attention
    x = np.random.default_rng(4).standard_normal((2, CONFIG.tokens, CONFIG.width)).astype(np.float32)
    order = np.array([3, 0, 4, 1, 2])
    seen, moved = (np.asarray(attention(jnp.asarray(one))) for one in (x, x[:, order]))
    np.testing.assert_allclose(moved, seen[:, order], atol=1e-6)


def test_gelu_is_the_exact_one():
    """The tanh approximation is 4.7e-4 off at 2.7, a thousand times the rounding of single precision."""
    config = ViTConfig(4, 4, 1, width=1, depth=1, heads=1, hidden=1)
    unit = Perceptron(config, nnx.Rngs(0), jnp.float32)
    unit.up.kernel[...], unit.down.kernel[...] = jnp.ones((1, 1), jnp.float32), jnp.ones((1, 1), jnp.float32)
    x = np.linspace(-5, 5, 101)
    seen = unit(jnp.asarray(x, jnp.float32).reshape(1, -1, 1))[0, :, 0]
    np.testing.assert_allclose(seen, x * (1 + erf(x / math.sqrt(2))) / 2, atol=1e-6)


def test_in_bfloat16_logits_keep_two_digits_and_weights_all():
    """bfloat16 rounds by up to 2^-9 = 0.2%; through two blocks that grows to about 1% of the logits' spread."""
    x = images()
    model = network(dtype=jnp.bfloat16)
    exact, rounded = logits(network(), x), logits(model, x)
    assert rounded.dtype == jnp.float32
    made = parameters(shapes(CONFIG, jnp.bfloat16)).values()
    assert {param.dtype for param in made} == {jnp.dtype(jnp.float32)}
    error = np.sqrt(np.mean((np.asarray(rounded) - exact) ** 2)) / np.std(exact)
    assert 1e-3 < error < 0.03


@pytest.mark.parametrize("config", [CONFIG, CONFIGS["tiny"]])
def test_each_parameter_has_one_array_in_a_checkpoint(config):
    found = parameters(shapes(config))
    entries = layout(config)
    assert sorted(found) == sorted(entries)
    assert len({entry.name for entry in entries.values()}) == len(entries)


@pytest.mark.parametrize(
    ("name", "published"), [("vit-small", 22_050_664), ("vit-base", 86_567_656), ("vit-large", 304_326_632)]
)
def test_the_published_sizes_have_the_published_numbers_of_parameters(name, published):
    """Those of timm's vit_{small,base,large}_patch16_224; all blocks have as many."""
    shallow, deeper = (count(dataclasses.replace(CONFIGS[name], depth=depth)) for depth in (0, 1))
    assert shallow + CONFIGS[name].depth * (deeper - shallow) == published


def count(config):
    return sum(math.prod(param.shape) for param in parameters(shapes(config)).values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_size": 10}, r"image_size must be a multiple of patch_size \(4\), got 10"),
        ({"heads": 3}, r"width must be a multiple of heads \(3\), got 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(InputError, match=message):
        ViTConfig(**(vars(CONFIG) | changed))


def test_two_epochs_of_pretraining_lower_the_loss_and_depend_on_nothing_but_the_seed():
    """The loss is told before the first step and after a hundred."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 208)
    distance = np.abs(np.arange(8) - 3.5).clip(min=1.5)
    squares = (np.maximum(distance[:, None], distance[None]) < np.where(labels == 1, 2, 3)[:, None, None])[..., None]
    config = ViTConfig(8, 4, 1, width=16, depth=1, heads=2, hidden=32, classes=2)
    weights, losses = [], []
    for _ in range(2):
        told = []
        how = Pretraining(config, epochs=2, batch_size=4, rate=1e-2, seed=7)
        model = pretrain(squares.astype(np.float32), labels, how, lambda *seen, told=told: told.append(seen))
        weights.append({path: np.asarray(value[...]) for path, value in parameters(model).items()})
        losses.append(dict(told))
    assert losses[0].keys() == {0, 100}
    assert losses[0][100] < 0.5 * losses[0][0]
    assert losses[1] == losses[0]
    for path, first in weights[0].items():
        np.testing.assert_array_equal(weights[1][path], first)

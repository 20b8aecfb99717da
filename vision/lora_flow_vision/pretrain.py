"""Pretrains the shipped small backbone: `python -m lora_flow_vision.pretrain --data fashion-mnist --out FOLDER`.

Labels alone give features that serve another task worse than its pixels do. So the class token must do two things at
once: name the garment, and let a linear map redraw the image at half its resolution. Images are turned, scaled and
shifted at random, and a part of them is replaced by outlines, so that strokes are not foreign to the features.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from lora_flow_vision.check import features_of
from lora_flow_vision.config import CONFIGS, ViTConfig
from lora_flow_vision.data import epochs, load_dataset, prepare
from lora_flow_vision.model import DTYPE, ViT
from lora_flow_vision.weights import save_vit

SMOOTHING = 0.1  # of labels
REDRAWN = 4.0  # weight of the redrawn image beside the label
OUTLINED = 0.5  # share of images that are replaced by their outlines


class Pretraining(NamedTuple):
    config: ViTConfig
    epochs: int = 30
    batch_size: int = 256
    rate: float = 2e-3
    decay: float = 0.05
    seed: int = 0


class Pretrainer(nnx.Module):
    """The model, and the linear map that redraws an image from its features."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.vit = ViT(config, rngs)
        self.decoder = nnx.Linear(config.width, (config.image_size // 2) ** 2, param_dtype=DTYPE, rngs=rngs)

    def __call__(self, images: Float[Array, "batch size size channels"]) -> tuple[Array, Array]:
        features = self.vit.features(images)
        return self.vit.head(features), self.decoder(features)


def augment(key: Array, images: Float[Array, "batch size size channels"]) -> Float[Array, "batch size size channels"]:
    """Each image turned by up to 30 degrees, scaled by 0.7 to 1.3, shifted by up to 4 pixels, some as outlines."""
    size = images.shape[1]

    def warp(key: Array, image: Array) -> Array:
        turn, scale, shift, outline = jax.random.split(key, 4)
        angle = jax.random.uniform(turn, (), DTYPE, -math.pi / 6, math.pi / 6)
        stretch = jnp.exp(jax.random.uniform(scale, (2,), DTYPE, -0.3, 0.3))
        offset = jax.random.uniform(shift, (2,), DTYPE, -4, 4)
        centred = jnp.stack(jnp.meshgrid(jnp.arange(size), jnp.arange(size), indexing="ij")) - (size - 1) / 2
        rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
        places = jnp.einsum("ij,jxy->ixy", rotation * stretch[:, None], centred.astype(DTYPE))
        places = places + (offset + (size - 1) / 2)[:, None, None]
        warped = jax.scipy.ndimage.map_coordinates(image[..., 0], list(places), order=1)
        drawn = jnp.where(jax.random.bernoulli(outline, OUTLINED), outlines(warped), warped)
        return drawn[..., None]

    return jax.vmap(warp)(jax.random.split(key, len(images)), images)


def outlines(image: Float[Array, "size size"]) -> Float[Array, "size size"]:
    """The size of the image's gradient, its largest value 1."""
    rows, columns = jnp.gradient(image)
    edges = jnp.sqrt(rows**2 + columns**2 + 1e-12)
    return edges / jnp.maximum(edges.max(), 0.1)


def loss(model: Pretrainer, images: Array, labels: Int[Array, " batch"]) -> Array:
    logits, redrawn = model(2 * images - 1)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=DTYPE), SMOOTHING)
    size = images.shape[1] // 2
    halved = images[..., 0].reshape(len(images), size, 2, size, 2).mean((2, 4)).reshape(len(images), -1)
    return optax.softmax_cross_entropy(logits, targets).mean() + REDRAWN * jnp.mean((redrawn - 2 * halved + 1) ** 2)


def pretrain(
    images: Float[np.ndarray, "count size size channels"],
    labels: Int[np.ndarray, " count"],
    how: Pretraining,
    told: Callable[[int, float], None] = lambda step, loss: None,
) -> ViT:
    """A model trained on images in 0 ... 1 by AdamW with a cosine schedule; `told` hears of every hundredth step."""
    model = Pretrainer(how.config, nnx.Rngs(how.seed))
    steps = how.epochs * (len(images) // how.batch_size)
    schedule = optax.warmup_cosine_decay_schedule(0.0, how.rate, min(500, steps // 10), steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=how.decay), wrt=nnx.Param)
    key = jax.random.key(how.seed)

    @nnx.jit
    def step(model: Pretrainer, optimizer: nnx.Optimizer, number: Array, images: Array, labels: Array) -> Array:
        seen = augment(jax.random.fold_in(key, number), images.astype(DTYPE))
        value, slope = nnx.value_and_grad(loss)(model, seen, labels)
        optimizer.update(model, slope)
        return value

    advance: Any = nnx.cached_partial(step, model, optimizer)
    for number, chosen in enumerate(epochs(how.seed, len(images), how.batch_size, steps)):
        value = advance(jnp.asarray(number), images[chosen], labels[chosen])
        if number % 100 == 0:
            told(number, float(value))
    return model.vit


def linear_probe(model: ViT, name: str = "digits") -> float:
    """Test accuracy of a logistic regression on the features of a data set's images."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    data, config = load_dataset(name), model.config
    ready = functools.partial(prepare, size=config.image_size, channels=config.channels, mean=0.5, std=0.5)
    train, test = (np.asarray(features_of(model, split.images, ready)) for split in (data.train, data.test))
    scale = StandardScaler().fit(train)
    probe = LogisticRegression(C=0.1, max_iter=2000).fit(scale.transform(train), data.train.labels)
    return float(probe.score(scale.transform(test), data.test.labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="mnist or fashion-mnist")
    parser.add_argument("--data-dir", type=Path, help="the folder of the data set's files")
    parser.add_argument("--config", default="tiny", choices=CONFIGS)
    parser.add_argument("--epochs", type=int, default=Pretraining(CONFIGS["tiny"]).epochs)
    parser.add_argument("--out", type=Path, required=True, help="the folder for config.json and model.safetensors")
    chosen = parser.parse_args()
    how = Pretraining(CONFIGS[chosen.config], epochs=chosen.epochs)
    data = load_dataset(chosen.data, chosen.data_dir)
    images, config = [prepare(split.images, how.config.image_size, 1, 0.0, 1.0) for split in data[1:3]], how.config
    began = time.perf_counter()
    steps = how.epochs * (len(images[0]) // how.batch_size)

    def told(step: int, value: float) -> None:
        print(f"step {step} of {steps}, loss {value:.4f}, {time.perf_counter() - began:.0f} s", flush=True)

    model = pretrain(images[0], data.train.labels, how, told)
    save_vit(model, chosen.out)
    graph, state = nnx.split(model)
    predict = jax.jit(lambda images: nnx.merge(graph, state)(2 * images - 1).argmax(-1))
    accuracy = np.mean(np.asarray(predict(images[1])) == data.test.labels)
    print(f"{config} after {time.perf_counter() - began:.0f} s: {chosen.data} test accuracy {accuracy:.3f}, ", end="")
    print(f"linear probe on digits {linear_probe(model):.3f}; written to {chosen.out}")


if __name__ == "__main__":
    main()

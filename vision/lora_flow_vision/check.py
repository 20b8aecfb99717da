"""The image check: loads model and data, trains every lane by every method, and stores the measurements."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from lora_flow import Adapters, solve
from lora_flow.checks import require
from lora_flow.runtime.memory import require_memory
from lora_flow.runtime.progress import Progress
from lora_flow_vision.base import base_model
from lora_flow_vision.config import ViTConfig
from lora_flow_vision.data import epochs, load_dataset, prepare
from lora_flow_vision.folder import Unit, units
from lora_flow_vision.lora import Spec, choose
from lora_flow_vision.measures import measure, targets
from lora_flow_vision.model import DTYPE, ViT
from lora_flow_vision.results import VisionFolder, saved_steps
from lora_flow_vision.settings import HEAD, VisionSettings
from lora_flow_vision.starts import start
from lora_flow_vision.task import Classification, HeadTask, NetworkTask
from lora_flow_vision.training import train
from lora_flow_vision.weights import parameters

FEATURES_AT_ONCE = 256  # images


class Bench(NamedTuple):
    """The data of all lanes: the task, test data, the layers that carry LoRA, their negative one-step gradients."""

    task: Classification
    test: tuple[Array, Array]
    paths: tuple[str, ...]
    gradients: tuple[Array, ...]


def build(settings: VisionSettings, folder: Path) -> tuple[Bench, dict[str, Any]]:
    """The bench for these settings and the checkpoint in `folder`, and attributes that say what it was made of.

    **Raises:** `InputError` for data, weights, layers or ranks that are missing, damaged or do not fit.
    """
    data = load_dataset(settings.data, settings.data_dir or None)
    weights = base_model(settings, folder, len(data.classes))
    model = weights.model
    for rank in settings.rank:
        paths = tuple(choose(model, [Spec(settings.layers, rank, settings.scaling)]))
    end = settings.limit or None
    train_labels, test_labels = (split.labels[:end] for split in (data.train, data.test))
    most = len(train_labels)
    require(settings.batch_size <= most, "batch_size", f"be at most {most}, the training images", settings.batch_size)
    ready = functools.partial(
        prepare, size=model.config.image_size, channels=model.config.channels, mean=weights.mean, std=weights.std
    )
    train_images, test_images = (split.images[:end] for split in (data.train, data.test))
    if settings.layers == HEAD:
        head = parameters(model)
        kernel, bias = (np.asarray(head[f"head/{name}"][...]) for name in ("kernel", "bias"))
        inputs, held_out = (features_of(model, images, ready) for images in (train_images, test_images))
        task: Classification = HeadTask(inputs, train_labels, kernel.T, bias, settings.scaling, dtype=DTYPE)
    else:
        count = len(train_images) + len(test_images)
        size = 4 * model.config.image_size**2 * model.config.channels
        require_memory("limit", f"{count} images", float(count * size))
        task = NetworkTask(model, ready(train_images), train_labels, paths, settings.scaling)
        held_out = jnp.asarray(ready(test_images))
    gradients = _linearised_task(task)
    flat = [path for path, one in zip(paths, gradients, strict=True) if not np.any(np.asarray(one))]
    require(not flat, "layers", "have a one-step gradient that is not zero", ", ".join(flat))
    bench = Bench(task, (held_out, jnp.asarray(test_labels, jnp.int32)), paths, gradients)
    _check_room(bench, settings)
    attrs = {
        "data_name": data.name,
        "train_images": len(train_labels),
        "test_images": len(test_labels),
        "adapted": list(paths),
        "classes": len(data.classes),
        "gradient_norms": [float(np.linalg.norm(np.asarray(one), 2)) for one in gradients],
        "digest": _digest(bench),
        "jax_version": jax.__version__,
    }
    return bench, attrs


def features_of(model: ViT, images: np.ndarray, ready: Callable[[np.ndarray], np.ndarray]) -> Array:
    """The head's inputs, `(count, width)`, for images that `ready` makes fit for the model, some at a time."""
    graph, state = nnx.split(model)
    each = _bytes_an_image(model.config)
    require_memory("image_size", model.config.image_size, float(each))
    at_once = max(1, min(FEATURES_AT_ONCE, 2**31 // each))  # never by what is free: bits depend on it
    parts = [images[first : first + at_once] for first in range(0, len(images), at_once)]
    return jnp.concatenate([_features(graph, state, ready(part)) for part in parts])


@functools.partial(jax.jit, static_argnums=0)
def _features(graph: Any, state: Any, images: Array) -> Array:
    return nnx.merge(graph, state).features(images).astype(DTYPE)


@eqx.filter_jit
def _linearised_task(task: Classification) -> tuple[Any, ...]:
    return task.linearised_task()


def _bytes_an_image(config: ViTConfig) -> int:
    """The approximate memory of one image in the network: the image, a block's activations and its attention."""
    block = config.tokens * (8 * config.width + 2 * config.hidden + 2 * config.heads * config.tokens)
    return 4 * (config.image_size**2 * config.channels + block)


def _check_room(bench: Bench, settings: VisionSettings) -> None:
    """The adapters of all lanes that train together, with their gradients and an optimiser's moments."""
    together = len(settings.alphas) * len(units(settings)[0].seeds)
    sizes = sum(sum(shape) for shape in bench.task.layers) * max(settings.rank)
    require_memory("seeds", f"{together} runs at once", 4.0 * 6 * together * sizes)


def run(folder: VisionFolder, bench: Bench, progress: bool = True) -> None:
    """Trains the pending units and stores each when it is done."""
    settings, pending = folder.settings, folder.pending()
    with Progress(settings.steps * len(pending), "steps", shown=progress) as bar:
        for unit in pending:
            bar.describe(f"{unit.optimizer} {unit.init} rank {unit.rank}")
            if unit.optimizer == "flow":
                adapters, seen = flow(bench, settings, unit)
                bar.update(settings.steps)
            else:
                adapters, seen = descend(bench, settings, unit, folder, bar)
            shape = len(settings.alphas), len(unit.seeds)
            grid = {name: np.asarray(values).reshape(*shape, -1) for name, values in seen.items()}
            stored = jax.tree.map(lambda leaf, shape=shape: np.asarray(leaf).reshape(*shape, *leaf.shape[1:]), adapters)
            folder.write(unit, grid, dict(zip(bench.paths, stored, strict=True)))


def descend(
    bench: Bench, settings: VisionSettings, unit: Unit, folder: VisionFolder, bar: Any
) -> tuple[Adapters, dict[str, np.ndarray]]:
    """A unit by steps of sgd or adam, in the network's precision."""
    starts = jax.tree.map(lambda leaf: leaf.astype(DTYPE), starts_of(bench, settings, unit))
    batches = None
    if settings.batch_size:
        count = len(bench.task.labels)
        by_seed = {seed: epochs(seed, count, settings.batch_size, settings.steps) for seed in unit.seeds}
        batches = np.stack([by_seed[seed] for _, seed in _lanes(settings, unit)])
    return train(
        bench.task,
        starts,
        optimizer=_optimizer(unit.optimizer, settings.sgd_rate, settings.adam_rate),
        saves=saved_steps(settings.steps),
        look=_look,
        shared=(bench.test, targets(bench.gradients, unit.rank)),
        batches=batches,
        folder=folder.checkpoints(unit),
        stepped=bar.update,
    )


def flow(bench: Bench, settings: VisionSettings, unit: Unit) -> tuple[Adapters, dict[str, np.ndarray]]:
    """A unit by the gradient flow, in double precision where JAX has it; lanes of one alpha are solved together."""
    task = jax.tree.map(lambda leaf: leaf.astype(float) if eqx.is_inexact_array(leaf) else leaf, bench.task)
    starts = starts_of(bench, settings, unit)
    shared = bench.test[0].astype(float), bench.test[1]
    times = settings.sgd_rate * saved_steps(settings.steps)
    aims, together, parts = targets(bench.gradients, unit.rank), len(unit.seeds), []
    for first in range(0, len(settings.alphas) * together, together):
        chosen = jax.tree.map(lambda leaf, first=first: leaf[first : first + together], starts)
        parts.append(jax.tree.map(np.asarray, _flow(task, chosen, jnp.asarray(times), (shared, aims))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


@eqx.filter_jit
def _flow(task: Classification, starts: Adapters, times: Array, shared: Any) -> tuple[Adapters, dict[str, Array]]:
    def one(begin: Adapters) -> tuple[Adapters, dict[str, Array]]:
        solved = solve(task, begin, t1=times[-1], saves=times, save_adapters=True, derivatives="forward")
        seen = jax.lax.map(lambda state: _look(task, state, shared), solved.history)
        return solved.adapters, seen  # NaN at times that were not reached

    return jax.vmap(one)(starts)


def starts_of(bench: Bench, settings: VisionSettings, unit: Unit) -> Adapters:
    """The adapters of a unit's lanes, `(lanes, ...)`: alphas, and for each of them seeds."""
    alphas, seeds = map(np.array, zip(*_lanes(settings, unit), strict=True))

    return _draw(unit.init, unit.rank, alphas, seeds, bench.gradients)


@eqx.filter_jit
def _draw(init: str, rank: int, alphas: Any, seeds: Any, gradients: tuple[Array, ...]) -> Adapters:
    def one(alpha: Array, seed: Array) -> Adapters:
        return start(init, jax.random.key(seed), gradients, rank=rank, alpha=alpha)

    return jax.vmap(one)(alphas, seeds)


def _look(task: Classification, adapters: Adapters, shared: Any) -> dict[str, Array]:
    test, aims = shared
    return measure(task, test, aims, adapters)


@functools.cache  # programs are compiled for an optimiser, and kept with it
def _optimizer(name: str, sgd_rate: float, adam_rate: float) -> optax.GradientTransformation:
    return optax.sgd(sgd_rate) if name == "sgd" else optax.adam(adam_rate)


def _lanes(settings: VisionSettings, unit: Unit) -> list[tuple[float, int]]:
    return [(alpha, seed) for alpha in settings.alphas for seed in unit.seeds]


def _digest(bench: Bench) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(eqx.filter((bench.task, bench.test), eqx.is_array)):
        digest.update(np.ascontiguousarray(leaf).data.cast("B"))
    return digest.hexdigest()[:16]

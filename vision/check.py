"""The image check: loads model and data, trains every lane by every method, and stores what was measured."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array
from tqdm import tqdm

from lora_flow import Adapters, solve
from lora_flow.checks import require
from vision.config import CONFIGS
from vision.data import Dataset, epochs, load_dataset, prepare
from vision.lora import Spec, choose
from vision.measures import measure, targets
from vision.model import DTYPE, ViT
from vision.results import Unit, VisionFolder, saved_steps
from vision.settings import HEAD, VisionSettings
from vision.starts import start
from vision.task import Classification, HeadTask, NetworkTask
from vision.training import train
from vision.weights import SHIPPED, Pretrained, fetch, load_vit, parameters

FEATURES_AT_ONCE = 256  # images


class Bench(NamedTuple):
    """What all lanes share: the task, test data, the layers that carry LoRA, and their negative one-step gradients."""

    task: Classification
    test: tuple[Array, Array]
    paths: tuple[str, ...]
    gradients: tuple[Array, ...]


def build(settings: VisionSettings) -> tuple[Bench, dict[str, Any]]:
    """The bench for these settings, and attributes that say what it was made of.

    **Raises:** `InputError` for data, weights, layers or ranks that are missing, damaged or do not fit.
    """
    data = load_dataset(settings.data, settings.data_dir or None)
    weights = load_weights(settings, len(data.classes))
    model = weights.model
    chosen = {rank: tuple(choose(model, [Spec(settings.layers, rank, settings.scaling)])) for rank in settings.rank}
    paths = chosen[settings.rank[0]]
    train_images, test_images = images_of(data, weights, settings)
    train_labels, test_labels = (split.labels[: settings.limit or None] for split in (data.train, data.test))
    require(
        settings.batch_size <= len(train_labels), "batch_size", f"be at most {len(train_labels)}", settings.batch_size
    )
    if settings.layers == HEAD:
        head = parameters(model)
        kernel, bias = (np.asarray(head[f"head/{name}"][...]) for name in ("kernel", "bias"))
        inputs, held_out = (features_of(model, images) for images in (train_images, test_images))
        task: Classification = HeadTask(inputs, train_labels, kernel.T, bias, settings.scaling, dtype=DTYPE)
    else:
        task = NetworkTask(model, train_images, train_labels, dict.fromkeys(paths, settings.scaling))
        held_out = jnp.asarray(test_images)
    gradients = jax.jit(lambda task: task.linearised_task())(task)
    bench = Bench(task, (held_out, jnp.asarray(test_labels, jnp.int32)), paths, gradients)
    attrs = {
        "data_name": data.name,
        "train_images": len(train_labels),
        "test_images": len(test_labels),
        "adapted": list(paths),
        "gradient_singular_values": np.linalg.svd(np.asarray(gradients[0]), compute_uv=False)[:10].tolist(),
        "digest": _digest(bench),
        "jax_version": jax.__version__,
    }
    return bench, attrs


def load_weights(settings: VisionSettings, classes: int) -> Pretrained:
    """The pretrained model with a head for so many classes.

    **Raises:** `InputError` where there is none, or it is not of the config that was asked for.
    """
    local = settings.weights == "shipped" or Path(settings.weights).is_dir()
    if not local:
        named = settings.weights.count("/") == 1 and not settings.weights.startswith((".", "/", "~"))
        require(named, "weights", "be shipped, a folder, or a name on the hub", f"'{settings.weights}'")
    folder = SHIPPED if settings.weights == "shipped" else Path(settings.weights) if local else fetch(settings.weights)
    dtype = jnp.bfloat16 if settings.precision == "bfloat16" else DTYPE
    weights = load_vit(folder, image_size=settings.image_size or None, classes=classes, dtype=dtype)
    if settings.config:
        require(settings.config in CONFIGS, "config", f"be one of {', '.join(CONFIGS)}", settings.config)
        expected, found = CONFIGS[settings.config], weights.model.config
        for name in ("patch_size", "channels", "width", "depth", "heads", "hidden"):
            got = f"{getattr(found, name)} in '{folder}'; --weights names others"
            require(getattr(found, name) == getattr(expected, name), f"{name} of config {settings.config}",
                    f"be {getattr(expected, name)}", got)  # fmt: skip
    return weights


def images_of(data: Dataset, weights: Pretrained, settings: VisionSettings) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images as the model takes them."""
    config, end = weights.model.config, settings.limit or None
    train_images, test_images = (
        prepare(split.images[:end], config.image_size, config.channels, weights.mean, weights.std)
        for split in (data.train, data.test)
    )
    return train_images, test_images


def features_of(model: ViT, images: np.ndarray) -> Array:
    """What the head sees, `(count, width)`, for all images."""
    graph, state = nnx.split(model)

    @jax.jit
    def features(state: Any, images: Array) -> Array:
        return nnx.merge(graph, state).features(images).astype(DTYPE)

    parts = [features(state, images[i : i + FEATURES_AT_ONCE]) for i in range(0, len(images), FEATURES_AT_ONCE)]
    return jnp.concatenate(parts)


def run(folder: VisionFolder, bench: Bench, progress: bool = True) -> None:
    """Trains what is pending and stores each unit when it is done."""
    settings, pending = folder.settings, folder.pending()
    with tqdm(total=settings.steps * len(pending), unit="step", disable=not progress, smoothing=0.1) as bar:
        for unit in pending:
            bar.set_description(f"{unit.optimizer} {unit.init} rank {unit.rank}")
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
    task = jax.tree.map(
        lambda leaf: leaf.astype(float) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf, bench.task
    )
    starts = starts_of(bench, settings, unit)
    shared = bench.test[0].astype(float), bench.test[1]
    times = settings.sgd_rate * saved_steps(settings.steps)
    aims, together, parts = targets(bench.gradients, unit.rank), len(unit.seeds), []
    for first in range(0, len(settings.alphas) * together, together):
        chosen = jax.tree.map(lambda leaf, first=first: leaf[first : first + together], starts)
        parts.append(jax.tree.map(np.asarray, _flow(task, chosen, jnp.asarray(times), (shared, aims))))
    status = np.concatenate([part[2] for part in parts])
    require(not status.any(), "the flow", f"reach t = {times[-1]:g}", f"a run that failed, in {unit.name}")
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *(part[:2] for part in parts))


@eqx.filter_jit
def _flow(
    task: Classification, starts: Adapters, times: Array, shared: Any
) -> tuple[Adapters, dict[str, Array], Array]:
    def one(begin: Adapters) -> tuple[Adapters, dict[str, Array], Array]:
        solved = solve(task, begin, t1=times[-1], saves=times, save_adapters=True, adjoint=diffrax.ForwardMode())
        seen = jax.lax.map(lambda state: _look(task, state, shared), solved.history)
        return solved.adapters, seen, solved.status

    return jax.vmap(one)(starts)


def starts_of(bench: Bench, settings: VisionSettings, unit: Unit) -> Adapters:
    """The adapters of a unit's lanes, `(lanes, ...)`: alphas, and for each of them seeds."""
    alphas, seeds = map(np.array, zip(*_lanes(settings, unit), strict=True))

    @jax.jit
    def draw(alphas: Array, seeds: Array, gradients: tuple[Array, ...]) -> Adapters:
        def one(alpha: Array, seed: Array) -> Adapters:
            return start(unit.init, jax.random.key(seed), gradients, rank=unit.rank, alpha=alpha)

        return jax.vmap(one)(alphas, seeds)

    return draw(alphas, seeds, bench.gradients)


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
    for leaf in jax.tree.leaves((bench.task, bench.test)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]

"""The frozen model of a check: shipped with this package, in a folder, or at a commit of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from lora_flow.checks import require
from lora_flow_vision.config import CONFIGS
from lora_flow_vision.hub import Snapshot, fetch, is_name
from lora_flow_vision.model import DTYPE
from lora_flow_vision.settings import HEAD, VisionSettings
from lora_flow_vision.weights import SHIPPED, Pretrained, load_vit, parameters


def checkpoint(settings: VisionSettings) -> Snapshot:
    """The folder of the weights, fetched if need be, and their commit, "" for weights that are not the hub's.

    **Raises:** `InputError` where the weights do not exist, or where weights without revisions are asked for one.
    """
    if settings.weights != "shipped" and not Path(settings.weights).expanduser().is_dir() and is_name(settings.weights):
        return fetch(settings.weights, settings.revision)
    must = "be left out unless weights is a name on the hub"
    require(not settings.revision, "revision", must, repr(settings.revision))
    folder = SHIPPED if settings.weights == "shipped" else Path(settings.weights).expanduser()
    must = "be shipped, a folder that exists, or a name on the hub"
    got = f"'{settings.weights}'{', a file: give its folder' * folder.is_file()}"
    require(folder.is_dir(), "weights", must, got)
    return Snapshot(folder, "")


def base_model(settings: VisionSettings, folder: Path, classes: int) -> Pretrained:
    """The frozen model that carries the adapters, of the checkpoint in `folder`, with a new head for so many classes.

    The head is zero where LoRA is on the head alone. Behind a zero head no other layer has a gradient, so with other
    layers the head's weights are drawn with standard deviation 0.02, always the same.

    **Raises:** `InputError` where the weights do not have the config that was asked for.
    """
    dtype = jnp.bfloat16 if settings.precision == "bfloat16" else DTYPE
    weights = load_vit(folder, image_size=settings.image_size or None, classes=classes, dtype=dtype)
    if settings.config:
        expected, found = CONFIGS[settings.config], weights.model.config
        for name in ("patch_size", "channels", "width", "depth", "heads", "hidden"):
            same = getattr(found, name) == getattr(expected, name)
            got = f"{getattr(found, name)} in '{folder}'; --weights names others"
            require(same, f"{name} of config {settings.config}", f"be {getattr(expected, name)}", got)
    if settings.layers != HEAD:
        kernel = parameters(weights.model)["head/kernel"]
        kernel[...] = 0.02 * jax.random.truncated_normal(jax.random.key(0), -2.0, 2.0, kernel.shape, DTYPE)
    return weights

"""Folders of Hugging Face's checkpoints: the sizes and images that they are for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_flow.bridge.checkpoints import ARRAYS
from lora_flow.checks import require
from lora_flow.storage.tensors import Tensor, is_number, read_json
from lora_flow_vision import looks
from lora_flow_vision.config import ViTConfig

FILES = ("config.json", ARRAYS)
PROCESSOR = "preprocessor_config.json"
MOST = 2**16  # for any number of a config: five times what the largest of published ViTs has
KEYS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "channels": "num_channels",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "eps": "layer_norm_eps",
}


def require_vit(stored: Mapping[str, Any], where: str) -> None:
    """Raises unless a config describes a plain ViT, as far as it tells by itself."""
    fits = stored.get("model_type") in ("vit", "deit")
    require(fits, where, "describe a model of type vit", looks.other_model(stored))
    require("quantization_config" not in stored, where, "be of weights that were not quantised", "quantization_config")
    require(stored.get("hidden_act", "gelu") == "gelu", where, "have hidden_act gelu", stored.get("hidden_act"))


def config_of(stored: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> ViTConfig:
    """The sizes that a config tells, which are sane, and of a plain ViT."""
    where = str(folder / FILES[0])
    require_vit(stored, where)
    distilled = any("distillation" in name for name in tensors)
    require(not distilled, where, "describe a model of type vit", looks.other_model(stored))
    missing = [theirs for theirs in KEYS.values() if theirs not in stored]
    require(not missing, where, f"hold {', '.join(KEYS.values())}", f"no {', '.join(missing)}")
    values = {ours: _size(stored[theirs], theirs, where) for ours, theirs in KEYS.items()}
    head = tensors.get("classifier.bias")
    classes = head.shape[0] if head is not None and len(head.shape) == 1 else 1000
    deep = f"be at most {len(tensors)}, the number of arrays"
    require(values["depth"] <= len(tensors), f"num_hidden_layers in {where}", deep, values["depth"])
    config = ViTConfig(**values, classes=classes)
    wide = stored.get("head_dim") or config.width // config.heads
    require(wide * config.heads == config.width, where, "have heads that share out hidden_size", f"head_dim {wide}")
    return config


def _size(value: Any, name: str, where: str) -> Any:
    """A number of the config; transformers takes the sides of images and patches as pairs too."""
    if isinstance(value, list) and len(set(map(str, value))) == 1:
        value = value[0]
    positive = is_number(value) and value > 0
    if name == "layer_norm_eps":
        require(positive, where, f"have a positive number as {name}", value)
        return value
    require(positive and isinstance(value, int), where, f"have a positive integer as {name}", value)
    require(value <= MOST, where, f"have at most {MOST} as {name}", value)
    return value


def normalisation(path: Path, channels: int) -> tuple[Any, Any]:
    """The mean and the standard deviation of images scaled to 0..1, one number or one for each channel."""
    how = read_json(path) if path.is_file() else {}
    scaled = how.get("rescale_factor", 1 / 255)
    fits = is_number(scaled) and math.isclose(scaled, 1 / 255, rel_tol=1e-3)
    require(fits, f"rescale_factor in {path}", "be 1/255", scaled)
    if how.get("do_normalize", True) is False:
        return 0.0, 1.0
    found = []
    for name in ("image_mean", "image_std"):
        value = how.get(name, 0.5)
        listed = value if isinstance(value, list) else [value]
        fits = (
            all(map(is_number, listed)) and len(listed) in (1, channels) and (name == "image_mean" or min(listed) > 0)
        )
        must = f"be {'positive' if name == 'image_std' else 'a number'}, or {channels} of them"
        require(fits, f"{name} in {path}", must, value)
        found.append(value)
    return found[0], found[1]

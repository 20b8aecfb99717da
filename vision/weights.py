"""Weights in the layout of Hugging Face's ViT checkpoints: `model.safetensors` and `config.json` in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lora_flow.checks import InputError, require
from vision.config import ViTConfig
from vision.model import DTYPE, ViT

SHIPPED = Path(__file__).parent / "pretrained"
FILES = ("config.json", "model.safetensors")
BLOCK = {
    "norm_attention": "layernorm_before",
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/output": "attention.output.dense",
    "norm_mlp": "layernorm_after",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
}
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


class Pretrained(NamedTuple):
    """A model and the mean and standard deviation that its images are normalised by."""

    model: ViT
    mean: float | list[float] = 0.5
    std: float | list[float] = 0.5


class _Entry(NamedTuple):
    """An array of a checkpoint: its name, and how it becomes ours and ours becomes it."""

    name: str
    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


def module_name(path: str) -> str:
    """A checkpoint's name of a layer of ours: `vit.encoder.layer.0.intermediate.dense` is `blocks/0/mlp/up`."""
    if path == "head":
        return "classifier"
    if path == "norm":
        return "vit.layernorm"
    _, block, layer = path.split("/", 2)
    return f"vit.encoder.layer.{block}.{BLOCK[layer]}"


def load_vit(
    folder: str | Path = SHIPPED, *, image_size: int | None = None, classes: int | None = None, dtype: Any = DTYPE
) -> Pretrained:
    """The model of a folder in Hugging Face's layout, such as a copy of google/vit-base-patch16-224.

    Positions are interpolated where `image_size` differs from the checkpoint's. With `classes` the head is new, for
    so many classes, and zero; without, it is the checkpoint's.

    **Raises:** `InputError` where a file is missing or damaged, an array is missing, or a shape does not match.
    """
    folder = Path(folder)
    for name in FILES:
        require((folder / name).is_file(), "weights", f"be a folder with {' and '.join(FILES)}", f"no {folder / name}")
    stored = _read_json(folder / "config.json")
    arrays = _read_arrays(folder / "model.safetensors")
    config = _config(stored, arrays, folder)
    size, count = image_size or config.image_size, classes or config.classes
    wanted = ViTConfig(**{**vars(config), "image_size": size, "classes": count})
    model = ViT(wanted, nnx.Rngs(0), dtype)
    new_head = classes is not None or not {"classifier.weight", "classifier.bias"} & set(arrays)
    weights = parameters(model)
    shapes = {path: param.shape for path, param in weights.items()}
    shapes["embedding/positions"] = config.tokens, config.width
    for path, entry in layout(config).items():
        if new_head and path.startswith("head/"):
            found = np.zeros(shapes[path])
        else:
            found = _take(arrays, shapes[path], entry, folder)
        if path == "embedding/positions":
            found = resample(found, wanted.patches)
        weights[path][...] = jnp.asarray(found, DTYPE)
    normalised = folder / "preprocessor_config.json"
    how = _read_json(normalised) if normalised.is_file() else {}
    return Pretrained(model, how.get("image_mean", 0.5), how.get("image_std", 0.5))


def fetch(name: str) -> Path:
    """The folder of a checkpoint that is named on the Hugging Face hub, downloaded unless it is there already.

    **Raises:** `InputError` where huggingface_hub is not installed or the hub cannot be reached.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(f"weights must be a local folder unless huggingface_hub is installed, got '{name}'") from error
    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, "preprocessor_config.json"]))
    except Exception as error:  # of many kinds: no network, no such name, no permission
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"weights must be a folder or a name that the hub knows, got '{name}': {reason}") from error


def save_vit(
    model: ViT, folder: str | Path, *, mean: float | list[float] = 0.5, std: float | list[float] = 0.5
) -> None:
    """Writes a folder that `load_vit` and `transformers.ViTForImageClassification.from_pretrained` read."""
    folder, config = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    weights = parameters(model)
    arrays = {entry.name: entry.theirs(np.asarray(weights[path][...])) for path, entry in layout(config).items()}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "model.safetensors")
    described: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in KEYS.items()}
    labels = {str(number): f"LABEL_{number}" for number in range(config.classes)}
    rest: dict[str, Any] = {"architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_act": "gelu"}
    rest |= {"qkv_bias": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "id2label": labels}
    (folder / "config.json").write_text(json.dumps(rest | described, indent=1) + "\n")
    processor: dict[str, Any] = {
        name: np.broadcast_to(value, config.channels).tolist()
        for name, value in (("image_mean", mean), ("image_std", std))
    }
    processor |= {"size": {"height": config.image_size, "width": config.image_size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")


def layout(config: ViTConfig) -> dict[str, _Entry]:
    """Each parameter's path in our model, and its array in a checkpoint; one to one."""
    p, c, d = config.patch_size, config.channels, config.width
    entries = {
        "embedding/class_token": _Entry("vit.embeddings.cls_token", lambda x: x[0, 0], lambda x: x[None, None]),
        "embedding/positions": _Entry("vit.embeddings.position_embeddings", lambda x: x[0], lambda x: x[None]),
        "embedding/kernel": _Entry(
            "vit.embeddings.patch_embeddings.projection.weight",
            lambda x: x.transpose(2, 3, 1, 0).reshape(p * p * c, d),
            lambda x: x.reshape(p, p, c, d).transpose(3, 2, 0, 1),
        ),
        "embedding/bias": _Entry("vit.embeddings.patch_embeddings.projection.bias", np.asarray, np.asarray),
    }
    blocks = [f"blocks/{block}/{layer}" for block in range(config.depth) for layer in BLOCK]
    for path in [*blocks, "norm", "head"]:
        norm = "norm" in path.rsplit("/", 1)[-1]
        turned = np.asarray if norm else np.transpose
        entries[f"{path}/{'scale' if norm else 'kernel'}"] = _Entry(f"{module_name(path)}.weight", turned, turned)
        entries[f"{path}/bias"] = _Entry(f"{module_name(path)}.bias", np.asarray, np.asarray)
    return entries


def parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    """The model's parameters by path."""
    return {"/".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def resample(positions: Float[np.ndarray, "tokens width"], patches: int) -> Float[np.ndarray, "other width"]:
    """Position embeddings for another square grid of patches, by cubic convolution; the class token keeps its own.

    The kernel is Keys' with a = -3/4 and pixels have their centres at halves, as in PyTorch.
    """
    before, after = round((len(positions) - 1) ** 0.5), round(patches**0.5)
    if before == after:
        return positions
    place = (np.arange(after) + 0.5) * before / after - 0.5
    offsets = np.arange(-1, 3)
    near = np.floor(place).astype(int)[:, None] + offsets
    distance, a = np.abs(place[:, None] - near), -0.75
    inner = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    outer = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    matrix = np.zeros((after, before))
    np.add.at(matrix, (np.arange(after)[:, None], near.clip(0, before - 1)), np.where(distance <= 1, inner, outer))
    grid = positions[1:].reshape(before, before, -1)
    turned = np.einsum("ip,jq,pqd->ijd", matrix, matrix, grid).reshape(patches, -1)
    return np.concatenate([positions[:1], turned]).astype(positions.dtype)


def _config(stored: dict[str, Any], arrays: dict[str, np.ndarray], folder: Path) -> ViTConfig:
    where = str(folder / "config.json")
    require(stored.get("model_type") == "vit", where, "describe a model of type vit", stored.get("model_type"))
    require(stored.get("hidden_act", "gelu") == "gelu", where, "have hidden_act gelu", stored.get("hidden_act"))
    missing = [theirs for theirs in KEYS.values() if theirs not in stored]
    require(not missing, where, f"hold {', '.join(KEYS.values())}", f"no {', '.join(missing)}")
    values = {ours: _size(stored[theirs], theirs, where) for ours, theirs in KEYS.items()}
    head = arrays.get("classifier.bias")
    return ViTConfig(**values, classes=1000 if head is None or head.ndim != 1 else len(head))


def _size(value: Any, name: str, where: str) -> Any:
    """A number of the config; transformers takes the sides of images and patches as pairs too."""
    if isinstance(value, list) and len(set(map(str, value))) == 1:
        value = value[0]
    number = isinstance(value, int) and not isinstance(value, bool)
    if name == "layer_norm_eps":
        require((number or isinstance(value, float)) and value > 0, where, f"have a positive number as {name}", value)
    else:
        require(number and value > 0, where, f"have a positive integer as {name}", value)
    return value


def _take(arrays: dict[str, np.ndarray], shape: tuple[int, ...], entry: _Entry, folder: Path) -> np.ndarray:
    """One array as ours, of the shape that it has there, under its name or without a prefix that models may lack."""
    array, where = arrays.get(entry.name, arrays.get(entry.name.removeprefix("vit."))), folder / "model.safetensors"
    if array is None:
        raise InputError(f"{where} must hold {entry.name}, got {len(arrays)} other arrays")
    stored = entry.theirs(np.broadcast_to(np.float32(0), shape)).shape
    must = f"have shape {stored}, as its config says"
    require(array.shape == stored, f"{entry.name} in {where}", must, array.shape)
    return entry.ours(np.asarray(array, np.float32))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} must be a JSON file, got {error}") from error
    require(isinstance(read, dict), str(path), "hold a JSON object", type(read).__name__)
    return read


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} must be a whole safetensors file, got {error}") from error

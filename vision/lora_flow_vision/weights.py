"""Weights in the layout of Hugging Face's ViT checkpoints: `model.safetensors` and `config.json` in a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from safetensors.numpy import save_file

from lora_flow.bridge.checkpoints import ARRAYS, INDEX, declared
from lora_flow.checks import InputError, require
from lora_flow.runtime.memory import require_memory
from lora_flow.storage.locks import locked
from lora_flow.storage.swap import replacing
from lora_flow.storage.tensors import Tensor, read_json
from lora_flow_vision import looks
from lora_flow_vision.checkpoint import FILES, KEYS, PROCESSOR, config_of, normalisation
from lora_flow_vision.config import ViTConfig
from lora_flow_vision.model import DTYPE, ViT

SHIPPED = Path(__file__).parent / "pretrained"
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


class Pretrained(NamedTuple):
    """A model and the mean and standard deviation that its images are normalised by."""

    model: ViT
    mean: float | list[float] = 0.5
    std: float | list[float] = 0.5


class _Entry(NamedTuple):
    """An array of a checkpoint: its name and shape, and how it becomes ours and ours becomes it."""

    name: str
    shape: tuple[int, ...]
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

    Its arrays are in `model.safetensors`, or in the files that `model.safetensors.index.json` names; in any floating-
    point format. A ViT without biases of queries, keys and values gets zero biases, which give the same function. A
    DeiT without a distillation token is a ViT. Positions are interpolated where `image_size` differs from the
    checkpoint's. With `classes` the head is new, for that many classes, and zero; without, it is the checkpoint's.

    **Returns:** a `Pretrained`: the `ViT`, and the mean and standard deviation of its images.

    **Raises:** `InputError` where a file is missing or damaged, an array is missing, of another shape, not finite or
    none of a ViT's, or the model would not fit into memory.
    """
    folder = Path(folder).expanduser()
    if not ((folder / FILES[0]).is_file() and any((folder / name).is_file() for name in (ARRAYS, INDEX))):
        must = f"be a folder with {' and '.join(FILES)}"
        raise InputError(f"weights must {must}, got {looks.no_checkpoint(folder, FILES)}")
    stored = read_json(folder / FILES[0])
    tensors = declared(folder)
    config = config_of(stored, tensors, folder)
    new_head = classes is not None or not {"classifier.weight", "classifier.bias"} & set(tensors)
    entries = layout(config)
    if new_head:
        entries = {path: entry for path, entry in entries.items() if not path.startswith("head/")}
    found = _matched(entries, tensors, stored.get("qkv_bias", True), folder)

    size, count = image_size or config.image_size, classes or config.classes
    wanted = ViTConfig(**{**vars(config), "image_size": size, "classes": count})
    numbers = sum(math.prod(entry.shape) for entry in layout(wanted).values())
    require_memory("weights", f"'{folder}' for images of {size} x {size}", 8.0 * numbers)
    model = ViT(wanted, nnx.Rngs(0), dtype)
    for path, param in parameters(model).items():
        tensor = found.get(path)
        array = np.zeros(param.shape) if tensor is None else entries[path].ours(tensor.read(np.float32))
        if path == "embedding/positions":
            array = resample(array, wanted.patches)
        param[...] = jnp.asarray(array, DTYPE)
    return Pretrained(model, *normalisation(folder / PROCESSOR, config.channels))


def save_vit(
    model: ViT, folder: str | Path, *, mean: float | list[float] = 0.5, std: float | list[float] = 0.5
) -> None:
    """Writes a folder that `load_vit` and `transformers.ViTForImageClassification.from_pretrained` read.

    Either all of its files replace the old ones, or none.
    """
    folder, config = Path(folder).expanduser(), model.config
    weights = parameters(model)
    arrays = {entry.name: entry.theirs(np.asarray(weights[path][...])) for path, entry in layout(config).items()}
    described: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in KEYS.items()}
    labels = {str(number): f"LABEL_{number}" for number in range(config.classes)}
    rest: dict[str, Any] = {"architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_act": "gelu"}
    rest |= {"qkv_bias": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "id2label": labels}
    processor: dict[str, Any] = {
        name: np.broadcast_to(value, config.channels).tolist()
        for name, value in (("image_mean", mean), ("image_std", std))
    }
    processor |= {"size": {"height": config.image_size, "width": config.image_size}}
    with locked(folder), replacing(folder) as new:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, new / ARRAYS)
        (new / FILES[0]).write_text(json.dumps(rest | described, indent=1) + "\n")
        (new / PROCESSOR).write_text(json.dumps(processor, indent=1) + "\n")


def layout(config: ViTConfig) -> dict[str, _Entry]:
    """Each parameter's path in our model, and its array in a checkpoint; one to one."""
    p, c, d, h = config.patch_size, config.channels, config.width, config.hidden
    entries = {
        "embedding/class_token": _Entry(
            "vit.embeddings.cls_token", (1, 1, d), lambda x: x[0, 0], lambda x: x[None, None]
        ),
        "embedding/positions": _Entry(
            "vit.embeddings.position_embeddings", (1, config.tokens, d), lambda x: x[0], lambda x: x[None]
        ),
        "embedding/kernel": _Entry(
            "vit.embeddings.patch_embeddings.projection.weight",
            (d, c, p, p),
            lambda x: x.transpose(2, 3, 1, 0).reshape(p * p * c, d),
            lambda x: x.reshape(p, p, c, d).transpose(3, 2, 0, 1),
        ),
        "embedding/bias": _Entry("vit.embeddings.patch_embeddings.projection.bias", (d,), np.asarray, np.asarray),
    }
    outs = {"mlp/up": (h, d), "mlp/down": (d, h), "head": (config.classes, d)}
    blocks = [f"blocks/{block}/{layer}" for block in range(config.depth) for layer in BLOCK]
    for path in [*blocks, "norm", "head"]:
        norm = "norm" in path.rsplit("/", 1)[-1]
        shape = outs.get(path.split("/", 2)[-1], (d, d))
        name, bias = module_name(path), _Entry(f"{module_name(path)}.bias", shape[:1], np.asarray, np.asarray)
        if norm:
            entries[f"{path}/scale"] = _Entry(f"{name}.weight", (d,), np.asarray, np.asarray)
        else:
            entries[f"{path}/kernel"] = _Entry(f"{name}.weight", shape, np.transpose, np.transpose)
        entries[f"{path}/bias"] = bias
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


def _matched(
    entries: Mapping[str, _Entry], tensors: Mapping[str, Tensor], biased: bool, folder: Path
) -> dict[str, Tensor]:
    """The checkpoint's array of each of our parameters, found by its name, with the shape that it must have."""
    found: dict[str, Tensor] = {}
    for path, entry in entries.items():
        if not biased and path.endswith(("query/bias", "key/bias", "value/bias")):
            continue
        bare = entry.name.removeprefix("vit.")
        tensor = next((tensors[name] for name in (entry.name, f"deit.{bare}", bare) if name in tensors), None)
        if tensor is None:
            raise InputError(f"{folder / ARRAYS} must hold {entry.name}, got {len(tensors)} other arrays")
        must = f"have shape {entry.shape}, as its config says"
        require(tensor.shape == entry.shape, f"{tensor.name} in {tensor.path}", must, tensor.shape)
        found[path] = tensor
    used = {tensor.name for tensor in found.values()} | {"classifier.weight", "classifier.bias"}
    strange = next((tensor for name, tensor in tensors.items() if name not in used and not looks.unused(name)), None)
    if strange is not None:
        raise InputError(f"{strange.path} must hold a ViT's arrays, got {looks.other_array(strange.name)}")
    return found

"""Adapters in PEFT's layout: `adapter_model.safetensors` and `adapter_config.json` in a folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_flow import Adapter
from lora_flow.arrays import numbers
from lora_flow.bridge.peft_folder import (
    FILES,
    NEW,
    Opened,
    PeftAdapters,
    check_shapes,
    open_peft,
    read_factors,
    require_unchanged_base,
    scaling_of,
    write_peft,
)
from lora_flow.checks import InputError, as_path, require
from lora_flow_vision.weights import BLOCK, module_name, parameters

RENAMED = {
    "attention/query": "attention.q_proj",
    "attention/key": "attention.k_proj",
    "attention/value": "attention.v_proj",
    "attention/output": "attention.o_proj",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
"""The names that transformers 5.9 and newer give to a block's layers, in place of the checkpoint's."""
LAYERS = {name: layer for layer, name in BLOCK.items()} | {name: layer for layer, name in RENAMED.items()}


def export_peft(
    folder: str | Path,
    adapters: Mapping[str, Adapter],
    scaling: float | Mapping[str, float] = 1.0,
    *,
    base: str = "",
    transformers: int = 5,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained(model, folder)` reads, `model` the same ViT in transformers.

    Factors have shapes `(rank, in)` and `(out, rank)`. `scaling` is the output multiplier s, one for all layers or one
    for each path; PEFT's lora_alpha is s times the rank. `base` is the name of the model that the adapters are for.
    PEFT finds layers by their names in memory, which version 5.9 of transformers changed: `transformers` says which
    will read the folder, 5 for 5.9 and newer, 4 for all before, 5.0 to 5.8 too. In the other ones PEFT may leave out
    the blocks' adapters without a word.

    **Raises:** `InputError` for no adapters, a path that is no linear layer's, shapes that do not match, a scaling
    that is missing or not finite, or another version.
    """
    require(adapters, "adapters", "hold at least one layer's", "none")
    require(transformers in (4, 5), "transformers", "be 4 or 5", transformers)
    modules = {path: _module(path, transformers) for path in adapters}
    scalings = {path: _scaling(scaling, path) for path in adapters}
    for path, adapter in adapters.items():
        name = f"adapters of {path}"
        check_shapes(name, *(numbers(name, factor).shape for factor in adapter))
    named = {modules[path]: adapter for path, adapter in adapters.items()}
    config = NEW | {"base_model_name_or_path": base or None}
    write_peft(folder, PeftAdapters(named, {modules[path]: scalings[path] for path in adapters}, config))


def import_peft(folder: str | Path, model: nnx.Module | None = None) -> tuple[dict[str, Adapter], dict[str, float]]:
    """The adapters of a folder that PEFT or `export_peft` wrote, and their output multipliers s, by path.

    Factors have shapes `(rank, in)` and `(out, rank)`. s is lora_alpha over the rank, or over its square root where
    the adapters were trained with use_rslora. The layers may have the names of any transformers. Whole layers that
    were trained beside the adapters (modules_to_save, which PEFT's task type SEQ_CLS sets for the classifier) are put
    into the `model`, in place; without a model such a folder is refused.

    **Raises:** `InputError` where a file is missing or damaged, the files do not belong together, a layer is not one
    of a ViT, or the adapters are other than two factors a layer beside the model's own weights: another method than
    LoRA, DoRA, biases, or a start that changed the model.
    """
    opened = open_peft(as_path("folder", folder).expanduser())
    require_unchanged_base(opened)
    values = _whole(opened, model)
    pairs = read_factors(opened)
    paths = {module: _path(module, opened.folder) for module in pairs}
    scalings = {paths[module]: scaling_of(opened, module, adapter.rank) for module, adapter in pairs.items()}
    for param, value in values:
        param[...] = jnp.asarray(value, param.dtype)
    return {paths[module]: adapter for module, adapter in pairs.items()}, scalings


def _module(path: str, transformers: int) -> str:
    block = re.fullmatch(r"blocks/(\d+)/(.+)", path)
    known = path == "head" or (block is not None and block[2] in RENAMED)
    require(known, "adapters", f"be on head or on blocks/0/ and so on with {', '.join(RENAMED)}", path)
    if block is None or transformers == 4:
        return module_name(path)
    return f"vit.layers.{block[1]}.{RENAMED[block[2]]}"


def _path(module: str, folder: Path) -> str:
    """Our path of a linear layer, by either of its names; a model without a head has no `vit.` before them."""
    path = _place(module)
    if path is None or "norm" in path:
        raise InputError(f"{folder / FILES[1]} must hold adapters of a ViT's linear layers, got one of {module}")
    return path


def _place(module: str) -> str | None:
    """Our path of a module, None for one that we have not."""
    if module in ("classifier", "layernorm", "vit.layernorm"):
        return "head" if module == "classifier" else "norm"
    block = re.fullmatch(r"(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\.(.+)", module)
    return f"blocks/{block[1]}/{LAYERS[block[2]]}" if block is not None and block[2] in LAYERS else None


def _scaling(scaling: float | Mapping[str, float], path: str) -> float:
    if isinstance(scaling, Mapping):
        require(path in scaling, "scaling", "be given for every adapter", f"none for {path}")
        scaling = scaling[path]
    s = float(scaling)
    require(math.isfinite(s), "scaling", "be finite", s)
    return s


def _whole(opened: Opened, model: nnx.Module | None) -> list[tuple[nnx.Param, np.ndarray]]:
    """The model's parameters that are replaced, each with its value, where whole modules were saved."""
    listed, where = opened.config.get("modules_to_save") or [], opened.where
    names = isinstance(listed, list) and all(isinstance(name, str) for name in listed)
    require(names, f"modules_to_save in {opened.folder / FILES[0]}", "be a list of names", listed)
    found = []
    for name, tensor in opened.others.items():
        module, _, part = name.removeprefix("base_model.model.").rpartition(".")
        path, saved = _place(module), any(f".{module}".endswith(f".{one}") for one in listed)
        if not saved or path is None or part not in ("weight", "bias"):
            raise InputError(f"{where} must hold only lora_A.weight and lora_B.weight of layers, got {name}")
        if model is None:
            given = "come with the model to put it into, import_peft(folder, model)"
            raise InputError(f"{module} in {where}, which was trained as a whole, must {given}, got no model")
        kernel = "bias" if part == "bias" else "scale" if "norm" in path else "kernel"
        param, value = parameters(model).get(f"{path}/{kernel}"), tensor.read()
        value = value.T if kernel == "kernel" else value
        shape = None if param is None else param.shape
        if param is None or shape != value.shape:
            raise InputError(f"{name} in {where} must fit the model, whose {path} has shape {shape}, got {value.shape}")
        found.append((param, value))
    return found

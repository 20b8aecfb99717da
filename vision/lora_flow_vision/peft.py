"""Adapters in PEFT's layout: `adapter_model.safetensors` and `adapter_config.json` in a folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from lora_flow import Adapter
from lora_flow.arrays import numbers
from lora_flow.checks import InputError, require
from lora_flow.storage.locks import locked
from lora_flow.storage.swap import replacing
from lora_flow_vision.tensors import Tensor, is_number, open_tensors, read_json
from lora_flow_vision.weights import BLOCK, module_name, parameters

FILES = ("adapter_config.json", "adapter_model.safetensors")
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
OTHERS = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config"),
    *("alora_invocation_tokens", "layer_replication", "target_parameters", "trainable_token_indices"),
)
"""PEFT's settings under which a layer computes something else than two factors beside its weight."""
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""The values of PEFT's init_lora_weights that leave the model's own weights as they were."""


class _Stored(NamedTuple):
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


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
    arrays, layers = {}, {}
    for path, adapter in adapters.items():
        a, b = _factors(path, adapter)
        layers[modules[path]] = len(a), scalings[path]
        for letter, factor in (("A", a), ("B", b)):
            arrays[f"base_model.model.{modules[path]}.lora_{letter}.weight"] = factor
    config = _config(layers, base)
    # no lora_alpha gives back every s when PEFT divides it by the rank, so s is kept to its last bit here
    metadata = {"format": "pt"} | {f"{path}.scaling": repr(s) for path, s in scalings.items()}
    folder = Path(folder).expanduser()
    with locked(folder), replacing(folder) as new:
        save_file(arrays, new / FILES[1], metadata=metadata)
        (new / FILES[0]).write_text(json.dumps(config, indent=1) + "\n")


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
    folder = Path(folder).expanduser()
    stored = _read(folder)
    _check_config(stored.config, folder / FILES[0])
    whole = {name: tensor for name, tensor in stored.tensors.items() if not FACTOR.fullmatch(name)}
    values = _whole(whole, stored.config, model, folder)
    pairs = _pairs({name: tensor for name, tensor in stored.tensors.items() if name not in whole}, folder / FILES[1])
    adapters = {_path(module, folder): adapter for module, adapter in pairs.items()}
    scalings = {
        path: _stored_scaling(stored, module, path, adapter.rank, folder)
        for module, (path, adapter) in zip(pairs, adapters.items(), strict=True)
    }
    for param, value in values:
        param[...] = jnp.asarray(value, param.dtype)
    return adapters, scalings


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


def _factors(path: str, adapter: Adapter) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.ascontiguousarray(numbers(f"adapters of {path}", factor)) for factor in adapter)
    _check_shapes(f"adapters of {path}", a.shape, b.shape)
    return a, b


def _check_shapes(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    fits = len(a) == len(b) == 2 and a[0] == b[1] > 0
    require(fits, name, "have shapes (rank, in) and (out, rank)", f"{a} and {b}")


def _config(layers: dict[str, tuple[int, float]], base: str) -> dict[str, Any]:
    """PEFT's settings of modules with these ranks and multipliers: the first one's, and by name where others differ."""
    ranks = {module: rank for module, (rank, _) in layers.items()}
    alphas = {module: s * rank for module, (rank, s) in layers.items()}
    first = next(iter(layers))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "bias": "none",
        "target_modules": list(layers),  # PEFT takes ends of names too, but no layer's name is the end of another's
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != alphas[first]},
    }


def _read(folder: Path) -> _Stored:
    for name in FILES:
        pickled = (folder / "adapter_model.bin").is_file()
        got = f"no {folder / name}{', but adapter_model.bin, which is pickled: save it as safetensors' * pickled}"
        require((folder / name).is_file(), "folder", f"hold {' and '.join(FILES)}", got)
    described, weights = (folder / name for name in FILES)
    return _Stored(read_json(described), *open_tensors(weights))


def _check_config(config: dict[str, Any], where: Path) -> None:
    require(config.get("peft_type") == "LORA", f"peft_type in {where}", "be LORA", config.get("peft_type"))
    require(config.get("bias", "none") == "none", f"bias in {where}", "be none", config.get("bias"))
    for name in OTHERS:
        require(not config.get(name), f"{name} in {where}", "be off", config.get(name))
    start = config.get("init_lora_weights", True)
    must = "be true, false or one of gaussian, orthogonal and eva, which do not change the model's weights"
    require(start in STARTS, f"init_lora_weights in {where}", must, start)


def _whole(
    tensors: Mapping[str, Tensor], config: dict[str, Any], model: nnx.Module | None, folder: Path
) -> list[tuple[nnx.Param, np.ndarray]]:
    """The model's parameters that are replaced, each with its value, where whole modules were saved."""
    listed, where = config.get("modules_to_save") or [], folder / FILES[1]
    names = isinstance(listed, list) and all(isinstance(name, str) for name in listed)
    require(names, f"modules_to_save in {folder / FILES[0]}", "be a list of names", listed)
    found = []
    for name, tensor in tensors.items():
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


def _pairs(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Adapter]:
    """The two factors of each module, by its name."""
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        module, letter = FACTOR.fullmatch(name).groups()  # type: ignore[union-attr]
        found.setdefault(module, {})[letter] = tensor
    require(found, str(where), "hold at least one adapter", "none")
    for module, pair in found.items():
        require(len(pair) == 2, f"{module} in {where}", "have lora_A and lora_B", f"only lora_{''.join(pair)}")
        _check_shapes(f"lora_A and lora_B of {module} in {where}", pair["A"].shape, pair["B"].shape)
    return {module: Adapter(pair["A"].read(), pair["B"].read()) for module, pair in found.items()}


def _stored_scaling(stored: _Stored, module: str, path: str, rank: int, folder: Path) -> float:
    where = folder / FILES[0]
    expected = _setting(stored.config, "r", "rank_pattern", module, where)
    require(rank == expected, f"lora_A of {module} in {folder / FILES[1]}", f"have rank {expected:g}, as {where}", rank)
    alpha = _setting(stored.config, "lora_alpha", "alpha_pattern", module, where)
    s = alpha / (math.sqrt(rank) if stored.config.get("use_rslora") else rank)
    try:
        exact = float(stored.metadata.get(f"{path}.scaling", s))
    except ValueError:  # it is not ours
        exact = s
    return exact if math.isclose(exact, s, rel_tol=1e-14) else s  # else PEFT's settings were changed since


def _setting(config: dict[str, Any], name: str, patterns: str, module: str, where: Path) -> float:
    """A module's number in the settings: the first pattern's that matches the end of its name, as in PEFT."""
    listed = config.get(patterns) or {}
    require(isinstance(listed, dict), f"{patterns} in {where}", "be an object", listed)
    try:
        matched = [value for pattern, value in listed.items() if re.match(rf"(.*\.)?({pattern})$", module)]
    except re.error as error:
        raise InputError(f"{patterns} in {where} must hold regular expressions, got {error}") from error
    value = matched[0] if matched else config.get(name)
    require(is_number(value), f"{name} of {module} in {where}", "be a finite number", value)
    return value  # type: ignore[return-value]

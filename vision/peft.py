"""Adapters in PEFT's layout: `adapter_model.safetensors` and `adapter_config.json` in a folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_flow import Adapter
from lora_flow.checks import InputError, require
from vision.weights import BLOCK, module_name

FILES = ("adapter_config.json", "adapter_model.safetensors")
RENAMED = {
    "attention/query": "attention.q_proj",
    "attention/key": "attention.k_proj",
    "attention/value": "attention.v_proj",
    "attention/output": "attention.o_proj",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
"""The names that transformers 5 gives to a block's layers, in place of the checkpoint's."""
LAYERS = {BLOCK[layer]: layer for layer in RENAMED} | {name: layer for layer, name in RENAMED.items()}
STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""The values of PEFT's init_lora_weights that leave the model's own weights as they were."""


class _Stored(NamedTuple):
    config: dict[str, Any]
    arrays: dict[str, Any]
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
    PEFT finds layers by their names in memory, which version 5 of transformers changed: `transformers` is the version
    that will read the folder, 4 or 5. In the other one PEFT may leave out the blocks' adapters without a word.

    **Raises:** `InputError` for no adapters, a path that is no linear layer's, shapes that do not match, a scaling
    that is missing or not finite, or another version.
    """
    require(adapters, "adapters", "hold at least one layer's", "none")
    require(transformers in (4, 5), "transformers", "be 4 or 5", transformers)
    modules = {path: _module(path, transformers) for path in adapters}
    scalings = {path: _scaling(scaling, path) for path in adapters}
    arrays = {}
    for path, adapter in adapters.items():
        for letter, factor in zip("AB", _factors(path, adapter), strict=True):
            arrays[f"base_model.model.{modules[path]}.lora_{letter}.weight"] = factor
    config = _config({modules[path]: (adapter.rank, scalings[path]) for path, adapter in adapters.items()}, base)
    # no lora_alpha gives back every s when PEFT divides it by the rank, so s is kept to its last bit here
    metadata = {"format": "pt"} | {f"{path}.scaling": repr(s) for path, s in scalings.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / FILES[1], metadata=metadata)
    (folder / FILES[0]).write_text(json.dumps(config, indent=1) + "\n")


def import_peft(folder: str | Path) -> tuple[dict[str, Adapter], dict[str, float]]:
    """The adapters of a folder that PEFT or `export_peft` wrote, and their output multipliers s, by path.

    Factors have shapes `(rank, in)` and `(out, rank)`. s is lora_alpha over the rank, or over its square root where
    the adapters were trained with use_rslora. The layers may have the names of transformers 4 or 5.

    **Raises:** `InputError` where a file is missing or damaged, the files do not belong together, a layer is not one
    of a ViT, or the adapters are other than two factors a layer beside the model's own weights: another method than
    LoRA, DoRA, biases, whole modules, or a start that changed the model.
    """
    folder = Path(folder)
    stored = _read(folder)
    _check_config(stored.config, folder / FILES[0])
    pairs = _pairs(stored.arrays, folder / FILES[1])
    adapters = {_path(module, folder): adapter for module, adapter in pairs.items()}
    scalings = {
        path: _stored_scaling(stored, module, path, adapter.rank, folder)
        for module, (path, adapter) in zip(pairs, adapters.items(), strict=True)
    }
    return adapters, scalings


def _module(path: str, transformers: int) -> str:
    block = re.fullmatch(r"blocks/(\d+)/(.+)", path)
    known = path == "head" or (block is not None and block[2] in RENAMED)
    require(known, "adapters", f"be on head or on blocks/0/ and so on with {', '.join(RENAMED)}", path)
    if block is None or transformers == 4:
        return module_name(path)
    return f"vit.layers.{block[1]}.{RENAMED[block[2]]}"


def _path(module: str, folder: Path) -> str:
    """Our path of a module, by either of its names; a model without a head has no `vit.` before them."""
    if module == "classifier":
        return "head"
    block = re.fullmatch(r"(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\.(.+)", module)
    if block is None or block[2] not in LAYERS:
        raise InputError(f"{folder / FILES[1]} must hold adapters of a ViT's linear layers, got one of {module}")
    return f"blocks/{block[1]}/{LAYERS[block[2]]}"


def _scaling(scaling: float | Mapping[str, float], path: str) -> float:
    if isinstance(scaling, Mapping):
        require(path in scaling, "scaling", "be given for every adapter", f"none for {path}")
        scaling = scaling[path]
    s = float(scaling)
    require(math.isfinite(s), "scaling", "be finite", s)
    return s


def _factors(path: str, adapter: Adapter) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.ascontiguousarray(adapter.a), np.ascontiguousarray(adapter.b)
    _check_shapes(f"adapters of {path}", a, b)
    return a, b


def _check_shapes(name: str, a: np.ndarray, b: np.ndarray) -> None:
    fits = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] > 0
    require(fits, name, "have shapes (rank, in) and (out, rank)", f"{a.shape} and {b.shape}")


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
        require((folder / name).is_file(), "folder", f"hold {' and '.join(FILES)}", f"no {folder / name}")
    described, weights = (folder / name for name in FILES)
    try:
        config = json.loads(described.read_text())
    except ValueError as error:
        raise InputError(f"{described} must be a JSON file, got {error}") from error
    require(isinstance(config, dict), str(described), "hold a JSON object", type(config).__name__)
    try:
        with safe_open(weights, framework="numpy") as file:
            return _Stored(config, {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{weights} must be a whole safetensors file, got {error}") from error


def _check_config(config: dict[str, Any], where: Path) -> None:
    require(config.get("peft_type") == "LORA", f"peft_type in {where}", "be LORA", config.get("peft_type"))
    require(config.get("bias", "none") == "none", f"bias in {where}", "be none", config.get("bias"))
    for name in ("use_dora", "lora_bias", "modules_to_save"):
        require(not config.get(name), f"{name} in {where}", "be off", config.get(name))
    start = config.get("init_lora_weights", True)
    must = "be true, false or one of gaussian, orthogonal and eva, which do not change the model's weights"
    require(start in STARTS, f"init_lora_weights in {where}", must, start)


def _pairs(arrays: dict[str, Any], where: Path) -> dict[str, Adapter]:
    """The two factors of each module, by its name."""
    found: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise InputError(f"{where} must hold only lora_A.weight and lora_B.weight of layers, got {name}")
        found.setdefault(match[1], {})[match[2]] = array
    require(found, str(where), "hold at least one adapter", "none")
    for module, pair in found.items():
        require(len(pair) == 2, f"{module} in {where}", "have lora_A and lora_B", f"only lora_{''.join(pair)}")
        _check_shapes(f"lora_A and lora_B of {module} in {where}", pair["A"], pair["B"])
    return {module: Adapter(pair["A"], pair["B"]) for module, pair in found.items()}


def _stored_scaling(stored: _Stored, module: str, path: str, rank: int, folder: Path) -> float:
    where = folder / FILES[0]
    expected = _setting(stored.config, "r", "rank_pattern", module, where)
    require(rank == expected, f"lora_A of {module} in {folder / FILES[1]}", f"have rank {expected:g}, as {where}", rank)
    alpha = _setting(stored.config, "lora_alpha", "alpha_pattern", module, where)
    s = alpha / (math.sqrt(rank) if stored.config.get("use_rslora") else rank)
    exact = float(stored.metadata.get(f"{path}.scaling", s))
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
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name} of {module} in {where} must be a finite number, got {value}")
    return value

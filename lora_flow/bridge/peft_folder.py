"""Adapters in PEFT's layout: `adapter_model.safetensors` and `adapter_config.json` in a folder, for any names.

A module's output multiplier s is lora_alpha over the rank, or over its square root with use_rslora. Ranks and
multipliers of single modules stand in rank_pattern and alpha_pattern.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from lora_flow.adapter import Adapter
from lora_flow.arrays import numbers
from lora_flow.checks import InputError, as_path, require
from lora_flow.storage.locks import locked
from lora_flow.storage.swap import replacing
from lora_flow.storage.tensors import Tensor, is_number, open_tensors, read_json

FILES = ("adapter_config.json", "adapter_model.safetensors")
OTHERS = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config"),
    *("alora_invocation_tokens", "layer_replication", "target_parameters", "trainable_token_indices"),
)
"""PEFT's settings under which a layer computes something else than two factors beside its weight."""
STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""The values of PEFT's init_lora_weights that leave the model's own weights as they were."""
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
NEW = {"peft_type": "LORA", "base_model_name_or_path": None, "inference_mode": True, "bias": "none"}


class PeftAdapters(NamedTuple):
    """What a folder of PEFT's holds.

    - `adapters`: an `Adapter` for each module, by its name in the model: A `(rank, in)`, B `(out, rank)`.
    - `scalings`: the output multiplier s of each.
    - `config`: the settings, with those that nobody here knows.
    - `others`: arrays beside the factors, such as whole modules, by name.
    - `metadata`: text that goes with the arrays.
    - `modules`: the modules that `config` is about; none of a folder that was not read.
    """

    adapters: Mapping[str, Adapter]
    scalings: Mapping[str, float]
    config: Mapping[str, Any] = NEW
    others: Mapping[str, Tensor | np.ndarray] = {}
    metadata: Mapping[str, str] = {}
    modules: frozenset[str] = frozenset()


class Opened(NamedTuple):
    """The two files of a folder, of which only the settings and the names are read."""

    folder: Path
    config: dict[str, Any]
    factors: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def where(self) -> Path:
        return self.folder / FILES[1]


def read_peft(folder: str | Path) -> PeftAdapters:
    """The adapters of a folder that PEFT or `write_peft` wrote, of any modules.

    `write_peft` of the result gives the same settings and arrays, to the last bit.

    **Raises:** `InputError` where a file is missing or damaged, the files do not belong together, or the adapters are
    other than two factors a layer: another method than LoRA, DoRA, or biases.
    """
    opened = open_peft(as_path("folder", folder).expanduser())
    adapters = read_factors(opened)
    scalings = {module: scaling_of(opened, module, adapter.rank) for module, adapter in adapters.items()}
    return PeftAdapters(adapters, scalings, opened.config, opened.others, opened.metadata, frozenset(adapters))


def write_peft(folder: str | Path, peft: PeftAdapters) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained(model, folder)` reads; both files, or none.

    Ranks, multipliers and target modules of the settings are made to fit the adapters, unless they do already.

    **Raises:** `InputError` for no adapters, shapes that do not match, or a multiplier that is missing or not finite.
    """
    folder = as_path("folder", folder).expanduser()
    peft = checked(peft)
    with locked(folder), replacing(folder) as new:
        write_into(new, peft)


def write_into(folder: Path, peft: PeftAdapters) -> None:
    """The two files, into a folder that exists."""
    arrays: dict[str, np.ndarray] = {}
    for module, adapter in peft.adapters.items():
        for letter, factor in zip("AB", adapter, strict=True):
            arrays[factor_name(module, letter)] = np.ascontiguousarray(factor)
    for name, other in peft.others.items():
        arrays[name] = other.read(finite=False) if isinstance(other, Tensor) else other
    # no lora_alpha gives back every s when PEFT divides it by the rank, so s is kept to its last bit here
    exact = {f"{module}.scaling": repr(float(peft.scalings[module])) for module in peft.adapters}
    save_file(arrays, folder / FILES[1], metadata=dict(peft.metadata) | {"format": "pt"} | exact)
    (folder / FILES[0]).write_text(json.dumps(config_of(peft), indent=1) + "\n")


def factor_name(module: str, letter: str) -> str:
    """PEFT's name of a module's factor, `letter` A or B."""
    return f"base_model.model.{module}.lora_{letter}.weight"


def checked(peft: PeftAdapters) -> PeftAdapters:
    """The same with arrays of numbers; raises unless each adapter's factors fit and it has a finite multiplier."""
    require(peft.adapters, "adapters", "hold at least one layer's", "none")
    adapters = dict[str, Adapter]()
    for module, adapter in peft.adapters.items():
        factors: list[Any] = [np.asarray(numbers(f"adapters of {module}", factor)) for factor in adapter]
        adapters[module] = a, b = Adapter(*factors)
        check_shapes(f"adapters of {module}", a.shape, b.shape)
        require(module in peft.scalings, "scaling", "be given for every adapter", f"none for {module}")
        s = float(peft.scalings[module])
        require(math.isfinite(s), "scaling", "be finite", s)
    return peft._replace(adapters=adapters)


def check_shapes(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    fits = len(a) == len(b) == 2 and a[0] == b[1] > 0
    require(fits, name, "have shapes (rank, in) and (out, rank)", f"{a} and {b}")


def config_of(peft: PeftAdapters) -> dict[str, Any]:
    """PEFT's settings of these adapters: those given, with the first module's rank and lora_alpha where they differ."""
    ranks = {module: int(np.shape(adapter.a)[0]) for module, adapter in peft.adapters.items()}
    where = Path("the settings")
    if peft.modules == frozenset(ranks) and all(
        _setting(peft.config, "r", "rank_pattern", module, where) == rank
        and math.isclose(_scaling(peft.config, module, rank, where), peft.scalings[module], rel_tol=1e-14)
        for module, rank in ranks.items()
    ):
        return dict(peft.config)
    root = bool(peft.config.get("use_rslora"))
    alphas = {m: float(peft.scalings[m]) * (math.sqrt(rank) if root else rank) for m, rank in ranks.items()}
    first = next(iter(ranks))
    return dict(peft.config) | {
        "target_modules": list(ranks),  # PEFT takes ends of names too, but no layer's name is the end of another's
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != alphas[first]},
    }


def open_peft(folder: Path) -> Opened:
    """The files of a folder of PEFT's, whose settings say that its layers compute two factors beside their weights."""
    for name in FILES:
        pickled = (folder / "adapter_model.bin").is_file()
        got = f"no {folder / name}{', but adapter_model.bin, which is pickled: save it as safetensors' * pickled}"
        require((folder / name).is_file(), "folder", f"hold {' and '.join(FILES)}", got)
    described, weights = (folder / name for name in FILES)
    config = read_json(described)
    require(config.get("peft_type") == "LORA", f"peft_type in {described}", "be LORA", config.get("peft_type"))
    require(config.get("bias", "none") == "none", f"bias in {described}", "be none", config.get("bias"))
    for name in OTHERS:
        require(not config.get(name), f"{name} in {described}", "be off", config.get(name))
    tensors, metadata = open_tensors(weights)
    factors: dict[str, dict[str, Tensor]] = {}
    others = {}
    for name, tensor in tensors.items():
        if found := FACTOR.fullmatch(name):
            factors.setdefault(found[1], {})[found[2]] = tensor
        else:
            others[name] = tensor
    return Opened(folder, config, factors, others, metadata)


def require_unchanged_base(opened: Opened) -> None:
    """Raises for adapters whose start has changed the weights of the model that they are for."""
    start = opened.config.get("init_lora_weights", True)
    must = "be true, false or one of gaussian, orthogonal and eva, which do not change the model's weights"
    require(start in STARTS, f"init_lora_weights in {opened.folder / FILES[0]}", must, start)


def read_factors(opened: Opened) -> dict[str, Adapter]:
    """The two factors of each module, by its name."""
    check_factors(opened)
    return {module: read_adapter(opened, module) for module in opened.factors}


def read_adapter(opened: Opened, module: str) -> Adapter:
    """The two factors of a module, as they are stored."""
    factors: Any = (opened.factors[module][letter].read() for letter in "AB")
    return Adapter(*factors)


def check_factors(opened: Opened) -> None:
    """Raises unless each module has both factors, whose shapes fit."""
    require(opened.factors, str(opened.where), "hold at least one adapter", "none")
    for module, pair in opened.factors.items():
        got = f"only lora_{''.join(pair)}"
        require(len(pair) == 2, f"{module} in {opened.where}", "have lora_A and lora_B", got)
        check_shapes(f"lora_A and lora_B of {module} in {opened.where}", pair["A"].shape, pair["B"].shape)


def scaling_of(opened: Opened, module: str, rank: int) -> float:
    """A module's output multiplier s, to the last bit where `write_peft` has noted it and the settings still say it."""
    where = opened.folder / FILES[0]
    expected = _setting(opened.config, "r", "rank_pattern", module, where)
    require(rank == expected, f"lora_A of {module} in {opened.where}", f"have rank {expected:g}, as {where}", rank)
    s = _scaling(opened.config, module, rank, where)
    try:
        exact = float(opened.metadata.get(f"{module}.scaling", s))
    except ValueError:  # it is not ours
        exact = s
    return exact if math.isclose(exact, s, rel_tol=1e-14) else s  # else PEFT's settings were changed since


def _scaling(config: Mapping[str, Any], module: str, rank: int, where: Path) -> float:
    alpha = _setting(config, "lora_alpha", "alpha_pattern", module, where)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _setting(config: Mapping[str, Any], name: str, patterns: str, module: str, where: Path) -> float:
    """A module's number in the settings: the first pattern's that matches the end of its name, as in PEFT."""
    listed = config.get(patterns) or {}
    require(isinstance(listed, dict), f"{patterns} in {where}", "be an object", listed)
    try:
        matched = [value for pattern, value in listed.items() if re.match(rf"(.*\.)?({pattern})$", module)]
    except re.error as error:
        raise InputError(f"{patterns} in {where} must hold regular expressions, got {error}") from error
    value = matched[0] if matched else config.get(name)
    require(is_number(value), f"{name} of {module} in {where}", "be a finite number", value)
    return float(value)  # type: ignore[arg-type]

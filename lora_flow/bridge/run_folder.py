"""A folder of PEFT checkpoints over steps, as a trainer writes it, of which headers are read first."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_flow.adapter import Adapter
from lora_flow.bridge.init import MANIFEST
from lora_flow.bridge.peft_folder import (
    FILES,
    STARTS,
    Opened,
    check_factors,
    open_peft,
    read_adapter,
    scaling_of,
)
from lora_flow.checks import as_path, require
from lora_flow.storage.tensors import read_json


class Run(NamedTuple):
    """The checkpoints of a run by their steps, increasing, and its start.

    - `checkpoints`: the start at step 0, where it is known.
    - `offset`: whether the start's own update is off the weights.
    - `told`: what `peft_init` has written of each layer, by its name.
    """

    folder: Path
    checkpoints: dict[int, Opened]
    offset: bool
    told: Mapping[str, Mapping[str, Any]]
    scalings: dict[str, float]

    @property
    def steps(self) -> list[int]:
        return list(self.checkpoints)

    @property
    def layers(self) -> list[str]:
        return list(self.scalings)

    @property
    def conv1d(self) -> bool:
        """Whether PEFT was told that weights are stored `(in, out)`."""
        return bool(self._first.config.get("fan_in_fan_out"))

    @property
    def _first(self) -> Opened:
        return next(iter(self.checkpoints.values()))

    def adapters(self, layer: str) -> Iterator[Adapter]:
        """A layer's factors at one step after the other."""
        return (self.adapter(layer, step) for step in self.checkpoints)

    def adapter(self, layer: str, step: int) -> Adapter:
        """In double precision."""
        factors: Any = (np.asarray(one).astype(np.float64) for one in read_adapter(self.checkpoints[step], layer))
        return Adapter(*factors)

    def shape(self, layer: str) -> tuple[int, int]:
        """`(out, in)`."""
        pair = self._first.factors[layer]
        return pair["B"].shape[0], pair["A"].shape[1]

    def rank(self, layer: str) -> int:
        return self._first.factors[layer]["A"].shape[0]


def open_run(run: str | Path, initial: str | Path | None = None) -> Run:
    """The checkpoints of a folder, which lie in folders whose names end with the step, as `checkpoint-100` does.

    `initial` is the start that they were trained from, step 0; without it that is a checkpoint of step 0. For schemes
    that change the frozen weights the start must be known.

    **Raises:** `InputError` where there are none, a step cannot be read, or their layers, shapes or multipliers differ.
    """
    folder = as_path("run", run).expanduser()
    require(folder.is_dir(), "run", "be a folder of checkpoints", f"'{folder}'")
    first = None if initial is None else as_path("initial", initial).expanduser()
    require(first is None or first.is_dir(), "initial", "be the folder of the start", f"'{first}'")
    found = _found(folder, first)
    if first is not None:
        require(0 not in found, "initial", "be left out for a run that has a checkpoint of step 0", f"'{first}'")
        found[0] = first
    first = found.get(0)
    checkpoints = {step: open_peft(found[step]) for step in sorted(found)}
    for opened in checkpoints.values():
        check_factors(opened)
    manifest = {} if first is None or not (first / MANIFEST).is_file() else read_json(first / MANIFEST)
    inits = {one.config.get("init_lora_weights", True): one.folder for one in checkpoints.values()}
    changing = [f"{init} in '{where}'" for init, where in inits.items() if init not in STARTS]
    must = "be given for a start that changes the frozen weights"
    require(not changing or first is not None, "initial", must, f"none, and {', '.join(changing)}")
    offset = bool(manifest.get("offset")) or bool(changing)
    scalings = _scalings(checkpoints)
    ordered = {layer: scalings[layer] for layer in sorted(scalings, key=_by_numbers)}
    return Run(folder, checkpoints, offset, manifest.get("layers", {}), ordered)


def _by_numbers(layer: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", layer)]


def _found(folder: Path, initial: Path | None) -> dict[int, Path]:
    """The folders of checkpoints by their steps."""
    holding = [one for one in sorted(folder.iterdir()) if any((one / name).is_file() for name in FILES)]
    holding = [one for one in holding if initial is None or one.resolve() != initial.resolve()]
    must, alone = f"hold folders of checkpoints, such as checkpoint-100/{FILES[1]}", (folder / FILES[1]).is_file()
    require(holding, "run", must, f"'{folder}', {'a single checkpoint' if alone else 'which holds none'}")
    found: dict[int, Path] = {}
    for one in holding:
        number = re.search(r"(?<![v\d])\d+$", one.name)
        require(number, f"the name of '{one}'", "end with the step, as checkpoint-100 does", one.name)
        step = int(number[0])  # type: ignore[index]
        require(step not in found, f"the step of '{one}'", "be its own", f"{step}, as of '{found.get(step)}'")
        found[step] = one
    return found


def _scalings(checkpoints: Mapping[int, Opened]) -> dict[str, float]:
    """The output multiplier of each layer; raises unless it, the layers and their shapes stay the same."""
    first, *others = checkpoints.values()
    scalings = {layer: scaling_of(first, layer, pair["A"].shape[0]) for layer, pair in first.factors.items()}
    for one in others:
        for layer, pair in first.factors.items():
            require(layer in one.factors, str(one.where), f"hold {layer}, as {first.where}", "none")
            for letter, tensor in one.factors[layer].items():
                shape, where = pair[letter].shape, f"lora_{letter} of {layer} in {one.where}"
                require(
                    tensor.shape == shape, where, f"have the shape {shape} that it has in {first.where}", tensor.shape
                )
            s, before = scaling_of(one, layer, pair["A"].shape[0]), scalings[layer]
            same = math.isclose(s, before, rel_tol=1e-12)
            require(same, f"lora_alpha over the rank of {layer} in {one.folder}", f"stay {before:g}", f"{s:g}")
        more = next((layer for layer in one.factors if layer not in first.factors), None)
        require(more is None, str(one.where), f"hold the layers of {first.where} alone", f"{more} too")
    return scalings

"""The results and final adapters of an image check: stored unit by unit as each is done, and read."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from safetensors.numpy import save

from lora_flow import Adapter
from lora_flow.checks import InputError, require
from lora_flow.storage.folder import Template, steady
from lora_flow.storage.lanes import NOT_RUN
from lora_flow.storage.portable import portable_attrs
from lora_flow.storage.swap import write_atomically
from lora_flow.storage.tensors import open_tensors
from lora_flow.sweeps.schema import explain
from lora_flow_vision.folder import ADAPTERS, CHECK, CHECKPOINTS, NOTE, Unit, stored_settings, units
from lora_flow_vision.settings import HEAD, VisionSettings

DIMS = ("optimizer", "init", "alpha", "rank", "seed", "step")
_ABOUT = {
    "optimizer": "optimiser",
    "init": "initialisation",
    "alpha": "standard deviation of the initialisation",
    "rank": "LoRA rank",
    "seed": "seed of the initialisation's draw",
    "step": "optimiser steps",
    "time": "gradient-flow time: sgd_rate times step",
    "status": "how the run ended",
}
SHA256 = "sha256"  # of adapters, in their file's metadata
DONE, DIVERGED = 1, 2  # not 0, which is what an array reads where a part of it is missing


def saved_steps(steps: int) -> np.ndarray:
    """0, 10, ..., 300, then every hundredth, and the last."""
    numbers = {*range(0, min(steps, 300) + 1, 10), *range(300, steps + 1, 100), steps}
    return np.array(sorted(number for number in numbers if number <= steps))


class VisionFolder:
    """One run's folder while it is written; hold its lock, `lora_flow.storage.locks.locked`.

    The folder is of an unfinished run with the same settings, data and weights, whose finished units are kept. What of
    them is damaged is trained again, and is listed in `damaged`.

    **Raises:** `InputError` where the run was started with other settings, data or weights, or by an old version.
    """

    def __init__(self, path: Path, settings: VisionSettings, measures: Mapping[str, str], attrs: Mapping[str, Any]):
        self.path, self.settings = path, settings
        self._folder = CHECK.resume(path, _template(path, settings, measures, attrs))
        self.damaged = self._folder.damaged

    @classmethod
    def create(cls, path: Path, settings: VisionSettings, measures: Mapping[str, str], attrs: Mapping[str, Any]) -> Any:
        """A new folder with nothing trained yet, in place of an old run, and of that only, as `CHECK.make` makes it."""
        CHECK.make(path, {"": _template(path, settings, measures, attrs)})
        return cls(path, settings, measures, attrs)

    def pending(self) -> list[Unit]:
        """The units with a lane that has not run, or whose values or adapters are damaged."""
        every = units(self.settings)
        return [every[number] for number in self._folder.pending()]

    def checkpoints(self, unit: Unit) -> Path:
        return self.path / CHECKPOINTS / unit.name

    def write(self, unit: Unit, seen: Mapping[str, np.ndarray], adapters: Mapping[str, Adapter]) -> None:
        """Stores a unit: its adapters, its values, their checksums, its status last.

        Arrays have leading axes `(alpha, seed)`.
        """
        arrays = {f"{path}.{key}": np.asarray(v) for path, one in adapters.items() for key, v in one._asdict().items()}
        self._folder.check_in_place()
        (self.path / ADAPTERS).mkdir(exist_ok=True)
        write_atomically(self.path / unit.file, save(arrays, {SHA256: _digest(unit, arrays)}))
        lanes = len(self.settings.alphas) * len(unit.seeds)
        values = {name: one.reshape(lanes, -1) for name, one in seen.items()}
        finite = np.all([np.isfinite(one).all(-1) for one in values.values()], axis=0)
        self._folder.write(units(self.settings).index(unit), values | {"status": np.where(finite, DONE, DIVERGED)})
        shutil.rmtree(self.checkpoints(unit), ignore_errors=True)


def load_vision(path: str | Path) -> xr.Dataset:
    """The results of a finished image check; every number is checked against its checksum.

    **Returns:** an `xarray.Dataset` with dimensions `optimizer, init, alpha, rank, seed, step`.

    **Raises:** `InputError` where the folder is missing, is no image check, is damaged, or the check is not finished.
    """
    path = Path(path).expanduser()
    return steady(path, lambda: _load_vision(path))


def _load_vision(path: Path) -> xr.Dataset:
    stored_settings(path)
    return CHECK.load(path)


def load_adapters(
    path: str | Path, *, optimizer: str, init: str, alpha: float, rank: int, seed: int
) -> dict[str, Adapter]:
    """The final adapters of one lane of a run.

    **Returns:** path -> `Adapter`, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` where the run has no such lane.
    """
    path = Path(path).expanduser()
    settings = stored_settings(path)
    for name, value, choices in (
        ("optimizer", optimizer, settings.optimizer),
        ("init", init, settings.init),
        ("alpha", alpha, settings.alphas),
        ("rank", rank, settings.rank),
        ("seed", seed, tuple(range(settings.seeds))),
    ):
        require(value in choices, name, f"be one of {', '.join(map(str, choices))}", value)
    unit = next(u for u in units(settings) if u[:3] == (optimizer, init, rank) and seed in u.seeds)
    file = path / unit.file
    require(file.is_file(), f"'{path}'", f"hold {unit.name}", "an unfinished run")
    place = settings.alphas.index(alpha), unit.seeds.index(seed)
    arrays = {name: array[place] for name, array in _read_adapters(file, unit).items()}
    layers = dict.fromkeys(name.rsplit(".", 1)[0] for name in arrays)
    return {layer: Adapter(arrays[f"{layer}.a"], arrays[f"{layer}.b"]) for layer in layers}


def _read_adapters(path: Path, unit: Unit) -> dict[str, np.ndarray]:
    """A unit's arrays, checked against their digests; those of older runs unchecked."""
    contents = open_tensors(path)
    arrays = {name: tensor.read(finite=False) for name, tensor in contents.tensors.items()}
    written = contents.metadata.get(SHA256)
    same = written in (None, _digest(unit, arrays))
    require(same, f"'{path}'", "be as it was written", "other adapters; --resume trains them again")
    return arrays


def _lost(path: Path, settings: VisionSettings, number: int) -> list[str]:
    """The adapters of a finished unit where they are missing or have changed."""
    unit = units(settings)[number]
    try:
        _read_adapters(path / unit.file, unit)
    except (InputError, OSError):
        return [unit.file]
    return []


def _digest(unit: Unit, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(unit.name.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _template(path: Path, settings: VisionSettings, measures: Mapping[str, str], attrs: Mapping[str, Any]) -> Template:
    empty = _empty(settings, measures, attrs)
    table = {"vision": dataclasses.asdict(settings)}
    lost = functools.partial(_lost, path, settings)
    return Template(table, empty, _box(settings), {NOTE: empty.attrs}, lost=lost)


def _empty(settings: VisionSettings, measures: Mapping[str, str], attrs: Mapping[str, Any]) -> xr.Dataset:
    steps = saved_steps(settings.steps)
    coords: dict[str, Any] = {
        "optimizer": list(settings.optimizer),
        "init": list(settings.init),
        "alpha": list(settings.alphas),
        "rank": list(settings.rank),
        "seed": np.arange(settings.seeds),
        "step": steps,
        "time": ("step", settings.sgd_rate * steps),
    }
    shape = tuple(len(coords[dim]) for dim in DIMS)
    values = {name: (DIMS, np.full(shape, np.nan)) for name in measures}
    flags = {"flag_values": [NOT_RUN, DONE, DIVERGED], "flag_meanings": "not_run done diverged"}
    status = {"status": (DIMS[:-1], np.full(shape[:-1], NOT_RUN, np.int8), flags)}
    dataset = xr.Dataset(values | status, coords, portable_attrs(dataclasses.asdict(settings) | dict(attrs)))
    for name, about in (_ABOUT | dict(measures)).items():
        explain(dataset[name], about)
    return dataset


def _box(settings: VisionSettings) -> tuple[int, ...]:
    """The lanes of a unit, which come in the order of the units."""
    return 1, 1, len(settings.alphas), 1, settings.seeds if settings.layers == HEAD else 1

"""The run folder of the image check: settings, results as Zarr, final adapters; a unit of work is stored when done."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tomli_w
import xarray as xr
import zarr
from safetensors.numpy import load_file, save_file

from lora_flow import Adapter
from lora_flow.checks import InputError, require
from lora_flow.labels import PENDING
from lora_flow.store import RESULTS, SETTINGS, read_settings, write_atomically
from vision.settings import HEAD, VisionSettings, from_table

DIMS = ("optimizer", "init", "alpha", "rank", "seed", "step")
ADAPTERS, CHECKPOINTS = "adapters", "checkpoints"
DONE, DIVERGED = 1, 2  # not 0, which is what an array reads where a part of it is missing


class Unit(NamedTuple):
    """What is trained by one call: all alphas, and of the head alone all seeds, of one method, start and rank."""

    optimizer: str
    init: str
    rank: int
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        of = "all" if len(self.seeds) > 1 else self.seeds[0]
        return f"{self.optimizer}-{self.init}-rank{self.rank}-seed-{of}"


def units(settings: VisionSettings) -> list[Unit]:
    """In the order in which they are run."""
    every = tuple(range(settings.seeds))
    groups = [every] if settings.layers == HEAD else [(seed,) for seed in every]
    return [Unit(*each) for each in itertools.product(settings.optimizer, settings.init, settings.rank, groups)]


def saved_steps(steps: int) -> np.ndarray:
    """0, 10, ..., 300, then every hundredth, and the last."""
    numbers = {*range(0, min(steps, 300) + 1, 10), *range(300, steps + 1, 100), steps}
    return np.array(sorted(number for number in numbers if number <= steps))


class VisionFolder:
    """One run's folder. `create` makes it, `resume` goes on with it; `load_vision` reads a finished one."""

    def __init__(self, path: Path, settings: VisionSettings):
        self.path, self.settings = path, settings
        self._arrays: Any = zarr.open_group(path / RESULTS, mode="r+")

    @classmethod
    def create(cls, path: Path, settings: VisionSettings, measures: Mapping[str, str], attrs: Mapping[str, Any]) -> Any:
        """A new folder with nothing trained yet, in place of an old one; `check_free` says whether it may be."""
        path.mkdir(parents=True, exist_ok=True)
        old = path / f"{RESULTS}.old"
        shutil.rmtree(old, ignore_errors=True)
        if (path / RESULTS).exists():
            (path / RESULTS).replace(old)  # in one step: one that is half deleted must not be gone on with
        for name in (old.name, ADAPTERS, CHECKPOINTS, "figures"):
            shutil.rmtree(path / name, ignore_errors=True)
        (path / "report.md").unlink(missing_ok=True)
        write_atomically(path / SETTINGS, tomli_w.dumps({"vision": dataclasses.asdict(settings)}))
        _empty(settings, measures, attrs).to_zarr(
            path / f"{RESULTS}.partial",
            mode="w",
            encoding=_chunks(settings, measures),
            zarr_format=2,
            consolidated=True,
        )
        (path / f"{RESULTS}.partial").replace(path / RESULTS)
        return cls(path, settings)

    @classmethod
    def resume(cls, path: Path, settings: VisionSettings, measures: Mapping[str, str], attrs: Mapping[str, Any]) -> Any:
        """The folder of an unfinished run with the same data and weights, whose finished units are kept."""
        if not (path / RESULTS).is_dir():  # killed between its settings and its first results
            return cls.create(path, settings, measures, attrs)
        folder = cls(path, settings)
        for name, value in attrs.items():
            stored, now = folder._arrays.attrs.get(name), json.loads(json.dumps(value))
            require(now == stored, name, f"be {stored}, as '{path}' was started, to resume it", now)
        return folder

    def pending(self) -> list[Unit]:
        status = self._arrays["status"][:]
        return [
            unit for unit in units(self.settings) if not np.all(np.isin(status[self._block(unit)], (DONE, DIVERGED)))
        ]

    def checkpoints(self, unit: Unit) -> Path:
        return self.path / CHECKPOINTS / unit.name

    def write(self, unit: Unit, seen: Mapping[str, np.ndarray], adapters: Mapping[str, Adapter]) -> None:
        """Stores a unit: its adapters, its values, its status last. Arrays have leading axes `(alpha, seed)`."""
        (self.path / ADAPTERS).mkdir(exist_ok=True)
        arrays = {f"{path}.{key}": np.asarray(v) for path, one in adapters.items() for key, v in one._asdict().items()}
        partial = self.path / ADAPTERS / f"{unit.name}.partial"
        save_file(arrays, partial)
        partial.replace(self.path / ADAPTERS / f"{unit.name}.safetensors")
        block = self._block(unit)
        for name, values in seen.items():
            self._arrays[name][block] = values[None, None, :, None]
        finite = np.all([np.isfinite(values).all(-1) for values in seen.values()], axis=0)
        self._arrays["status"][block] = np.where(finite, DONE, DIVERGED)[None, None, :, None]
        shutil.rmtree(self.checkpoints(unit), ignore_errors=True)

    def _block(self, unit: Unit) -> tuple[slice, ...]:
        chosen = self.settings
        places = (
            chosen.optimizer.index(unit.optimizer),
            chosen.init.index(unit.init),
            None,
            chosen.rank.index(unit.rank),
        )
        first, last = unit.seeds[0], unit.seeds[-1] + 1
        return (*(slice(None) if place is None else slice(place, place + 1) for place in places), slice(first, last))


def check_free(path: Path, overwrite: bool) -> None:
    """Raises unless the image check may make its folder at `path`."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    require(path.is_dir(), "out", "be a folder", f"the file '{path}'")
    require(is_vision(path), "out", "be a new folder or one of an image check", f"'{path}', which holds something else")
    require(overwrite, "out", "be new (--overwrite replaces it, --resume goes on with it)", f"the run '{path}'")


def is_vision(path: Path) -> bool:
    """Whether a folder holds an image check."""
    return (path / SETTINGS).is_file() and "vision" in read_settings(path)


def stored_settings(path: Path) -> VisionSettings:
    """What a run was started with.

    **Raises:** `InputError` where the folder does not exist or holds no image check.
    """
    table = read_settings(path)
    require("vision" in table, f"'{path}'", "be the folder of an image check", "one of another run")
    try:
        return from_table(table["vision"])
    except TypeError as error:
        raise InputError(f"'{path / SETTINGS}' must be of this version, got {error}") from error


def load_vision(path: str | Path) -> xr.Dataset:
    """The results of a finished image check: dimensions `optimizer, init, alpha, rank, seed, step`.

    **Raises:** `InputError` where the folder is missing, is no image check, or the check is not finished.
    """
    path = Path(path)
    stored_settings(path)
    dataset = xr.open_zarr(path / RESULTS, consolidated=True).load()
    pending = int((~dataset["status"].isin([DONE, DIVERGED])).sum())
    hint = f"finish it with: lora-flow vision --out {path} --resume"
    total = dataset["status"].size
    require(not pending, f"'{path}'", "hold a finished check", f"{total - pending} of {total} lanes; {hint}")
    return dataset


def load_adapters(
    path: str | Path, *, optimizer: str, init: str, alpha: float, rank: int, seed: int
) -> dict[str, Adapter]:
    """The final adapters of one lane of a run, by the paths of their layers.

    **Raises:** `InputError` where the run has no such lane.
    """
    path = Path(path)
    settings = stored_settings(path)
    for name, value, listed in (
        ("optimizer", optimizer, settings.optimizer),
        ("init", init, settings.init),
        ("alpha", alpha, settings.alphas),
        ("rank", rank, settings.rank),
        ("seed", seed, tuple(range(settings.seeds))),
    ):
        require(value in listed, name, f"be one of {', '.join(map(str, listed))}", value)
    unit = next(u for u in units(settings) if u[:3] == (optimizer, init, rank) and seed in u.seeds)
    file = path / ADAPTERS / f"{unit.name}.safetensors"
    require(file.is_file(), f"'{path}'", f"hold {unit.name}", "an unfinished run")
    place = settings.alphas.index(alpha), unit.seeds.index(seed)
    arrays = {name: array[place] for name, array in load_file(file).items()}
    layers = dict.fromkeys(name.rsplit(".", 1)[0] for name in arrays)
    return {layer: Adapter(arrays[f"{layer}.a"], arrays[f"{layer}.b"]) for layer in layers}


def _empty(settings: VisionSettings, measures: Mapping[str, str], attrs: Mapping[str, Any]) -> xr.Dataset:
    steps = saved_steps(settings.steps)
    coords: dict[str, Any] = {
        "optimizer": list(settings.optimizer),
        "init": list(settings.init),
        "alpha": list(settings.alphas),
        "rank": list(settings.rank),
        "seed": np.arange(settings.seeds),
        "step": steps,
        "time": ("step", settings.sgd_rate * steps, {"long_name": "gradient-flow time, sgd_rate times step"}),
    }
    shape = tuple(len(coords[dim]) for dim in DIMS)
    values = {name: (DIMS, np.full(shape, np.nan), {"long_name": told}) for name, told in measures.items()}
    flags = {"flag_values": [PENDING, DONE, DIVERGED], "flag_meanings": "not_run done diverged"}
    status = {"status": (DIMS[:-1], np.full(shape[:-1], PENDING, np.int8), flags)}
    return xr.Dataset(values | status, coords=coords, attrs=dataclasses.asdict(settings) | dict(attrs))


def _chunks(settings: VisionSettings, measures: Mapping[str, str]) -> dict[str, Any]:
    """One file a unit or a part of one, so that no two units share a file."""
    sizes = (1, 1, len(settings.alphas), 1, 1)
    over_steps = (*sizes, len(saved_steps(settings.steps)))
    return {name: {"chunks": over_steps} for name in measures} | {"status": {"chunks": sizes}}

"""The run folder of the image check: settings, results as Zarr, final adapters; a unit of work is stored when done."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tomli_w
import xarray as xr
from safetensors.numpy import save

from lora_flow import Adapter
from lora_flow.checks import InputError, require
from lora_flow.storage import checksums
from lora_flow.storage.checksums import LANES, Damaged, Reading, lane_sums, listed
from lora_flow.storage.folder import RUN_ID, check_run, mend, replacing, write_atomically
from lora_flow.storage.unchanged import check_arrays
from lora_flow.sweeps.labels import PENDING, portable_attrs
from lora_flow.sweeps.run import RESULTS, SETTINGS, is_vacant, read_settings, steady
from lora_flow_vision.settings import HEAD, VisionSettings, from_table
from lora_flow_vision.tensors import open_tensors

DIMS = ("optimizer", "init", "alpha", "rank", "seed", "step")
ADAPTERS, CHECKPOINTS = "adapters", "checkpoints"
DRAWN = ("figure[567]", "figure[67]-r*", "starts")  # of pictures that a check draws
ATTRS = "attrs"  # the note of what a run was started with
SHA256 = "sha256"  # of adapters, in their file's metadata
DONE, DIVERGED = 1, 2  # not 0, which is what an array reads where a part of it is missing


class Unit(NamedTuple):
    """The lanes that one call trains: all alphas (and for the head alone all seeds) of one method, start and rank."""

    optimizer: str
    init: str
    rank: int
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        of = "all" if len(self.seeds) > 1 else self.seeds[0]
        return f"{self.optimizer}-{self.init}-rank{self.rank}-seed-{of}"


def units(settings: VisionSettings) -> list[Unit]:
    """The units in the order in which they run."""
    every = tuple(range(settings.seeds))
    groups = [every] if settings.layers == HEAD else [(seed,) for seed in every]
    return [Unit(*each) for each in itertools.product(settings.optimizer, settings.init, settings.rank, groups)]


def saved_steps(steps: int) -> np.ndarray:
    """0, 10, ..., 300, then every hundredth, and the last."""
    numbers = {*range(0, min(steps, 300) + 1, 10), *range(300, steps + 1, 100), steps}
    return np.array(sorted(number for number in numbers if number <= steps))


class VisionFolder:
    """One run's folder while it is written; whoever makes or resumes it holds its lock,
    `lora_flow.storage.folder.locked`."""

    def __init__(self, path: Path, settings: VisionSettings, reading: Reading, restored: Sequence[str] = ()):
        self.path, self.settings = path, settings
        self._dataset, self._sums = reading.dataset, reading.sums
        self._arrays = checksums.open_arrays(path / RESULTS)
        self.damaged = [*restored, *reading.damaged, *self._damaged_adapters()]

    @classmethod
    def create(cls, path: Path, settings: VisionSettings, measures: Mapping[str, str], attrs: Mapping[str, Any]) -> Any:
        """A new folder with nothing trained yet, whole or not at all in place of an old run and of what was made of it.

        `check_free` says whether it may be. Of what is not named as a run names it nothing is touched.
        """
        with replacing(path, _made(path)) as new:
            write_atomically(new / SETTINGS, tomli_w.dumps({"vision": dataclasses.asdict(settings)}))
            _make(new / RESULTS, settings, measures, attrs)
        return cls(path, settings, checksums.read(path / RESULTS))

    @classmethod
    def resume(cls, path: Path, settings: VisionSettings, measures: Mapping[str, str], attrs: Mapping[str, Any]) -> Any:
        """The folder of an unfinished run with the same data and weights, whose finished units are kept.

        What of them is damaged is trained again, and is listed in `damaged`.

        **Raises:** `InputError` where the run was started with other settings, data or weights, or by an old version.
        """
        planned, restored = _empty(settings, measures, attrs), list[str]()
        if not (path / RESULTS).is_dir():  # somebody has removed them
            _remake(path, settings, measures, attrs)
        try:
            reading = checksums.read(path / RESULTS)
        except Damaged as damaged:
            restored = list(damaged.files)
            for where, then in (
                (checksums.OWN, checksums.notes(path / RESULTS).get(ATTRS)),
                (".zattrs", checksums.attributes(path / RESULTS)),
            ):
                if where not in restored:
                    _check_same(path, then, planned.attrs)
            _remake(path, settings, measures, attrs)
            reading = checksums.read(path / RESULTS)
        ours = RUN_ID in reading.dataset.attrs
        require(ours, f"'{path}'", "be a run of this version, to be resumed", "an older one, without checksums")
        _check_same(path, reading.dataset.attrs, planned.attrs)
        check_arrays(path, reading.dataset, planned)
        return cls(path, settings, reading, restored)

    def pending(self) -> list[Unit]:
        """The units with a lane that has not run, or whose values or adapters are damaged."""
        done = np.isin(self._dataset["status"].values, (DONE, DIVERGED))
        return [unit for unit in units(self.settings) if not np.all(done[_block(self.settings, unit)])]

    def checkpoints(self, unit: Unit) -> Path:
        return self.path / CHECKPOINTS / unit.name

    def write(self, unit: Unit, seen: Mapping[str, np.ndarray], adapters: Mapping[str, Adapter]) -> None:
        """Stores a unit: its adapters, its values, their checksums, its status last.

        Arrays have leading axes `(alpha, seed)`.
        """
        arrays = {f"{path}.{key}": np.asarray(v) for path, one in adapters.items() for key, v in one._asdict().items()}
        check_run(self.path / RESULTS, self._dataset.attrs[RUN_ID])
        (self.path / ADAPTERS).mkdir(exist_ok=True)
        metadata = {SHA256: _digest(unit, arrays)}
        write_atomically(self.path / ADAPTERS / f"{unit.name}.safetensors", save(arrays, metadata))
        block = _block(self.settings, unit)
        for name, values in seen.items():
            self._dataset[name].values[block] = values[None, None, :, None]
        finite = np.all([np.isfinite(values).all(-1) for values in seen.values()], axis=0)
        self._dataset["status"].values[block] = np.where(finite, DONE, DIVERGED)[None, None, :, None]
        shape = self._dataset["status"].shape
        lanes = _lanes(self.settings, unit)
        self._sums[lanes] = lane_sums(self._dataset, lanes)
        memory = {name: self._dataset[name].values for name in seen}
        memory |= {LANES: self._sums.reshape(shape), "status": self._dataset["status"].values}
        for name, array in memory.items():
            check_run(self.path / RESULTS, self._dataset.attrs[RUN_ID])
            self._arrays[name][block] = array[block]
        shutil.rmtree(self.checkpoints(unit), ignore_errors=True)

    def _damaged_adapters(self) -> list[str]:
        """The adapters that finished units lack, or that have changed; these units count as not run then."""
        status, found = self._dataset["status"].values, []
        for unit in units(self.settings):
            path = self.path / ADAPTERS / f"{unit.name}.safetensors"
            if np.any(status[_block(self.settings, unit)] != PENDING):
                try:
                    _read_adapters(path, unit)
                except (InputError, OSError):
                    status[_block(self.settings, unit)] = PENDING
                    found.append(f"{ADAPTERS}/{path.name}")
        return found


def check_free(path: Path, overwrite: bool) -> None:
    """Raises unless the image check may make its folder at `path`."""
    if not path.exists():
        return
    require(path.is_dir(), "out", "be a folder", f"the file '{path}'")
    mend(path)
    if is_vacant(path):
        return
    require(is_vision(path), "out", "be a new folder or one of an image check", f"'{path}', which holds something else")
    require(overwrite, "out", "be new (--overwrite replaces it, --resume continues it)", f"the run '{path}'")


def is_vision(path: Path) -> bool:
    """Whether a folder holds an image check."""
    mend(path)
    return (path / SETTINGS).is_file() and "vision" in read_settings(path)


def stored_settings(path: Path) -> VisionSettings:
    """The settings that a run was started with.

    **Raises:** `InputError` where the folder does not exist or holds no image check.
    """
    table = read_settings(path)
    require("vision" in table, f"'{path}'", "be the folder of an image check", "one of another run")
    try:
        return from_table(table["vision"])
    except TypeError as error:
        raise InputError(f"'{path / SETTINGS}' must be of this version, got {error}") from error


def load_vision(path: str | Path) -> xr.Dataset:
    """The results of a finished image check; every number is checked against its checksum.

    **Returns:** an `xarray.Dataset` with dimensions `optimizer, init, alpha, rank, seed, step`.

    **Raises:** `InputError` where the folder is missing, is no image check, is damaged, or the check is not finished.
    """
    path = Path(path).expanduser()
    return steady(path, lambda: _load_vision(path))


def _load_vision(path: Path) -> xr.Dataset:
    stored_settings(path)
    hint = f"lora-flow vision --out {path} --resume"
    require((path / RESULTS).is_dir(), f"'{path}'", f"hold {RESULTS}", f"an unfinished check; finish it with: {hint}")
    try:
        dataset, damaged = checksums.read(path / RESULTS)[:2]
    except Damaged as error:
        raise InputError(f"{error}; mend it with: {hint}") from error
    pending = int((~dataset["status"].isin([DONE, DIVERGED])).sum())
    total = dataset["status"].size
    told = f"{total - pending} of {total} lanes" + (f", damaged or missing {listed(damaged)}" if damaged else "")
    require(not pending, f"'{path}'", "hold a finished check", f"{told}; finish it with: {hint}")
    dataset.attrs.pop(RUN_ID, None)
    return dataset


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
    file = path / ADAPTERS / f"{unit.name}.safetensors"
    require(file.is_file(), f"'{path}'", f"hold {unit.name}", "an unfinished run")
    place = settings.alphas.index(alpha), unit.seeds.index(seed)
    arrays = {name: array[place] for name, array in _read_adapters(file, unit).items()}
    layers = dict.fromkeys(name.rsplit(".", 1)[0] for name in arrays)
    return {layer: Adapter(arrays[f"{layer}.a"], arrays[f"{layer}.b"]) for layer in layers}


def _check_same(path: Path, then: Any, now: Mapping[str, Any]) -> None:
    """Raises unless a run was started with these attributes: its settings, and what data and weights they stood for."""
    for name, value in now.items():
        stored = then.get(name) if isinstance(then, dict) else None
        same = json.loads(json.dumps(value)) == stored
        require(same, name, f"be {stored}, as '{path}' was started, to resume it", value)


def _read_adapters(path: Path, unit: Unit) -> dict[str, np.ndarray]:
    """A unit's arrays, checked against their digests; those of older runs unchecked."""
    contents = open_tensors(path)
    arrays = {name: tensor.read(finite=False) for name, tensor in contents.tensors.items()}
    written = contents.metadata.get(SHA256)
    same = written in (None, _digest(unit, arrays))
    require(same, f"'{path}'", "be as it was written", "other adapters; --resume trains them again")
    return arrays


def _block(settings: VisionSettings, unit: Unit) -> tuple[slice, ...]:
    """The lanes of a unit, as an index of what has dimensions `optimizer, init, alpha, rank, seed`."""
    found = (settings.optimizer.index(unit.optimizer), settings.init.index(unit.init), settings.rank.index(unit.rank))
    optimizer, init, rank = (slice(place, place + 1) for place in found)
    return optimizer, init, slice(None), rank, slice(unit.seeds[0], unit.seeds[-1] + 1)


def _lanes(settings: VisionSettings, unit: Unit) -> np.ndarray:
    """The lanes of a unit, as numbers."""
    lengths = map(len, (settings.optimizer, settings.init, settings.alphas, settings.rank))
    shape = (*lengths, settings.seeds)
    return np.arange(np.prod(shape)).reshape(shape)[_block(settings, unit)].ravel()


def _digest(unit: Unit, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(unit.name.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _made(path: Path) -> list[str]:
    """The names, below the folder, that the run at `path` has made beside its settings and results."""
    if not (path / SETTINGS).is_file():
        return []
    names = [unit.name for unit in units(stored_settings(path))]
    made = [f"{ADAPTERS}/{name}.safetensors" for name in names] + [f"{CHECKPOINTS}/{name}" for name in names]
    drawn = [f"figures/{picture.name}" for pattern in DRAWN for picture in path.glob(f"figures/{pattern}.png")]
    return [name for name in (*made, *drawn, "report.md") if (path / name).exists()]


def _make(path: Path, settings: VisionSettings, measures: Mapping[str, str], attrs: Mapping[str, Any]) -> None:
    empty = _empty(settings, measures, attrs)
    identified = empty.assign_attrs({RUN_ID: uuid.uuid4().hex})
    lanes = [_lanes(settings, unit) for unit in units(settings)]
    checksums.create(path, identified, _chunks(settings, measures), {ATTRS: empty.attrs}, lanes)


def _remake(path: Path, settings: VisionSettings, measures: Mapping[str, str], attrs: Mapping[str, Any]) -> None:
    """Makes the results anew around the stored lanes; damage of these shows when they are read."""
    with replacing(path) as new:
        _make(new / RESULTS, settings, measures, attrs)
        if (path / RESULTS).is_dir():
            checksums.copy_lanes(path / RESULTS, new / RESULTS)


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
    return xr.Dataset(values | status, coords, portable_attrs(dataclasses.asdict(settings) | dict(attrs)))


def _chunks(settings: VisionSettings, measures: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """One file a unit or a part of one, so that no two units share a file."""
    sizes = (1, 1, len(settings.alphas), 1, 1)
    over_steps = (*sizes, len(saved_steps(settings.steps)))
    return dict.fromkeys(measures, over_steps) | {"status": sizes}

"""A run folder: the settings, the results as Zarr, and the guarantees about both.

    settings.toml   what was asked for; enough to repeat or resume the run
    results.zarr    opens with `xarray.open_zarr`; lanes that have not run have status -1
    figures/*.png, report.md
    problem-as-started.npz or .safetensors   a copy of the file that --problem named

A batch is written as soon as it is solved, its `status` last, and every file is replaced in one step. Whenever the
process is killed, a lane whose status says that it is done has all its values; the others are solved again. A lane's
values and all data common to the lanes have checksums: damaged lanes are named, and solved again as well.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tomli_w
import xarray as xr

from lora_flow.checks import InputError, as_path, require, require_flag
from lora_flow.storage import checksums
from lora_flow.storage.checksums import LANES, Damaged, lane_chunks, lane_sums, listed
from lora_flow.storage.folder import (
    RUN_ID,
    check_run,
    is_generated,
    is_replaced,
    locked,
    mend,
    replacing,
    write_atomically,
)
from lora_flow.storage.toml import read_toml
from lora_flow.storage.unchanged import check_arrays, check_attrs, check_settings
from lora_flow.sweeps.labels import PENDING, portable_attrs
from lora_flow.sweeps.plan import Plan, Values

SETTINGS, RESULTS, PROBLEM = "settings.toml", "results.zarr", "problem-as-started"
_SUFFIXES = (".npz", ".safetensors")  # of files that hold a problem
_FIGURE = "figure"  # the attribute of a run that was made for a figure
_REPLACED_WITHIN = 5.0  # seconds that a reader waits for a run that is being replaced
_SETTINGS = "settings"  # the note of what a run was asked for

Read = TypeVar("Read")
Run = tuple[Mapping[str, Any], Plan]
"""What a run was asked for, as in its settings file, and how that is done."""


class RunFolder:
    """One run's folder while it is written, which takes the lock that `open_runs` holds."""

    def __init__(self, path: Path, plan: Plan, reading: checksums.Reading, restored: Sequence[str] = ()):
        self.path, self.damaged = path, [*restored, *reading.damaged]
        self._plan, self._dataset, self._sums = plan, reading.dataset, reading.sums
        self._arrays = checksums.open_arrays(path / RESULTS)

    @classmethod
    def resume(cls, path: Path, settings: Mapping[str, Any], plan: Plan, attrs: Mapping[str, Any]) -> RunFolder:
        """The folder of an unfinished run that agrees with the plan; its finished batches are kept."""
        planned = _empty(settings, plan, attrs)
        restored: list[str] = []
        if not (path / RESULTS).exists():  # killed between its settings and its first results, by an earlier version
            _restore(path, settings, plan, attrs)
        try:
            reading = checksums.read(path / RESULTS)
        except Damaged as damaged:
            restored = list(damaged.files)
            if checksums.OWN not in restored:
                check_settings(path, checksums.notes(path / RESULTS)[_SETTINGS], settings)
            if ".zattrs" not in restored:
                check_attrs(path, checksums.attributes(path / RESULTS), planned.attrs)
            _restore(path, settings, plan, attrs)
            reading = checksums.read(path / RESULTS)
        ours = RUN_ID in reading.dataset.attrs
        require(ours, f"'{path}'", "be a run of this version, to be resumed", "an older one, without checksums")
        check_settings(path, reading.notes[_SETTINGS], settings)
        check_attrs(path, reading.dataset.attrs, planned.attrs)
        check_arrays(path, reading.dataset, planned)
        return cls(path, plan, reading, restored)

    def pending(self) -> list[int]:
        """The indices of the plan's batches that have a lane which has not run, or whose values are damaged."""
        status = self._dataset["status"].values.ravel()
        return [i for i, lanes in enumerate(self._plan.batches) if np.any(status[lanes] == PENDING)]

    def write(self, lanes: np.ndarray, values: Values) -> None:
        """Stores one batch: its values, their checksums, and its `status` last."""
        self._plan.fill(self._dataset, lanes, values)
        self._sums[lanes] = lane_sums(self._dataset, lanes)
        shape = self._dataset["status"].shape
        memory = {name: self._dataset[name].values for name in sorted(values) if name != "status"}
        memory |= {LANES: self._sums.reshape(shape), "status": self._dataset["status"].values}
        for name, array in memory.items():
            check_run(self.path / RESULTS, self._dataset.attrs[RUN_ID])
            stored = self._arrays[name]
            for place in lane_chunks(lanes, shape, stored.chunks):
                block = tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, stored.chunks, strict=False))
                stored[block] = array[block]


@contextlib.contextmanager
def open_runs(
    root: str | Path,
    runs: Mapping[str, Run],
    *,
    resume: bool = False,
    overwrite: bool = False,
    attrs: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, RunFolder]]:
    """The folders of runs below `root` (for one run "" the root itself), locked for as long as the context lasts.

    With `resume` the started runs continue. The others are made in one step, in free places or, with `overwrite`, in
    place of old runs: if one of them fails, all the old ones stay.

    **Raises:** `InputError` for folders that hold something else, are in use, or are of runs with other settings.
    """
    root, attrs = Path(root), dict(attrs or {})
    new = {name: run for name, run in runs.items() if not (resume and is_started(root / name))}
    for name in new:
        check_free(root / name, overwrite)
    _check_room(root, sum(plan.nbytes for _, plan in new.values()))
    with contextlib.ExitStack() as held:
        for name in dict.fromkeys(("", *runs)):
            held.enter_context(locked(root / name))
        for name in new:
            check_free(root / name, overwrite)  # nobody can have made it since
        if new:
            gone = [str(Path(name, entry)) for name in {"", *new} for entry in _replaced(root / name)]
            with replacing(root, gone, within=[name for name in new if name]) as beside:
                for name, (settings, plan) in new.items():
                    _fill(beside / name, settings, plan, attrs)
        yield {
            name: RunFolder(root / name, plan, checksums.read(root / name / RESULTS))
            if name in new
            else RunFolder.resume(root / name, settings, plan, attrs)
            for name, (settings, plan) in runs.items()
        }


def run(folder: RunFolder, plan: Plan, progress: bool = True) -> None:
    """Solves the pending batches, and stores each at once."""
    for lanes, values in plan.run(folder.pending(), progress=progress):
        folder.write(lanes, values)


def load_run(path: str | Path, partial: bool = False) -> xr.Dataset:
    """The results of a run folder; every number is checked against its checksum.

    **Arguments:** the folder's `path`; `partial`, to read an unfinished run too, whose lanes that have not run are NaN
    with status -1.

    **Returns:** an `xarray.Dataset` as of `sweep`, with dims `init, alpha, rank, seed, time`, `side` before alpha where
    the run has several sides, and those of several problems first.

    **Raises:** `InputError` where the folder is missing, is no run folder, has no results yet, or its run is damaged or
    not finished.
    """
    require_flag("partial", partial)
    found = as_path("the run folder", path)
    return steady(found, lambda: _load_run(found, partial))


def steady(path: str | Path, read: Callable[[], Read]) -> Read:
    """The result of `read` on a folder's runs: on the old ones or on the new, where another process replaces them.

    **Raises:** what `read` does, or `InputError` where that process does not come to its end within seconds.
    """
    path, until = Path(path), time.monotonic() + _REPLACED_WITHIN
    while True:
        before = _identity(path)
        try:
            found = read()
            if _identity(path) == before and not is_replaced(path):
                return found
        except (InputError, OSError):
            if _identity(path) == before and not is_replaced(path):
                raise
        require(time.monotonic() < until, f"'{path}'", "stay in place while it is read", "one that is being replaced")
        time.sleep(0.01)


def _identity(path: Path) -> list[tuple[str, int]]:
    """What is another where a run, or one of the runs in a folder, has been replaced."""
    found = []
    for run in (path, *path.glob("*")):
        for entry in (run / SETTINGS, run / RESULTS):
            with contextlib.suppress(OSError):
                found.append((str(entry), entry.stat().st_ino))
    return sorted(found)


def _load_run(path: Path, partial: bool) -> xr.Dataset:
    read_settings(path)
    require((path / RESULTS).is_dir(), f"'{path}'", f"hold {RESULTS}", f"an unfinished run; {_resume_hint(path)}")
    dataset, damaged = _read_results(path)
    if partial and not damaged:
        return _without_pending(dataset)
    total, pending = dataset["status"].size, int(np.sum(dataset["status"].values == PENDING))
    told = f"{total - pending} of {total} lanes" + (f", damaged or missing {listed(damaged)}" if damaged else "")
    require(pending == 0, f"'{path}'", "hold a finished run", f"{told}; {_resume_hint(path)}")
    return dataset


def _without_pending(dataset: xr.Dataset) -> xr.Dataset:
    """NaN in every quantity of the lanes that have not run, whatever the file holds for them."""
    ran = dataset["status"] != PENDING
    quantities = {name: one.where(ran) for name, one in dataset.data_vars.items() if one.dtype.kind == "f"}
    return dataset.assign(quantities)


def load_figure(path: str | Path, partial: bool = False) -> tuple[str, dict[str, xr.Dataset]]:
    """The name of the figure that a folder was made for, "" for a plain run, and its runs by their names.

    With `partial` the runs may be unfinished, see `load_run`.

    **Raises:** `InputError` as `load_run` does, and for a folder that holds neither a run nor a figure's runs.
    """
    return steady(path, lambda: _load_figure(Path(path), partial))


def _load_figure(path: Path, partial: bool) -> tuple[str, dict[str, xr.Dataset]]:
    mend(path)
    runs = sorted(folder.parent for folder in path.glob(f"*/{SETTINGS}") if not is_generated(folder.parent.name))
    if (path / SETTINGS).is_file() or not runs:
        datasets = {"": _load_run(path, partial)}
    else:
        datasets = {run.name: _load_run(run, partial) for run in runs}
    names = {str(dataset.attrs.get(_FIGURE) or "") for dataset in datasets.values()}
    one = len(names) == 1 and (names != {""} or "" in datasets)
    require(one, f"'{path}'", "be a run folder or hold the runs of one figure", f"{len(datasets)} runs in folders")
    return names.pop(), datasets


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that a run folder was started with."""
    path = Path(path)
    require(path.is_dir(), "the run folder", "exist", f"'{path}'")
    mend(path)
    require((path / SETTINGS).is_file(), f"'{path}'", "be a run folder", f"one without {SETTINGS}")
    return read_toml(path / SETTINGS)


def check_free(path: str | Path, overwrite: bool) -> None:
    """Raises unless a run folder may be made at `path`."""
    path = Path(path)
    if not path.exists():
        return
    require(path.is_dir(), "out", "be a folder", f"the file '{path}'")
    mend(path)
    if is_vacant(path):
        return
    stored = set(read_toml(path / SETTINGS)) if is_started(path) else set()
    is_run = {"init", "alpha", "rank", "t1"} <= stored
    require(is_run, "out", "be a new folder or a run folder", f"'{path}', which holds something else")
    require(overwrite, "out", "be new (--overwrite replaces it, --resume continues it)", f"the run '{path}'")


def is_vacant(path: Path) -> bool:
    """Whether a folder is empty, except for earlier results that the program or a person has set aside."""
    return all(entry.name.startswith(f"{RESULTS}.") or is_generated(entry.name) for entry in path.iterdir())


def check_parts(path: str | Path, names: Iterable[str]) -> None:
    """Raises unless `path` is free for a figure made of several runs, or holds nothing but such a figure."""
    path = Path(path)
    if path.exists():
        require(path.is_dir(), "out", "be a folder", f"the file '{path}'")
        mend(path)
        held = {entry.name for entry in path.iterdir() if not is_generated(entry.name)}
        foreign = sorted(held - {*names, "figures", *drawn(path)})
        require(not foreign, "out", "be a new folder or this figure's", f"'{path}', which holds {', '.join(foreign)}")


def is_started(path: str | Path) -> bool:
    """Whether a run folder has its settings, and so can be resumed."""
    mend(path)
    return (Path(path) / SETTINGS).is_file()


def kept_problem(path: str | Path) -> Path | None:
    """The run's copy of the problem's file, from which the run is resumed even if that file has gone."""
    copies = [Path(path) / f"{PROBLEM}{suffix}" for suffix in _SUFFIXES]
    return next(filter(Path.is_file, copies), None)


def drawn(path: Path) -> list[str]:
    """The report, its tables and the pictures of results, as names below their folder."""
    patterns = ("report.md", "report-*.csv", "figures/sweep*.png", "figures/figure*.png")
    return [made.relative_to(path).as_posix() for pattern in patterns for made in path.glob(pattern)]


def _read_results(path: Path) -> tuple[xr.Dataset, list[str]]:
    """The dataset, in which damaged lanes count as not run, and the names of the damaged parts."""
    try:
        dataset, damaged = checksums.read(path / RESULTS)[:2]
    except Damaged as error:
        raise InputError(f"{error}; {_resume_hint(path, 'mend it')}") from error
    dataset.attrs = portable_attrs(dataset.attrs)  # those of older runs are not yet
    dataset.attrs.pop(RUN_ID, None)
    return dataset, damaged


def _check_room(path: Path, needed: int) -> None:
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    room = free > 1.2 * needed + 2**20
    require(room, "out", f"have room for {needed / 1e6:.3g} MB of results", f"{free / 1e6:.3g} MB free")


def _fill(folder: Path, settings: Mapping[str, Any], plan: Plan, attrs: Mapping[str, Any]) -> None:
    """Makes settings, results without lanes, and the problem's copy in a folder that is about to take a run's place."""
    empty = _empty(settings, plan, attrs)
    chunks = {str(name): _chunks(empty, name, plan.batch_size) for name in empty.data_vars}
    checksums.create(folder / RESULTS, empty, chunks, {_SETTINGS: dict(settings)}, plan.batches)
    write_atomically(folder / SETTINGS, tomli_w.dumps(dict(settings)))
    named = Path(str(settings["problem"]))
    if named.suffix in _SUFFIXES and named.is_file():
        shutil.copyfile(named, folder / f"{PROBLEM}{named.suffix}")


def _empty(settings: Mapping[str, Any], plan: Plan, attrs: Mapping[str, Any]) -> xr.Dataset:
    """The dataset without results, with all that identifies it."""
    empty = plan.empty()
    told = dict(settings) | {"devices": plan.devices} | dict(attrs)
    told = portable_attrs({name: value for name, value in told.items() if name not in empty.dims})
    return empty.assign_attrs(told | empty.attrs | {RUN_ID: uuid.uuid4().hex})


def _restore(path: Path, settings: Mapping[str, Any], plan: Plan, attrs: Mapping[str, Any]) -> None:
    """Makes metadata and coordinates anew from the plan; undamaged lanes of this plan are kept."""
    figure = checksums.attributes(path / RESULTS).get(_FIGURE)
    with replacing(path) as new:
        _fill(new, settings, plan, {_FIGURE: figure} | dict(attrs) if figure else attrs)
        checksums.copy_lanes(path / RESULTS, new / RESULTS)
        kept = kept_problem(path)
        if kept is not None:
            shutil.copyfile(kept, new / kept.name)


def _replaced(path: Path) -> list[str]:
    """What goes when a run takes another's place."""
    return [*drawn(path), *(f"{PROBLEM}{suffix}" for suffix in _SUFFIXES)]


def _chunks(dataset: xr.Dataset, name: Any, batch_size: int) -> tuple[int, ...]:
    """About a batch of neighbouring lanes in one file, with all that is stored of them."""
    sizes, room, chunks = dataset[name].sizes, batch_size, {}
    for dim in reversed(dataset["status"].dims):
        chunks[dim] = min(sizes[dim], room)
        room = max(1, room // sizes[dim])
    return tuple(chunks.get(dim, size) for dim, size in sizes.items())


def _resume_hint(path: Path, what: str = "finish it") -> str:
    return f"{what} with: lora-flow sweep --out {path} --resume"

"""A run folder: the settings, the results as Zarr, and the guarantees about both.

    settings.toml   what was asked for; enough to repeat or resume the run
    results.zarr    opens with `xarray.open_zarr`; lanes that have not run have status -1
    figures/*.png, report.md

A batch is written as soon as it is solved, its `status` last, and every file is replaced in one step: whenever the
process is killed, a lane whose status says it is done has all its values, and the others are solved again.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import xarray as xr
import zarr

from lora_flow.checks import InputError, require
from lora_flow.labels import PENDING, portable_attrs
from lora_flow.plan import Plan, Values, digest
from lora_flow.settings import Settings, to_table
from lora_flow.storage import write_atomically
from lora_flow.toml import read_toml

SETTINGS, RESULTS = "settings.toml", "results.zarr"


class RunFolder:
    """One run's folder. `create` makes it, `resume` goes on with it, `load_run` reads a finished one."""

    def __init__(self, path: Path, plan: Plan):
        self.path = path
        self._plan = plan
        self._dataset = _read_results(path)
        self._arrays: Any = zarr.open_group(path / RESULTS, mode="r+")

    @classmethod
    def create(
        cls,
        path: str | Path,
        settings: Mapping[str, Any],
        plan: Plan,
        overwrite: bool = False,
        attrs: Mapping[str, Any] | None = None,
    ) -> RunFolder:
        """A new run folder, with nothing solved yet; refuses to touch one that exists unless `overwrite`.

        An old run goes only once the new one is whole beside it.
        """
        path = Path(path)
        check_free(path, overwrite)
        _check_room(path, plan.nbytes)
        path.mkdir(parents=True, exist_ok=True)
        with _new_results(path, plan, dict(settings) | dict(attrs or {})) as new:
            if (path / RESULTS).exists():
                (path / RESULTS).replace(path / f"{RESULTS}.{uuid.uuid4().hex}.old")
            write_atomically(path / SETTINGS, tomli_w.dumps(dict(settings)))
            new.replace(path / RESULTS)
        remove_drawn(path)
        _remove_leftovers(path)
        return cls(path, plan)

    @classmethod
    def resume(cls, path: str | Path, plan: Plan, attrs: Mapping[str, Any] | None = None) -> RunFolder:
        """The folder of an unfinished run with the same settings, whose finished batches are kept."""
        path = Path(path)
        if not (path / RESULTS).exists():  # killed between its settings and its first results
            with _new_results(path, plan, read_settings(path) | dict(attrs or {})) as new:
                new.replace(path / RESULTS)
        _remove_leftovers(path)
        folder = cls(path, plan)
        stored = folder._dataset.attrs.get("problem_digest")
        require(
            stored == digest(plan.problems),
            "problem",
            f"be the one that '{path}' was started with, to resume it",
            "other weights or another shift",
        )
        fresh = plan.empty()
        same = set(fresh.data_vars) == set(folder._dataset.data_vars)
        require(same, "results", "be of this version's variables, to resume them", f"those of an older one in '{path}'")
        now = fresh.attrs
        for name in ("lora_flow_version", "jax_version", "diffrax_version", "platform", "dtype"):
            stored = folder._dataset.attrs[name]
            require(now[name] == stored, name, f"be {stored}, as '{path}' was started, to resume it", now[name])
        return folder

    def pending(self) -> list[int]:
        """The indices of the plan's batches that have a lane which has not run."""
        status = self._dataset["status"].values.ravel()
        return [i for i, lanes in enumerate(self._plan.batches) if np.any(status[lanes] == PENDING)]

    def write(self, lanes: np.ndarray, values: Values) -> None:
        """Stores one batch, `status` last."""
        self._plan.fill(self._dataset, lanes, values)
        for name in sorted(values, key=lambda name: name == "status"):
            memory, stored = self._dataset[name].values, self._arrays[name]
            chunk = np.array(stored.chunks[: self._dataset["status"].ndim])
            corners = np.stack(np.unravel_index(lanes, self._dataset["status"].shape), axis=-1) // chunk * chunk
            for corner in np.unique(corners, axis=0):
                block = tuple(slice(start, start + size) for start, size in zip(corner, chunk, strict=True))
                with zarr.config.set({"array.write_empty_chunks": True}):
                    stored[block] = memory[block]


def run(folder: RunFolder, plan: Plan, progress: bool = True) -> xr.Dataset:
    """Solves what is pending, stores each batch at once, and returns the finished dataset."""
    for lanes, values in plan.run(folder.pending(), progress=progress):
        folder.write(lanes, values)
    return load_run(folder.path)


def load_run(path: str | Path, partial: bool = False) -> xr.Dataset:
    """The dataset of a finished run; with `partial` of any, whose lanes that have not run are NaN with status -1.

    **Raises:** `InputError` where the folder is missing, is no run folder, has no results yet, or its run is not
    finished.
    """
    path = Path(path)
    read_settings(path)
    require((path / RESULTS).is_dir(), f"'{path}'", f"hold {RESULTS}", f"an unfinished run; {_resume_hint(path)}")
    dataset = _read_results(path)
    if partial:
        return _without_pending(dataset)
    total, pending = dataset["status"].size, int(np.sum(dataset["status"].values == PENDING))
    require(
        pending == 0, f"'{path}'", "hold a finished run", f"{total - pending} of {total} lanes; {_resume_hint(path)}"
    )
    return dataset


def _without_pending(dataset: xr.Dataset) -> xr.Dataset:
    """NaN in every quantity of the lanes that have not run, whatever of them is stored."""
    ran = dataset["status"] != PENDING
    quantities = {name: one.where(ran) for name, one in dataset.data_vars.items() if one.dtype.kind == "f"}
    return dataset.assign(quantities)


def load_figure(path: str | Path, partial: bool = False) -> tuple[str, dict[str, xr.Dataset]]:
    """The name of the figure that a folder was made for, "" for a plain run, and its runs by their names.

    With `partial` they need not be finished, see `load_run`.

    **Raises:** `InputError` as `load_run` does, and for a folder that holds neither a run nor a figure's runs.
    """
    path = Path(path)
    runs = sorted(folder.parent for folder in path.glob(f"*/{SETTINGS}"))
    if (path / SETTINGS).is_file() or not runs:
        datasets = {"": load_run(path, partial)}
    else:
        datasets = {run.name: load_run(run, partial) for run in runs}
    names = {str(dataset.attrs.get("figure") or "") for dataset in datasets.values()}
    one = len(names) == 1 and (names != {""} or "" in datasets)
    require(one, f"'{path}'", "be a run folder or hold the runs of one figure", f"{len(datasets)} runs in folders")
    return names.pop(), datasets


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that a run folder was started with."""
    path = Path(path)
    require(path.is_dir(), "the run folder", "exist", f"'{path}'")
    require((path / SETTINGS).is_file(), f"'{path}'", "be a run folder", f"one without {SETTINGS}")
    return read_toml(path / SETTINGS)


def check_free(path: str | Path, overwrite: bool) -> None:
    """Raises unless a run folder may be made at `path`."""
    path = Path(path)
    if not path.exists():
        return
    require(path.is_dir(), "out", "be a folder", f"the file '{path}'")
    if all(entry.name.startswith(f"{RESULTS}.") for entry in path.iterdir()):
        return  # empty, or killed before it had settings
    stored = set(read_toml(path / SETTINGS)) if is_started(path) else set()
    is_run = {"init", "alpha", "rank", "t1"} <= stored <= set(to_table(Settings()))
    require(is_run, "out", "be a new folder or a run folder", f"'{path}', which holds something else")
    require(overwrite, "out", "be new (--overwrite replaces it, --resume goes on with it)", f"the run '{path}'")


def check_parts(path: str | Path, names: Iterable[str]) -> None:
    """Raises unless `path` is free for a figure made of several runs, or holds nothing but such a figure."""
    path = Path(path)
    if path.exists():
        require(path.is_dir(), "out", "be a folder", f"the file '{path}'")
        tables = {table.name for table in path.glob("report-*.csv")}
        foreign = sorted({entry.name for entry in path.iterdir()} - {*names, "figures", "report.md"} - tables)
        require(not foreign, "out", "be a new folder or this figure's", f"'{path}', which holds {', '.join(foreign)}")


def is_started(path: str | Path) -> bool:
    """Whether a run folder has its settings, and so can be resumed."""
    return (Path(path) / SETTINGS).is_file()


def remove_drawn(path: Path) -> None:
    """Removes the report and the pictures of results that are replaced."""
    pictures = (*path.glob("figures/sweep*.png"), *path.glob("figures/figure*.png"))
    for drawn in (path / "report.md", *path.glob("report-*.csv"), *pictures):
        drawn.unlink(missing_ok=True)


def _read_results(path: Path) -> xr.Dataset:
    try:
        dataset = xr.open_zarr(path / RESULTS, consolidated=True).load()
        dataset.attrs = portable_attrs(dataset.attrs)  # those of older runs are not yet
        lost = (dataset["status"] == 0) & dataset["loss"].isnull().any("time")
        dataset["status"].values[lost.values] = PENDING  # a finished lane has all its values, or it is solved again
        return dataset
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"'{path / RESULTS}' must be readable by xarray.open_zarr, got {error}") from error


def _check_room(path: Path, needed: int) -> None:
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    room = free > 1.2 * needed + 2**20
    require(room, "out", f"have room for {needed / 1e6:.3g} MB of results", f"{free / 1e6:.3g} MB free")


@contextlib.contextmanager
def _new_results(folder: Path, plan: Plan, attrs: Mapping[str, Any]) -> Iterator[Path]:
    """The dataset without results under another name, to be renamed when it is whole; gone if that does not happen."""
    empty = plan.empty()
    empty.attrs = portable_attrs({name: value for name, value in attrs.items() if name not in empty.dims}) | empty.attrs
    chunks = {name: {"chunks": _chunks(empty, name, plan.batch_size)} for name in empty.data_vars}
    partial = folder / f"{RESULTS}.{uuid.uuid4().hex}.partial"
    try:
        empty.to_zarr(partial, encoding=chunks, zarr_format=2, consolidated=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Removes what a run that was killed while it made or replaced its results has left under other names."""
    for leftover in folder.glob(f"{RESULTS}.*"):
        shutil.rmtree(leftover)


def _chunks(dataset: xr.Dataset, name: Any, batch_size: int) -> tuple[int, ...]:
    """About a batch of neighbouring lanes in one file, with all their times."""
    sizes = dict(dataset[name].sizes)
    chunks = {"time": sizes.pop("time")} if "time" in sizes else {}
    room = batch_size
    for dim in reversed(list(sizes)):
        chunks[dim] = min(sizes[dim], room)
        room = max(1, room // sizes[dim])
    return tuple(chunks[dim] for dim in dataset[name].dims)


def _resume_hint(path: Path) -> str:
    return f"finish it with: lora-flow sweep --out {path} --resume"

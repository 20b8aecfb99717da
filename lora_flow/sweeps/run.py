"""How the run folders of sweeps are made, gone on with, solved and read: of one run, or of a figure's several."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import xarray as xr

from lora_flow.checks import require, require_flag
from lora_flow.runtime import interrupts
from lora_flow.storage.disk import require_room
from lora_flow.storage.folder import RESULTS, SETTINGS, Folder, is_started, read_settings, steady
from lora_flow.storage.locks import InUse, holder, locked, mend
from lora_flow.storage.portable import portable_attrs
from lora_flow.storage.remote import RunPath, run_path
from lora_flow.storage.swap import is_generated
from lora_flow.sweeps.executors import Executor, InProcess, solved
from lora_flow.sweeps.folder import FIGURE, SWEEP, drawn, figure_of, template_of
from lora_flow.sweeps.plan import Plan
from lora_flow.sweeps.schema import LANE_DIMS

_PREPARES = ", which prepares it"  # for the parts of a run
_PREPARED_WITHIN = 600.0  # seconds

Loaded = TypeVar("Loaded")


class Looked(NamedTuple):
    """The results of a run, at `path`, as they are described; `lora_flow.storage.reading.lanes` reads some."""

    path: RunPath
    dataset: xr.Dataset


Run = tuple[Mapping[str, Any], Plan]
"""What a run was asked for, as in its settings file, and how that is done."""


@contextlib.contextmanager
def open_runs(
    root: str | RunPath,
    runs: Mapping[str, Run],
    *,
    resume: bool = False,
    overwrite: bool = False,
    attrs: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Folder]]:
    """The folders of runs below `root` (for one run "" the root itself), locked for as long as the context lasts.

    With `resume` the started runs continue. The others are made in one step, in free places or, with `overwrite`, in
    place of old runs: if one of them fails, all the old ones stay.

    **Raises:** `InputError` for folders that hold something else, are in use, or are of runs with other settings.
    """
    root = run_path("out", root)
    new = {name: run for name, run in runs.items() if not (resume and is_started(root / name))}
    for name in new:
        SWEEP.check_free(root / name, overwrite)
    require_room(root, sum(plan.nbytes for _, plan in new.values()))
    with contextlib.ExitStack() as held:
        for name in dict.fromkeys(("", *runs)):
            held.enter_context(locked(root / name))
        for name in new:
            SWEEP.check_free(root / name, overwrite)  # nobody can have made it since
        yield _opened(root, runs, new, dict(attrs or {}))


@contextlib.contextmanager
def share_run(path: str | RunPath, run: Run, attrs: Mapping[str, Any] | None = None) -> Iterator[Folder]:
    """The folder of a run that several processes solve parts of; whoever finds nobody there makes or mends the run.

    **Raises:** `InputError` for a folder that holds something else or a run with other settings, and where a process
    solves the whole run.
    """
    path, (settings, plan) = run_path("out", path), run
    template = template_of(settings, plan, dict(attrs or {}))
    with contextlib.suppress(InUse), locked(path, purpose=_PREPARES):
        if is_started(path):
            SWEEP.resume(path, template)
        else:
            SWEEP.check_free(path, overwrite=False)
            require_room(path, plan.nbytes)
            SWEEP.make(path, {"": template})
    with contextlib.ExitStack() as held:
        until = time.monotonic() + _PREPARED_WITHIN
        while True:
            try:
                held.enter_context(locked(path, shared=True))
                break
            except InUse:
                if _PREPARES not in holder(path) or time.monotonic() > until:
                    raise
        yield SWEEP.join(path, template)


def run(folder: Folder, plan: Plan, executor: Executor | None = None, progress: bool = True, go_on: str = "") -> None:
    """Has the pending boxes solved, in this process unless said otherwise, and stored at once.

    `go_on` is the command that goes on with the run, to be told where it is interrupted.
    """
    pending, stored = folder.pending(), f"solved boxes are stored, continue with: {go_on}"
    if go_on and len(pending) < plan.layout.boxes.count:
        interrupts.tell(stored)
    for _ in solved(plan, folder, pending, executor or InProcess(), progress) if pending else ():
        if go_on:
            interrupts.tell(stored)


def load_run(path: str | RunPath, partial: bool = False) -> xr.Dataset:
    """The results of a run folder; every number is checked against its checksum.

    **Arguments:** the folder's `path`, or its URL in an object store; `partial`, to read an unfinished run too, whose
    lanes that have not run are NaN with status -1.

    **Returns:** an `xarray.Dataset` as of `sweep`, with dims `init, alpha, rank, seed, time`, `side` before alpha where
    the run has several sides, and those of several problems first.

    **Raises:** `InputError` where the folder is missing, is no run folder, has no results yet, or its run is damaged or
    not finished.
    """
    require_flag("partial", partial)
    found = run_path("the run folder", path)
    return steady(found, lambda: _load_run(found, partial))


def load_figure(path: str | RunPath, partial: bool = False) -> tuple[str, dict[str, xr.Dataset]]:
    """The name of the figure that a folder was made for, "" for a plain run, and its runs by their names.

    With `partial` the runs may be unfinished, see `load_run`.

    **Raises:** `InputError` as `load_run` does, and for a folder that holds neither a run nor a figure's runs.
    """
    found = run_path("the run folder", path)
    return steady(found, lambda: _load_figure(found, partial))


def look_at(path: str | RunPath) -> dict[str, Looked]:
    """The runs of a folder by their names, of one run "" alone, finished or not, of which no lane is read yet.

    **Raises:** `InputError` as `load_figure` does.
    """
    found = run_path("the run folder", path)

    def look(run: RunPath) -> Looked:
        read_settings(run)
        return Looked(run / RESULTS, _of_sweep(run, SWEEP.look(run)))

    return steady(found, lambda: _runs_below(found, look))


def check_parts(path: str | RunPath, names: Iterable[str]) -> None:
    """Raises unless `path` is free for a figure made of several runs, or holds nothing but such a figure."""
    path = run_path("out", path)
    if path.exists():
        require(path.is_dir(), "out", "be a folder", f"the file '{path}'")
        mend(path)
        held = {entry.name for entry in path.iterdir() if not is_generated(entry.name)}
        foreign = sorted(held - {*names, "figures", *drawn(path)})
        require(not foreign, "out", "be a new folder or this figure's", f"'{path}', which holds {', '.join(foreign)}")


def _load_run(path: RunPath, partial: bool) -> xr.Dataset:
    read_settings(path)
    return _of_sweep(path, SWEEP.load(path, partial))


def _of_sweep(path: RunPath, dataset: xr.Dataset) -> xr.Dataset:
    require(set(LANE_DIMS) - {"side"} <= set(dataset.dims), f"'{path}'", "hold a sweep", "results of another kind")
    dataset.attrs = portable_attrs(dataset.attrs)  # those of older runs are not yet
    return dataset


def _load_figure(path: RunPath, partial: bool) -> tuple[str, dict[str, xr.Dataset]]:
    datasets = _runs_below(path, lambda run: _load_run(run, partial))
    names = {str(dataset.attrs.get(FIGURE) or "") for dataset in datasets.values()}
    one = len(names) == 1 and (names != {""} or "" in datasets)
    require(one, f"'{path}'", "be a run folder or hold the runs of one figure", f"{len(datasets)} runs in folders")
    return names.pop(), datasets


def _runs_below(path: RunPath, load: Callable[[RunPath], Loaded]) -> dict[str, Loaded]:
    """The runs of a folder, each loaded: the folder's own as "", or else those in folders below."""
    mend(path)
    runs = sorted(folder.parent for folder in path.glob(f"*/{SETTINGS}") if not is_generated(folder.parent.name))
    return {"": load(path)} if (path / SETTINGS).is_file() or not runs else {run.name: load(run) for run in runs}


def _opened(
    root: RunPath, runs: Mapping[str, Run], new: Mapping[str, Run], attrs: Mapping[str, Any]
) -> dict[str, Folder]:
    figures = {name: figure_of(root / name) for name in runs if name not in new}
    kept = {name: {FIGURE: figure} for name, figure in figures.items() if figure}
    told = {name: {**kept.get(name, {}), **attrs} for name in runs}
    templates = {name: template_of(settings, plan, told[name]) for name, (settings, plan) in runs.items()}
    if new:
        SWEEP.make(root, {name: templates[name] for name in new})
    return {name: SWEEP.resume(root / name, template) for name, template in templates.items()}

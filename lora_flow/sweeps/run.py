"""The run folders of sweeps: of one run, or of a figure's several.

settings.toml, results.zarr   as in every run folder, with the same guarantees: see `lora_flow.storage.folder`
figures/*.png, report.md, report-*.csv
problem-as-started.npz or .safetensors   a copy of the file that --problem named
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from lora_flow.checks import require, require_flag
from lora_flow.runtime import interrupts
from lora_flow.storage import checksums
from lora_flow.storage.disk import require_room
from lora_flow.storage.folder import RESULTS, SETTINGS, Folder, Kind, Template, is_started, read_settings, steady
from lora_flow.storage.locks import InUse, holder, locked, mend
from lora_flow.storage.portable import portable_attrs
from lora_flow.storage.remote import RunPath, below, run_path
from lora_flow.storage.swap import is_generated
from lora_flow.storage.unchanged import check_same
from lora_flow.sweeps import from_python
from lora_flow.sweeps.executors import Executor, InProcess, solved
from lora_flow.sweeps.plan import Plan
from lora_flow.sweeps.schema import LANE_DIMS

PROBLEM = "problem-as-started"
_SUFFIXES = (".npz", ".safetensors")  # of files that hold a problem
_COPIES = [f"{PROBLEM}{suffix}" for suffix in _SUFFIXES]
_FIGURE = "figure"  # the attribute of a run that was made for a figure
_PREPARES = ", which prepares it"  # for the parts of a run
_PREPARED_WITHIN = 600.0  # seconds
_NOTE, _LAYOUT = "settings", "layout"  # the notes of what a run was asked for, and of how it is cut
_SAME = ["lora_flow_version", "jax_version", "diffrax_version", "platform", "dtype"]  # attributes of a resumed run
_SAME += ["t1", "flow", "solver", "rtol", "max_steps", "batch_size"]
_ALWAYS = {"init", "side", "alpha", "rank", "seeds", "t1", "saves", "spacing", "problem", "problem_seed", "m", "n", "h"}
_ALWAYS |= {"solver", "rtol", "max_steps", "batch_size", "precision"}  # settings that every version has written

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


def check_parts(path: str | RunPath, names: Iterable[str]) -> None:
    """Raises unless `path` is free for a figure made of several runs, or holds nothing but such a figure."""
    path = run_path("out", path)
    if path.exists():
        require(path.is_dir(), "out", "be a folder", f"the file '{path}'")
        mend(path)
        held = {entry.name for entry in path.iterdir() if not is_generated(entry.name)}
        foreign = sorted(held - {*names, "figures", *drawn(path)})
        require(not foreign, "out", "be a new folder or this figure's", f"'{path}', which holds {', '.join(foreign)}")


def kept_problem(path: RunPath) -> RunPath | None:
    """The run's copy of the problem's file, from which the run is resumed even if that file has gone."""
    return next((kept for name in _COPIES if (kept := path / name).is_file()), None)


def stored_layout(path: RunPath) -> dict[str, Any] | None:
    """What a run has noted of its layout, for `plan_sweep`; None where that cannot be read."""
    note = checksums.notes(path / RESULTS).get(_LAYOUT)
    if not isinstance(note, dict) or not isinstance(note.get("box"), dict):
        return None
    whole = all(isinstance(one, int) and one > 0 for one in (*note["box"].values(), note.get("width")))
    return note if whole else None


def figure_of(path: RunPath) -> str:
    """The name of the figure that a run was made for, "" for a plain run."""
    return str(checksums.attributes(path / RESULTS).get(_FIGURE) or "")


def drawn(path: RunPath) -> list[str]:
    """The report, its tables and the pictures of results, as names below their folder."""
    patterns = ("report.md", "report-*.csv", "figures/sweep*.png", "figures/figure*.png")
    return [below(path, made) for pattern in patterns for made in path.glob(pattern)]


def _load_run(path: RunPath, partial: bool) -> xr.Dataset:
    read_settings(path)
    dataset = SWEEP.load(path, partial)
    require(set(LANE_DIMS) - {"side"} <= set(dataset.dims), f"'{path}'", "hold a sweep", "results of another kind")
    dataset.attrs = portable_attrs(dataset.attrs)  # those of older runs are not yet
    return dataset


def _load_figure(path: RunPath, partial: bool) -> tuple[str, dict[str, xr.Dataset]]:
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


def _opened(
    root: RunPath, runs: Mapping[str, Run], new: Mapping[str, Run], attrs: Mapping[str, Any]
) -> dict[str, Folder]:
    figures = {name: figure_of(root / name) for name in runs if name not in new}
    kept = {name: {_FIGURE: figure} for name, figure in figures.items() if figure}
    told = {name: {**kept.get(name, {}), **attrs} for name in runs}
    templates = {name: template_of(settings, plan, told[name]) for name, (settings, plan) in runs.items()}
    if new:
        SWEEP.make(root, {name: templates[name] for name in new})
    return {name: SWEEP.resume(root / name, template) for name, template in templates.items()}


def template_of(settings: Mapping[str, Any], plan: Plan, attrs: Mapping[str, Any]) -> Template:
    """A run that is asked for by these settings, with these attributes beside theirs, before any lane has run."""
    outline = plan.outline()
    told = dict(settings) | dict(attrs)
    told = portable_attrs({name: value for name, value in told.items() if name not in outline.dims})
    outline = outline.assign_attrs(told | outline.attrs)
    named = Path(str(settings["problem"]))
    copies = {f"{PROBLEM}{named.suffix}": named} if named.suffix in _SUFFIXES and named.is_file() else {}
    box = [length for dim, length in zip(plan.grid.axes, plan.layout.boxes.box, strict=True) if dim in outline.dims]
    return Template(settings, outline, tuple(box), {_NOTE: dict(settings), _LAYOUT: plan.noted_layout}, copies)


def _check_unchanged(path: RunPath, template: Template, notes: Any, attrs: Any) -> None:
    """The settings; then the plan and the problem, by the same versions on the same platform."""
    now = template.dataset.attrs
    if notes is not None:
        names = (name for name in template.settings if name != "devices")  # which is how many there are
        check_same(path, notes.get(_NOTE, {}), template.settings, names)
    if attrs is not None:
        check_same(path, attrs, now, _SAME)
        ours, must = attrs.get("problem_digest"), f"be the one that '{path}' was started with, to resume it"
        require(ours == now["problem_digest"], "problem", must, "other weights or another shift")


SWEEP = Kind(
    noun="run",
    folder="a run folder",
    is_mine=lambda settings: set(settings) >= (from_python.ALWAYS if from_python.is_from_python(settings) else _ALWAYS),
    made=lambda path: [*drawn(path), *_COPIES],
    go_on=from_python.go_on,
    unchanged=_check_unchanged,
)

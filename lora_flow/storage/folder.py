"""Run folders of every kind: what was asked for, the results, and the guarantees about both.

    settings.toml   what was asked for; enough to repeat or resume the run
    results.zarr    opens with `xarray.open_zarr`; lanes that have not run have status -1

A box of lanes is written as soon as it is known, its `status` last, once all else of it is on the disk, and every file
is replaced in one step. Whenever the process is killed, a lane whose status says that it has run has all its values;
the others run again. A lane's values and all data common to the lanes have checksums: damaged lanes are named, and run
again as well.

A `Kind` says what tells its runs from other people's folders, a `Template` what one run stores. Neither plans, problems
nor JAX are known here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tomli_w
import xarray as xr

from lora_flow.checks import InputError, require
from lora_flow.storage import checksums
from lora_flow.storage.checksums import LANES, RUN_ID
from lora_flow.storage.lanes import NOT_RUN, waiting
from lora_flow.storage.locks import mend
from lora_flow.storage.reading import Damaged, Reading, listed, read
from lora_flow.storage.remote import RunPath, made_here, run_path
from lora_flow.storage.resumable import check_arrays
from lora_flow.storage.swap import copy_file, is_generated, is_replaced, replacing, sync, write_atomically
from lora_flow.storage.toml import read_toml

SETTINGS, RESULTS = "settings.toml", "results.zarr"
_REPLACED_WITHIN, _COPIED_WITHIN = 5.0, 60.0  # seconds that a reader waits for a replacement, on a disk or in a store
_IN_MEMORY = 2**27  # bytes up to which results are read at once, and not when they are asked for

Read = TypeVar("Read")


class Template(NamedTuple):
    """A run before any of its lanes has run.

    - `settings`: the table of `settings.toml`; `copies`: name -> file, of which the folder keeps a copy.
    - `dataset`, `box`, `noted`: as for `checksums.create`. Without a box the run is stored as a whole. The
      `flag_values` of `status` are the meanings that a lane may end with.
    - `lost`: of the number of a box that has run, the names of its damaged files beside the results.
    """

    settings: Mapping[str, Any]
    dataset: xr.Dataset
    box: tuple[int, ...] | None = None
    noted: Mapping[str, Any] | None = None
    copies: Mapping[str, Path] | None = None
    lost: Callable[[int], Sequence[str]] | None = None

    def make(self, folder: RunPath) -> None:
        """Makes all of it in a folder that is about to take a run's place."""
        self.make_results(folder)
        write_atomically(folder / SETTINGS, tomli_w.dumps(dict(self.settings)))
        for name, file in (self.copies or {}).items():
            copy_file(file, folder / name)

    def make_results(self, folder: RunPath) -> None:
        dataset = self.dataset.assign_attrs({RUN_ID: uuid.uuid4().hex}) if self.box else self.dataset
        with made_here(folder / RESULTS) as results:
            checksums.create(results, dataset, self.box, self.noted)


class Folder:
    """One run's folder while it is written, by any number of processes; `Kind.resume` opens it.

    **Arguments:** the folder's `path`; the `run_id` of its results, and `begin`, the sum of their description. With
    these another process opens the same run. `damaged` names what was found damaged.
    """

    def __init__(self, path: RunPath, run_id: str, begin: int):
        self.path, self.run_id, self.begin = path, run_id, begin
        self.damaged: list[str] = []
        self._arrays = checksums.open_arrays(path / RESULTS)
        self._boxes = checksums.boxes_of(path / RESULTS)

    def pending(self) -> list[int]:
        """The numbers of the boxes with a lane that has not run, or whose values or files were damaged."""
        return self._boxes.where(self._arrays["status"][...] == NOT_RUN)

    def is_pending(self, number: int) -> bool:
        """The same of one box, as it is now."""
        return bool((self._arrays["status"][self._boxes.block(number)] == NOT_RUN).any())

    def correct(self, number: int, status: np.ndarray) -> None:
        """Stores how the lanes of a box have ended, an array over it, in place of what was stored."""
        self._arrays["status"][self._boxes.block(number)] = status

    def check_in_place(self) -> None:
        """Raises where another run has taken the place of this one: by hand, or where locks are not to be had."""
        path, must = self.path / RESULTS, "stay in place while its run is solved"
        ours = checksums.attributes(path).get(RUN_ID) == self.run_id
        require(ours, f"'{path}'", must, "another run's, or none")

    def write(self, number: int, values: Mapping[str, Any]) -> None:
        """Stores the box with this number: its values, `(lane, ...)`, the checksums, and the `status` last.

        Lanes that have run keep what is stored. The chunks of the box are written whole, and no others.
        """
        self.check_in_place()
        block, place = self._boxes.block(number), self._boxes.place(number)
        ran = self._arrays["status"][block] != NOT_RUN
        told = {name: np.reshape(one, (*ran.shape, *np.shape(one)[1:])) for name, one in sorted(values.items())}
        told = {name: one.astype(self._arrays[name].dtype) for name, one in told.items()}
        if ran.any():
            for name, one in told.items():
                one[ran] = self._arrays[name][block][ran]
        sums = checksums.lane_sums(self.begin, {name: one.reshape(ran.size, -1) for name, one in told.items()})
        status = told.pop("status")
        for name, one in {**told, LANES: sums.reshape(ran.shape)}.items():
            self.check_in_place()
            self._arrays[name][block] = one
        sync(self._file(name, place) for name in (*told, LANES))
        self.check_in_place()
        self._arrays["status"][block] = status
        sync([self._file("status", place)])

    def _file(self, name: str, place: tuple[int, ...]) -> RunPath:
        """The chunk of a variable that holds the box at this place."""
        return self.path / RESULTS / self._arrays[name].path / checksums.chunk(self._arrays[name], place)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of run, in its own words.

    - `noun`, `folder`: the run and its folder in messages, "run" and "a run folder" for instance.
    - `is_mine`: whether a table of settings is a run's of this kind.
    - `made`: the entries that a run has made beside settings and results. They go when another run takes its place.
    - `go_on`: how to continue the run in a folder; None where runs are done as a whole.
    - `boxes`: the word for its boxes of lanes.
    - `unchanged`: raises unless a run's notes and attributes, None for what is damaged, are those of the template.
    """

    noun: str
    folder: str
    is_mine: Callable[[Mapping[str, Any]], bool]
    made: Callable[[RunPath], Iterable[str]]
    go_on: Callable[[RunPath], str] | None = None
    boxes: str = "boxes"
    unchanged: Callable[[RunPath, Template, Any, Any], None] = lambda path, template, notes, attrs: None

    def owns(self, path: str | RunPath) -> bool:
        """Whether a folder holds a run of this kind."""
        path = run_path("the run folder", path)
        return is_started(path) and self.is_mine(read_toml(path / SETTINGS))

    def check_free(self, path: str | RunPath, overwrite: bool) -> None:
        """Raises unless a run of this kind may be made at `path`."""
        path = run_path("out", path)
        if not path.exists():
            return
        require(path.is_dir(), "out", "be a folder", f"the file '{path}'")
        mend(path)
        if all(entry.name.startswith(f"{RESULTS}.") or is_generated(entry.name) for entry in path.iterdir()):
            return  # empty, except for earlier results that the program or a person has set aside
        require(self.owns(path), "out", f"be a new folder or {self.folder}", f"'{path}', which holds something else")
        ways = "--overwrite replaces it" + (", --resume continues it" if self.go_on else "")
        require(overwrite, "out", f"be new ({ways})", f"the {self.noun} '{path}'")

    def make(self, root: RunPath, new: Mapping[str, Template]) -> None:
        """Makes runs by their names below `root`, of one run "" the root itself: all of them, or none.

        They take the places of old runs, which go with what was made of them. Hold the locks, and check that the
        folders are free.
        """
        gone = [str(PurePath(name, entry)) for name in dict.fromkeys(("", *new)) for entry in self.made(root / name)]
        with replacing(root, gone, within=[name for name in new if name]) as beside:
            for name, template in new.items():
                template.make(beside / name)

    def resume(self, path: RunPath, template: Template) -> Folder:
        """The folder of a run that agrees with the template; lanes that have run, and are whole, are kept.

        Damaged metadata and coordinates are made anew. Hold the folder's lock.

        **Raises:** `InputError` for a run that was started otherwise, and for one of an old version.
        """
        results, restored = path / RESULTS, list[str]()
        if not results.exists():  # somebody has removed them
            _restore(path, template)
        try:
            reading = read(results)
        except Damaged as damaged:
            restored = list(damaged.files)
            notes = None if checksums.OWN in restored else checksums.notes(results)
            attrs = None if ".zattrs" in restored else checksums.attributes(results)
            self.unchanged(path, template, notes, attrs)
            _restore(path, template)
            reading = read(results)
        folder = self._opened(path, template, reading)
        folder.damaged += [*restored, *reading.damaged]
        boxes, status = checksums.boxes_of(results), reading.dataset["status"]
        waits = waiting(status)
        for number in range(boxes.count):
            ended, wait = status.values[boxes.block(number)], waits[boxes.block(number)]
            if lost := () if wait.all() or template.lost is None else template.lost(number):
                wait = np.ones_like(wait)
                folder.damaged += lost
            if wait.any() and (folder.damaged or np.any(ended[wait] != NOT_RUN)):
                folder.correct(number, np.where(wait, NOT_RUN, ended))
        return folder

    def join(self, path: RunPath, template: Template) -> Folder:
        """The same beside other processes, as it is: no value is checked, and nothing is mended."""
        return self._opened(path, template, read(path / RESULTS, values=False))

    def _opened(self, path: RunPath, template: Template, reading: Reading) -> Folder:
        ours = RUN_ID in reading.dataset.attrs
        require(ours, f"'{path}'", "be a run of this version, to be resumed", "an older one, without checksums")
        self.unchanged(path, template, reading.notes, reading.dataset.attrs)
        check_arrays(path, reading.dataset, template.dataset)
        box = checksums.boxes_of(path / RESULTS).box
        require(box == template.box, f"'{path}'", f"have boxes of {template.box}, to be resumed", f"boxes of {box}")
        return Folder(path, reading.dataset.attrs[RUN_ID], checksums.description_sum(reading.dataset))

    def load(self, path: RunPath, partial: bool = False) -> xr.Dataset:
        """The results of a run, every number checked; with `partial` an unfinished run's too.

        **Raises:** `InputError` where there are none yet, and for a run that is damaged or not finished.
        """
        dataset, damaged, _ = self._reading(path)
        dataset.attrs.pop(RUN_ID, None)
        waits = waiting(dataset["status"]) if "status" in dataset else np.zeros(0, bool)
        if damaged or not partial:
            told = f"{np.sum(~waits)} of {waits.size} lanes"
            told += f", damaged or missing {listed(damaged)}" if damaged else ""
            require(not waits.any(), f"'{path}'", f"hold a finished {self.noun}", f"{told}; {self._go_on(path)}")
        return dataset.load() if dataset.nbytes <= _IN_MEMORY else dataset

    def look(self, path: RunPath) -> xr.Dataset:
        """A run, finished or not, as it is described: `lora_flow.storage.reading.lanes` reads the lanes asked for.

        **Raises:** `InputError` where there are no results yet, and where their description is damaged.
        """
        return self._reading(path, values=False).dataset

    def _reading(self, path: RunPath, values: bool = True) -> Reading:
        mend(path)
        results = path / RESULTS
        require(results.is_dir(), f"'{path}'", f"hold {RESULTS}", f"an unfinished {self.noun}; {self._go_on(path)}")
        try:
            return read(results, values)
        except Damaged as error:
            raise InputError(f"{error}; {self._go_on(path, 'mend it')}") from error

    def _go_on(self, path: RunPath, what: str = "finish it") -> str:
        return f"{what} with: {self.go_on(path)}" if self.go_on else "--overwrite runs it again"


def _restore(path: RunPath, template: Template) -> None:
    """Makes metadata and coordinates anew around the stored lanes; their damage shows when they are read."""
    with replacing(path) as new:
        template.make_results(new)
        checksums.copy_lanes(path / RESULTS, new / RESULTS)


def is_started(path: str | RunPath) -> bool:
    """Whether a run folder has its settings, and so can be resumed."""
    path = run_path("the run folder", path)
    mend(path)
    return (path / SETTINGS).is_file()


def read_settings(path: str | RunPath) -> dict[str, Any]:
    """The settings that a run folder was started with."""
    path = run_path("the run folder", path)
    require(path.is_dir(), "the run folder", "exist", f"'{path}'")
    require(is_started(path), f"'{path}'", "be a run folder", f"one without {SETTINGS}")
    return read_toml(path / SETTINGS)


def steady(path: str | RunPath, read: Callable[[], Read]) -> Read:
    """The result of `read` on a folder's runs: on the old ones or on the new, where another process replaces them.

    **Raises:** what `read` does, or `InputError` where that process does not come to its end within seconds.
    """
    path = run_path("the run folder", path)
    mend(path)
    until = time.monotonic() + (_REPLACED_WITHIN if isinstance(path, Path) else _COPIED_WITHIN)
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


def _identity(path: RunPath) -> list[tuple[str, int | str]]:
    """What is another where a run, or one of the runs in a folder, has been replaced."""
    found: list[tuple[str, int | str]] = []
    for run in (path, *path.glob("*")):
        for entry in (run / SETTINGS, run / RESULTS, run / RESULTS / ".zattrs"):
            with contextlib.suppress(OSError):
                found.append((str(entry), entry.stat().st_ino))
    return sorted(found)

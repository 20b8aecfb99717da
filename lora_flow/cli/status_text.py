"""What `lora-flow status` says: the progress of a folder's runs. It may be asked while a run is at work.

The command writes nothing of its own. Like every reader it puts back entries that a killed process left half replaced.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from lora_flow_vision.folder import CHECK

from lora_flow.advice.folder import ADVICE
from lora_flow.checks import require
from lora_flow.design.fit_folder import FIT
from lora_flow.design.folder import SEARCH
from lora_flow.experiments.folder import STUDY, study_of
from lora_flow.runtime.progress import span
from lora_flow.sensitivities.folder import SENSITIVITY
from lora_flow.storage import checksums
from lora_flow.storage.folder import RESULTS, SETTINGS, Kind, read_settings, steady
from lora_flow.storage.lanes import NOT_RUN, Boxes, waiting
from lora_flow.storage.locks import holder
from lora_flow.storage.reading import Damaged, listed, read
from lora_flow.storage.remote import RunPath, run_path
from lora_flow.storage.swap import LOCK, is_generated
from lora_flow.sweeps.folder import SWEEP, figure_of

_LATELY = 20  # boxes, from which the pace is told


def status(path: str | RunPath) -> str:
    """The progress of a run folder, a figure's or an image check's, the time of its last write, and how to continue.

    Where a process is at work, also its pace and the time left.

    **Raises:** `InputError` where the folder is none of these.
    """
    found = run_path("the run folder", path)
    return steady(found, lambda: _status(found))


def _status(path: RunPath) -> str:
    runs = sorted(settings.parent for settings in path.glob(f"*/{SETTINGS}"))
    parts = [path] if (path / SETTINGS).is_file() or not runs else runs
    told, open_parts = [], []
    for part in parts:
        line, unfinished = _part(part)
        told.append(line)
        open_parts += [part] if unfinished else []
    for name in _missing(path, parts):
        told.append(f"{path / name}: nothing stored yet")
        open_parts.append(path / name)
    held = {part: who for part in dict.fromkeys([path, *parts]) if (who := holder(part))}
    return "\n".join([*told, _written(parts), *_held(held), _next(path, parts, open_parts, bool(held))])


def _part(path: RunPath) -> tuple[str, bool]:
    """One line on a run, and whether there is something left to do."""
    read_settings(path)
    kind = _kind(path)
    try:
        reading = read(path / RESULTS) if (path / RESULTS).is_dir() else None
    except Damaged as damage:
        return f"{path}: damaged or missing {listed(damage.files)}", True
    if kind in (STUDY, SENSITIVITY, FIT, ADVICE):
        what = f"figure {study_of(path)}" if kind is STUDY else f"a {kind.noun}"
        state = "not finished; it runs as a whole" if reading is None else "finished"
        return f"{path}: {what}, {state}", reading is None
    if reading is None:
        return f"{path}: nothing stored yet", True
    lanes = reading.dataset["status"]
    boxes, wait = checksums.boxes_of(path / RESULTS), waiting(lanes)
    line = _counts(path, lanes, boxes, kind) + _pace(path, wait, boxes)
    lost = f"; damaged or missing {listed(reading.damaged)}" if reading.damaged else ""
    return line + lost, bool(wait.any())


def _counts(path: RunPath, lanes: xr.DataArray, boxes: Boxes, kind: Kind) -> str:
    """One line on the lanes; a box is done when all of its lanes are."""
    wait = waiting(lanes)
    meanings = zip(lanes.attrs["flag_values"], lanes.attrs["flag_meanings"].split(), strict=True)
    counts = {meaning: int((lanes.values == code).sum()) for code, meaning in meanings if code != NOT_RUN}
    together = f" ({boxes.count - len(boxes.where(wait))} of {boxes.count} {kind.boxes})"
    ended = ", ".join(f"{count} {meaning}" for meaning, count in counts.items() if count) or "none"
    return f"{path}: {np.sum(~wait)} of {lanes.size} lanes done{together}; ended: {ended}"


def _pace(path: RunPath, wait: np.ndarray, boxes: Boxes) -> str:
    """The pace at which those who are at work have stored their last boxes, and the time left; "" if nothing tells."""
    began = _changed(path / LOCK)  # not known of a lease
    if not wait.any() or not began or not holder(path):
        return ""
    ended = set(range(boxes.count)) - set(boxes.where(wait))
    files = {number: checksums.chunk(wait, boxes.place(number)) for number in ended}
    stored = [(_changed(path / RESULTS / "status" / name), boxes.size(number)) for number, name in files.items()]
    stored = sorted(one for one in stored if one[0] > began)[-_LATELY:]
    if len(stored) < 2 or stored[0][0] == stored[-1][0]:
        return ""
    rate = sum(lanes for _, lanes in stored[1:]) / (stored[-1][0] - stored[0][0])
    return f"; {rate:.3g} lanes/s, {span(wait.sum() / rate)} left"


def _written(parts: Sequence[RunPath]) -> str:
    files = [file for part in parts for file in part.rglob("*") if file.is_file() and not is_generated(file.name)]
    latest = max((_changed(file) for file in files), default=0.0)
    when = datetime.datetime.fromtimestamp(latest).strftime("%Y-%m-%d %H:%M:%S")
    return f"last written {span(max(0.0, time.time() - latest))} ago ({when})"


def _changed(file: RunPath) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # replaced meanwhile
        return 0.0


def _held(held: Mapping[RunPath, str]) -> list[str]:
    return [f"{who} is at work in {part}" for part, who in held.items()] or ["no process is at work in it"]


def _next(path: RunPath, parts: Sequence[RunPath], unfinished: Sequence[RunPath], at_work: bool) -> str:
    if not unfinished:
        return f"finished; draw it again with: lora-flow plot {path}"
    if at_work:
        return "not finished; draw the stored part with: lora-flow plot " + str(path)
    return f"not finished; continue with: {_command(path, parts)}"


def _figure(parts: Sequence[RunPath]) -> str:
    """The name of the figure that the runs were made for, "" for a plain run."""
    stored = [part for part in parts if (part / RESULTS).is_dir() and _kind(part) is SWEEP]
    return figure_of(stored[0]) if stored else ""


def _missing(path: RunPath, parts: Sequence[RunPath]) -> list[str]:
    """The missing runs of a figure that is made of several."""
    name = "" if parts[0] == path else _figure(parts)
    if not name:
        return []
    from lora_flow.experiments.table import EXPERIMENTS

    names = EXPERIMENTS[name].parts if name in EXPERIMENTS else ()
    return [run for run in names if path / run not in parts]


def _command(path: RunPath, parts: Sequence[RunPath]) -> str:
    if name := study_of(parts[0]):
        return f"lora-flow figure {name} --out {path} --overwrite"
    if name := _figure(parts):
        return f"lora-flow figure {name} --out {path} --resume"
    if (kind := _kind(parts[0])) in (SENSITIVITY, FIT, ADVICE):
        return f"lora-flow {kind.noun} --out {path} --overwrite, with the flags that {path / SETTINGS} has"
    require(list(parts) == [path], f"'{path}'", "be a run folder or hold the runs of one figure", f"{len(parts)} runs")
    go_on = _kind(path).go_on
    assert go_on is not None  # as it is of studies alone
    return go_on(path)


def _kind(path: RunPath) -> Kind:
    return next((kind for kind in (STUDY, CHECK, SENSITIVITY, SEARCH, FIT, ADVICE) if kind.owns(path)), SWEEP)

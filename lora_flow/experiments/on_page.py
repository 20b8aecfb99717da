"""The page of a folder's results: its report, its runs to explore, and the command that makes them again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from lora_flow.pages.data import of_run
from lora_flow.pages.page import page
from lora_flow.pages.thinned import thinned
from lora_flow.results.answers import Cell
from lora_flow.results.clock import over_time
from lora_flow.settings import command_of
from lora_flow.storage.folder import SETTINGS, is_started, read_settings
from lora_flow.storage.remote import RunPath
from lora_flow.sweeps.folder import FIGURE
from lora_flow.sweeps.from_python import is_from_python


def written(
    out: RunPath,
    title: str,
    text: str,
    runs: Mapping[str, xr.Dataset],
    found: Mapping[str, Sequence[Cell]],
    short: Mapping[str, Sequence[str]],
) -> str:
    """The page of a folder: under a `title`, or that of the report, whose Markdown is `text`.

    The `runs` have their answers in `found`, and in `short` the lines on what is asked first.
    """
    body = text.partition("\n")[2]
    for ones in short.values():  # which stand at the top of the page
        body = body.replace("\n".join(f"- {line}" for line in ones), "")
    heading = title or text.partition("\n")[0].removeprefix("# ")
    shown = [explored(run or "run", one, found[run]) for run, one in runs.items()]
    lines = [f"{run}: {line}" if run else line for run, ones in short.items() for line in ones]
    attrs = next((one.attrs for one in runs.values()), read_settings(out) if is_started(out) else {})
    told = {str(name): value.tolist() if isinstance(value, np.ndarray) else value for name, value in attrs.items()}
    command = repeated(out, told)
    return page(f"# {heading}\n{body}", out, runs=shown, short=lines, settings=told, command=command)


def explored(name: str, dataset: xr.Dataset, found: Sequence[Cell]) -> dict[str, Any]:
    """A run as the page's program reads it, thinned where it is large."""
    dataset = over_time(dataset)
    few, left_out = thinned(dataset)
    cells = _kept(dataset, few)
    shape = [dataset.sizes[dim] for dim in cells]
    places = np.arange(np.prod(shape, dtype=int)).reshape(shape)[np.ix_(*cells.values())].ravel()
    return {"name": name} | of_run(few, [found[i] for i in places], left_out, dataset.isel(cells))


def repeated(out: RunPath, settings: Mapping[str, Any]) -> str:
    """The command that makes what a folder holds again, or how Python does."""
    place = shlex.quote(str(out))
    if name := settings.get(FIGURE) or settings.get("study"):
        return f"lora-flow figure {name} --seeds {settings['seeds']} --out {place}"
    table = read_settings(out) if (out / SETTINGS).is_file() else {}
    if is_from_python(table):
        return f"lora_flow.sweep(problem, ..., out={str(out)!r})  # in Python, with the settings below"
    return command_of(table, str(out))


def _kept(whole: xr.Dataset, few: xr.Dataset) -> dict[str, np.ndarray]:
    """The places along every axis of the cells that were kept, among all."""
    axes = [str(dim) for dim in whole["status"].dims if dim != "seed"]
    return {dim: np.flatnonzero(np.isin(whole[dim].values, few[dim].values)) for dim in axes}

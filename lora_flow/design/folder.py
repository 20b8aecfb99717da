"""The folder of a search: its settings, its blocks of steps, the winner, its picture and its report. Imports no JAX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from lora_flow.checks import require
from lora_flow.storage.folder import SETTINGS, Folder, Kind, Template, read_settings, steady
from lora_flow.storage.lanes import NOT_RUN
from lora_flow.storage.made import found, pictures
from lora_flow.storage.remote import RunPath
from lora_flow.storage.resumable import check_same

if TYPE_CHECKING:
    from lora_flow.design.optimise import Optimised, Search

OPTIMISE = "optimise"  # the table of the settings
MADE = ("report.md", "learned.safetensors", *pictures("optimise*"), "figures/optimise*.json")


def _go_on(path: Any) -> str:
    return f"lora-flow optimise --out {path} --resume"


def _unchanged(path: Any, template: Template, notes: Any, attrs: Any) -> None:
    if notes is not None:
        check_same(path, notes, template.settings[OPTIMISE], template.settings[OPTIMISE])
    if attrs is not None:
        ours, must = attrs.get("problem_digest"), f"be the one that '{path}' was started with, to resume it"
        require(ours == template.dataset.attrs["problem_digest"], "problem", must, "other weights or another shift")


SEARCH = Kind(
    "search",
    "a search's",
    is_mine=lambda settings: OPTIMISE in settings,
    made=lambda path: found(path, *MADE),
    go_on=_go_on,
    boxes="blocks of steps",
    unchanged=_unchanged,
)


def template_of(settings: Mapping[str, Any], search: Search) -> Template:
    """The folder before any step: a box for each block of steps."""
    return Template({OPTIMISE: dict(settings)}, search.outline(), (1,), dict(settings))


def settings_of(path: Any) -> dict[str, Any]:
    """The settings that a folder was started with.

    **Raises:** `InputError` for another folder.
    """
    table = read_settings(path)
    must = "be a search's, whose settings it goes on with"
    require(SEARCH.is_mine(table), f"'{path / SETTINGS}'", must, "another folder's")
    return dict(table[OPTIMISE])


def solve(folder: Folder, search: Search, progress: bool = True) -> None:
    """Makes the steps that are not stored yet, from the first block that lacks on, and stores each block at once."""
    pending = folder.pending()
    if not pending:
        return
    first = pending[0]
    for number in range(first, search.blocks):  # those behind follow from it
        folder.correct(number, np.full(1, NOT_RUN, np.int8))
    state = stored(folder.path)["state"].values[first - 1] if first else None
    for number, values in search.solve(first, state, progress):
        folder.write(number, {name: one[None] for name, one in values.items()})


def stored(path: RunPath) -> xr.Dataset:
    """The blocks of a folder, finished or not, every number checked."""
    return steady(path, lambda: SEARCH.load(path, partial=True))


def finish(path: Path, search: Search) -> Optimised:
    """The result of a folder whose steps are all made; the winner is stored beside them."""
    learned = search.learned(SEARCH.load(path))
    learned.start.save(path)
    return learned

"""What an image check's folder holds, and what tells it from other folders. Imports no JAX.

settings.toml, results.zarr   as in every run folder, with the same guarantees: see `lora_flow.storage.folder`
adapters/*.safetensors   the final adapters of each unit
checkpoints/*   of units in training
figures/*, report.md, report.html
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from lora_flow.checks import InputError, require
from lora_flow.storage.folder import SETTINGS, Kind, Template, read_settings
from lora_flow.storage.made import found, pictures
from lora_flow.storage.remote import RunPath
from lora_flow.storage.resumable import check_same
from lora_flow_vision.settings import HEAD, VisionSettings, from_table

ADAPTERS, CHECKPOINTS = "adapters", "checkpoints"
DRAWN = ("figure[567]", "figure[67]-r*", "starts")  # of pictures that a check draws
NOTE = "attrs"  # the note of what a run was started with


class Unit(NamedTuple):
    """The lanes that one call trains: all alphas (and for the head alone all seeds) of one method, start and rank."""

    optimizer: str
    init: str
    rank: int
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        of = "all" if len(self.seeds) > 1 else self.seeds[0]
        init = self.init.replace("/", "-").replace(":", "-")  # of learned:FOLDER
        return f"{self.optimizer}-{init}-rank{self.rank}-seed-{of}"

    @property
    def file(self) -> str:
        """The file of the unit's adapters, below the folder."""
        return f"{ADAPTERS}/{self.name}.safetensors"


def units(settings: VisionSettings) -> list[Unit]:
    """The units in the order in which they run."""
    every = tuple(range(settings.seeds))
    groups = [every] if settings.layers == HEAD else [(seed,) for seed in every]
    return [Unit(*each) for each in itertools.product(settings.optimizer, settings.init, settings.rank, groups)]


def stored_settings(path: RunPath) -> VisionSettings:
    """The settings that a run was started with.

    **Raises:** `InputError` where the folder does not exist or holds no image check.
    """
    table = read_settings(path)
    require(CHECK.is_mine(table), f"'{path}'", "be the folder of an image check", "one of another run")
    try:
        return from_table(table["vision"])
    except TypeError as error:
        raise InputError(f"'{path / SETTINGS}' must be of this version, got {error}") from error


def _made(path: RunPath) -> list[str]:
    """The names, below the folder, that the run at `path` has made beside its settings and results."""
    if not (path / SETTINGS).is_file():
        return []
    every = units(stored_settings(path))
    made = [name for unit in every for name in (unit.file, f"{CHECKPOINTS}/{unit.name}")]
    drawn = found(path, *pictures(*DRAWN))
    return [name for name in (*made, *drawn, "report.md", "report.html") if (path / name).exists()]


def _check_unchanged(path: RunPath, template: Template, notes: Any, attrs: Any) -> None:
    """The attributes that a run was started with: its settings, and what data and weights they stood for."""
    now = template.dataset.attrs
    for then in (None if notes is None else notes.get(NOTE, {}), attrs):
        if then is not None:
            check_same(path, then, now, now)


CHECK = Kind(
    noun="check",
    folder="one of an image check",
    is_mine=lambda settings: "vision" in settings,
    made=_made,
    go_on=lambda path: f"lora-flow vision --out {path} --resume",
    boxes="units",
    unchanged=_check_unchanged,
)

"""The folder of an observed PEFT run: what was asked for, the observables, the picture and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from lora_flow.storage.folder import Kind, Template, steady
from lora_flow.storage.made import found, pictures
from lora_flow.storage.remote import RunPath, run_path

MADE = ("report.md", "report.html", *pictures("observed"), "figures/observed.json")
OBSERVED = Kind(
    "observation",
    "an observation's",
    is_mine=lambda settings: "observe" in settings,
    made=lambda path: found(path, *MADE),
)


def store(path: str | RunPath, settings: Mapping[str, Any], dataset: xr.Dataset) -> None:
    """Replaces the folder's observables and settings once the new ones are whole. Hold the folder's lock."""
    OBSERVED.make(run_path("out", path), {"": Template({"observe": dict(settings)}, dataset)})


def load(path: str | RunPath) -> xr.Dataset:
    """The observables of a folder, every number checked."""
    folder = run_path("the run folder", path)
    return steady(folder, lambda: OBSERVED.load(folder))

"""The folder of a sensitivity: its settings, its results, its picture and its report. Imports no JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from lora_flow.storage.folder import Kind, Template, steady
from lora_flow.storage.made import found, pictures
from lora_flow.storage.remote import RunPath, run_path

MADE = ("report.md", "report.html", *pictures("sensitivity*"))


SENSITIVITY = Kind(
    "sensitivity",
    "a sensitivity's",
    is_mine=lambda settings: "sensitivity" in settings,
    made=lambda path: found(path, *MADE),
)


def store(path: str | RunPath, settings: Mapping[str, Any], dataset: xr.Dataset) -> None:
    """Replaces the folder's results and settings once the new ones are whole. Hold the folder's lock."""
    SENSITIVITY.make(run_path("out", path), {"": Template({"sensitivity": dict(settings)}, dataset)})


def load(path: str | RunPath) -> xr.Dataset:
    """The results of a folder, every number checked."""
    found = run_path("the run folder", path)
    return steady(found, lambda: SENSITIVITY.load(found))

"""The folder of a fit: its settings, its results, its picture and its report. Imports no JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from lora_flow.storage.folder import Kind, Template, steady
from lora_flow.storage.made import found, pictures
from lora_flow.storage.remote import RunPath, run_path

MADE = ("report.md", *pictures("fit"), "figures/fit.json")


FIT = Kind("fit", "a fit's", is_mine=lambda settings: "fit" in settings, made=lambda path: found(path, *MADE))


def store(path: str | RunPath, settings: Mapping[str, Any], dataset: xr.Dataset) -> None:
    """Replaces the folder's results and settings once the new ones are whole. Hold the folder's lock."""
    FIT.make(run_path("out", path), {"": Template({"fit": dict(settings)}, dataset)})


def load(path: str | RunPath) -> xr.Dataset:
    """The results of a folder, every number checked."""
    found = run_path("the run folder", path)
    return steady(found, lambda: FIT.load(found))

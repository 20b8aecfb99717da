"""The folder of an experiment that runs as a whole, a "study" on disk: its name, its number of draws, its results."""

from __future__ import annotations

import tomli_w
import xarray as xr

from lora_flow.storage.folder import SETTINGS, Kind, Template, is_started, read_settings, steady
from lora_flow.storage.remote import RunPath, run_path
from lora_flow.storage.swap import write_atomically
from lora_flow.sweeps.folder import drawn

STUDY = Kind("figure", "a figure's", is_mine=lambda settings: "study" in settings, made=drawn)


def study_of(path: str | RunPath) -> str:
    """The name of the study that a folder holds, "" for anything else."""
    settings = read_settings(path) if is_started(path) else {}
    return str(settings["study"]) if STUDY.is_mine(settings) else ""


def begin_study(path: str | RunPath, name: str, seeds: int) -> None:
    """Says what the folder is for, or finds out that it cannot be written, before anything is computed."""
    settings = run_path("out", path) / SETTINGS
    if not settings.exists():
        write_atomically(settings, tomli_w.dumps({"study": name, "seeds": seeds}))


def store_study(path: str | RunPath, name: str, seeds: int, dataset: xr.Dataset) -> None:
    """Replaces the folder's results and settings once the new ones are whole. Hold the folder's lock."""
    STUDY.make(run_path("out", path), {"": Template({"study": name, "seeds": seeds}, dataset)})


def load_study(path: str | RunPath) -> xr.Dataset:
    """The results of a study's folder, every number checked."""
    found = run_path("the run folder", path)
    return steady(found, lambda: STUDY.load(found))

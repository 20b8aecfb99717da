"""The folder of an experiment that runs as a whole, a "study" on disk: its name, its number of draws, its results."""

from __future__ import annotations

from pathlib import Path

import tomli_w
import xarray as xr

from lora_flow.storage.folder import SETTINGS, Kind, Template, is_started, read_settings, steady
from lora_flow.storage.swap import write_atomically
from lora_flow.sweeps.run import drawn

STUDY = Kind("figure", "a figure's", is_mine=lambda settings: "study" in settings, made=drawn)


def study_of(path: str | Path) -> str:
    """The name of the study that a folder holds, "" for anything else."""
    settings = read_settings(path) if is_started(path) else {}
    return str(settings["study"]) if STUDY.is_mine(settings) else ""


def begin_study(path: str | Path, name: str, seeds: int) -> None:
    """Says what the folder is for, or finds out that it cannot be written, before anything is computed."""
    if not (Path(path) / SETTINGS).exists():
        write_atomically(Path(path) / SETTINGS, tomli_w.dumps({"study": name, "seeds": seeds}))


def store_study(path: str | Path, name: str, seeds: int, dataset: xr.Dataset) -> None:
    """Replaces the folder's results and settings once the new ones are whole. Hold the folder's lock."""
    STUDY.make(Path(path), {"": Template({"study": name, "seeds": seeds}, dataset)})


def load_study(path: str | Path) -> xr.Dataset:
    """The results of a study's folder, every number checked."""
    return steady(path, lambda: STUDY.load(Path(path)))

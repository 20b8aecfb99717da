"""The folder of an experiment that runs as a whole, a "study" on disk: its name, its number of draws, its results."""

from __future__ import annotations

from pathlib import Path

import tomli_w
import xarray as xr

from lora_flow.checks import InputError, require
from lora_flow.storage import checksums
from lora_flow.storage.folder import mend, replacing, write_atomically
from lora_flow.storage.toml import read_toml
from lora_flow.sweeps.run import RESULTS, SETTINGS, drawn, is_vacant, steady


def study_of(path: str | Path) -> str:
    """The name of the study that a folder holds, "" for anything else."""
    mend(path)
    settings = Path(path) / SETTINGS
    return str(read_toml(settings).get("study", "")) if settings.is_file() else ""


def check_study_folder(path: str | Path, overwrite: bool) -> None:
    """Raises unless a study may be stored at `path`."""
    path = Path(path)
    if not path.exists() or (path.is_dir() and is_vacant(path)):
        return
    require(path.is_dir(), "out", "be a folder", f"the file '{path}'")
    require(study_of(path), "out", "be a new folder or a figure's", f"'{path}', which holds something else")
    require(overwrite, "out", "be new (--overwrite replaces it)", f"the figure '{path}'")


def begin_study(path: str | Path, name: str, seeds: int) -> None:
    """Says what the folder is for, or finds out that it cannot be written, before anything is computed."""
    if not (Path(path) / SETTINGS).exists():
        write_atomically(Path(path) / SETTINGS, _settings(name, seeds))


def store_study(path: str | Path, name: str, seeds: int, dataset: xr.Dataset) -> None:
    """Replaces the folder's results and settings once the new ones are whole. Hold the folder's lock."""
    with replacing(Path(path), drawn(Path(path))) as new:
        checksums.create(new / RESULTS, dataset)
        write_atomically(new / SETTINGS, _settings(name, seeds))


def load_study(path: str | Path) -> xr.Dataset:
    """The results of a study's folder, every number checked."""
    return steady(path, lambda: _load_study(Path(path)))


def _load_study(path: Path) -> xr.Dataset:
    mend(path)
    results, again = path / RESULTS, "--overwrite runs it again"
    require(results.is_dir(), f"'{path}'", f"hold {RESULTS}", f"a figure that was not finished; {again}")
    try:
        return checksums.read(results).dataset
    except InputError as error:
        raise InputError(f"{error}; {again}") from error


def _settings(name: str, seeds: int) -> str:
    return tomli_w.dumps({"study": name, "seeds": seeds})

"""The run folder of a study: its name, its results, its picture."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import tomli_w
import xarray as xr

from lora_flow.checks import require
from lora_flow.store import RESULTS, SETTINGS, remove_drawn, write_atomically
from lora_flow.toml import read_toml


def study_of(path: str | Path) -> str:
    """The name of the study that a folder holds, "" for anything else."""
    settings = Path(path) / SETTINGS
    return str(read_toml(settings).get("study", "")) if settings.is_file() else ""


def check_study_folder(path: str | Path, overwrite: bool) -> None:
    """Raises unless a study may be stored at `path`."""
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    require(path.is_dir(), "out", "be a folder", f"the file '{path}'")
    require(study_of(path), "out", "be a new folder or a figure's", f"'{path}', which holds something else")
    require(overwrite, "out", "be new (--overwrite replaces it)", f"the figure '{path}'")


def begin_study(path: str | Path, name: str, seeds: int) -> None:
    """Makes the folder, or finds out that it cannot be made, before anything is computed."""
    Path(path).mkdir(parents=True, exist_ok=True)
    if not (Path(path) / SETTINGS).exists():
        write_atomically(Path(path) / SETTINGS, tomli_w.dumps({"study": name, "seeds": seeds}))


def store_study(path: str | Path, name: str, seeds: int, dataset: xr.Dataset) -> None:
    """Writes results and settings; what is there goes only once the new results are whole beside it."""
    path = Path(path)
    partial = path / f"{RESULTS}.{uuid.uuid4().hex}.partial"
    try:
        dataset.to_zarr(partial, zarr_format=2, consolidated=True)
        write_atomically(path / SETTINGS, tomli_w.dumps({"study": name, "seeds": seeds}))
        shutil.rmtree(path / RESULTS, ignore_errors=True)
        partial.replace(path / RESULTS)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    remove_drawn(path)


def load_study(path: str | Path) -> xr.Dataset:
    """The results of a study's folder."""
    results = Path(path) / RESULTS
    require(
        results.is_dir(), f"'{path}'", f"hold {RESULTS}", "a figure that was not finished; --overwrite runs it again"
    )
    return xr.open_zarr(results, consolidated=True).load()

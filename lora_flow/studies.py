"""Named figures that are not sweeps of the flow: experiments with gradient descent, each one dataset."""

from __future__ import annotations

import dataclasses
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
import xarray as xr

from lora_flow import scaling, toys
from lora_flow.checks import require
from lora_flow.store import RESULTS, SETTINGS, read_toml, remove_drawn, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Study:
    """An experiment that runs as a whole, within about a minute, for a number of draws."""

    about: str
    seeds: int
    run: Callable[[int, Callable[[Any], Any]], xr.Dataset]
    draw: Callable[[xr.Dataset], Figure]
    notes: Callable[[xr.Dataset], str]


STUDIES = {
    "lora-one": Study(
        "alignment of A with the gradient and risk, for several alpha",
        10,
        toys.alignment,
        toys.draw_alignment,
        toys.alignment_notes,
    ),
    "preconditioner": Study(
        "risk with and without the preconditioner, LoRA-One's start and LoRA-GA's",
        5,
        toys.preconditioning,
        toys.draw_preconditioning,
        toys.preconditioning_notes,
    ),
    "scaling": Study(
        "the best lora_alpha against the rank, gradient descent and Adam",
        5,
        scaling.scaling,
        scaling.draw,
        scaling.notes,
    ),
}


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

"""What a search leaves behind, over its steps."""

from __future__ import annotations

import numpy as np
import xarray as xr

from lora_flow.results.report import table
from lora_flow.sweeps.schema import explain

BLOCK = 10  # steps that are stored together

_ABOUT = {
    "objective": "objective: log10 of a loss, or a time; NaN or infinite where a run does not come to it",
    "slope": "norm of the objective's derivative by the free numbers",
    "angle": "angle between the factor's leading singular vectors and the gradient's: principal angles in degrees",
    "share": "share of the start's squared norm",
    "restart": "number of the random start",
    "step": "number of steps made before",
    "layer": "layer, from 1",
    "factor": "factor of the adapter",
    "pair": "number of the principal angle, the smallest first",
}


def steps_of(blocks: xr.Dataset) -> xr.Dataset:
    """A search's stored blocks as a dataset over `restart` and `step`, without what is there to go on from."""
    dataset = blocks.drop_vars(["state", "status"]).stack(step=("block", "within"))
    dataset = dataset.drop_vars(["step", "block", "within"], errors="ignore").isel(step=slice(blocks.attrs["steps"]))
    dataset = dataset.transpose("restart", "step", ...)
    numbered = {dim: np.arange(dataset.sizes[dim]) for dim in ("restart", "step")}
    dataset = dataset.assign_coords(numbered).assign_coords(pair=np.arange(1, dataset.sizes["pair"] + 1))
    for name, about in _ABOUT.items():
        explain(dataset[name], about)
    return dataset


def report(dataset: xr.Dataset, links: list[str]) -> str:
    """The text of report.md: the objective at first and at best, the angles and shares there, and the pictures."""
    found, name = dataset["objective"], dataset.attrs["objective"]
    known = found.where(np.isfinite(found))
    winner = known.min("step").fillna(np.inf).argmin("restart")
    best = dataset.isel(restart=winner)
    at = best["objective"].where(np.isfinite(best["objective"])).fillna(np.inf).argmin("step")
    rows = []
    for layer in dataset["layer"].values:
        for factor in dataset["factor"].values:
            angles, share = (
                best[variable].isel(step=at).sel(layer=layer, factor=factor) for variable in ("angle", "share")
            )
            told = ", ".join(f"{angle:.1f}" for angle in angles.values if np.isfinite(angle))
            rows.append([f"{factor}_{layer}", told or "-", f"{float(share):.3f}"])
    first, last = known.isel(step=0), known.min("step")
    about = (
        f"{name} at t = {dataset.attrs['at']:g}: {float(first.mean()):.4g} from random starts (mean of {first.size}), "
        f"{float(last.mean()):.4g} after {dataset.sizes['step']} steps, and {float(last.min()):.4g} at best. All "
        "starts have one norm. Angles are principal angles in degrees, between the leading singular vectors of the "
        "best start's factors and those of the gradient; shares are of its squared norm."
    )
    parts = ["# A learned start", str(dataset.attrs["problem"]), about, table(["factor", "angles", "share"], rows)]
    return "\n\n".join([*parts, *(f"![]({link})" for link in links)]) + "\n"

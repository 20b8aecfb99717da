"""Losses for people: in decades, over seeds, and not below their rounding floor."""

from __future__ import annotations

import numpy as np
import xarray as xr

Values = xr.DataArray | np.ndarray | float  # over seeds, or of one
AT_ROUNDING = "at rounding"


def clipped(loss: xr.DataArray, floor: xr.DataArray) -> xr.DataArray:
    """The loss, with the floor in place of what is below it; NaN, the mark of a lane that failed, stays NaN."""
    return xr.where(loss < floor, floor, loss).transpose(*loss.dims)


def initial_losses(dataset: xr.Dataset) -> xr.DataArray:
    """The losses at t = 0; of older results the first that they hold, if that is at t = 0, and NaN otherwise."""
    if "initial_loss" in dataset:
        return dataset["initial_loss"]
    first = dataset["loss"].isel(time=0)
    return first.where(first["time"] == 0).drop_vars("time")


def told(loss: Values, floor: Values, digits: int = 2) -> str:
    """log10 of losses over seeds for a table: mean and standard deviation of those above the floor.

    "-12.49 ± 0.33"; "at rounding" where all are below; "-26.20 ± 0.31, 3 of 30 at rounding" where some are. Lanes that
    failed, NaN, are left out; "-" where all did.
    """
    losses = np.ravel(np.asarray(loss, float))
    lowest = np.ravel(np.broadcast_to(np.asarray(floor, float), np.shape(loss)))
    lowest, losses = lowest[~np.isnan(losses)], losses[~np.isnan(losses)]
    resolved = losses[losses >= lowest]
    below = losses.size - resolved.size
    if not resolved.size:
        return AT_ROUNDING if below else "-"
    text = spread(np.log10(np.maximum(resolved, np.finfo(float).tiny)), digits)
    return f"{text}, {below} of {losses.size} {AT_ROUNDING}" if below else text


def spread(values: Values, digits: int = 2) -> str:
    """Mean and one standard deviation over seeds, lanes that failed left out; of one seed the value."""
    known = np.ravel(np.asarray(values, float))
    known = known[~np.isnan(known)]
    if known.size == 0:
        return "-"
    if known.size == 1:
        return f"{known[0]:.{digits}f}"
    return f"{known.mean():.{digits}f} ± {known.std():.{digits}f}"

"""The lanes of a dataset: its entries over the dims of `status`, which says how each ended, numbered in C order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

NOT_RUN = -1  # the status of a lane that has not run, and what its counts read as


def waiting(status: xr.DataArray) -> np.ndarray:
    """Where lanes have not run: where `status` has none of its `flag_values`, NOT_RUN left aside."""
    ran = np.setdiff1d(status.attrs.get("flag_values", status.values), [NOT_RUN])
    return ~np.isin(status.values, ran)


def put_lanes(dataset: xr.Dataset, lanes: np.ndarray, values: Mapping[str, Any]) -> None:
    """Writes values, `(lane, ...)`, into the places of the lanes with these numbers."""
    index = np.unravel_index(lanes, dataset["status"].shape)
    for name, array in values.items():
        dataset[name].values[index] = array


def lane_chunks(lanes: np.ndarray, shape: tuple[int, ...], chunks: tuple[int, ...]) -> np.ndarray:
    """The places in the grid of chunks that hold lanes of these numbers, `(chunk, dims of lanes)`, each once."""
    size = np.array(chunks[: len(shape)])
    return np.unique(np.stack(np.unravel_index(lanes, shape), axis=-1) // size, axis=0)

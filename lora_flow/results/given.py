"""The check of what is given to be read or drawn."""

from __future__ import annotations

from typing import Any

import xarray as xr

from lora_flow.checks import kind, require


def require_dataset(dataset: Any, what: str, *names: str) -> None:
    """Raises unless the argument is a sweep's dataset with these variables, which `what` is read off or drawn from."""
    got = kind(dataset)
    if hasattr(dataset, "observables") and hasattr(dataset, "times"):
        got += ", whose curves are trajectory.observables over trajectory.times"
    require(isinstance(dataset, xr.Dataset), "dataset", "be an xarray.Dataset, as sweep returns it", got)
    missing = [name for name in names if name not in dataset.variables]
    held = ", ".join(sorted(map(str, dataset.data_vars)))
    require(not missing, "dataset", f"have {', '.join(missing)}, for {what}", f"one with {held or 'no variables'}")

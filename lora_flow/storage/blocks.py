"""Computations on results that may be larger than memory: block by block, each read when its turn comes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import xarray as xr
import zarr

AT_ONCE = 2**24  # bytes of a block, of which a computation makes a copy or two
THREADS = 2  # that read chunks at once: the memory that each of them took it keeps


def blockwise(
    function: Callable[[xr.Dataset], xr.Dataset], dataset: xr.Dataset, whole: Collection[str] = ("time",)
) -> xr.Dataset:
    """The function of a dataset, computed block by block, so that no more than a block is read at once.

    No block cuts the dims `whole`. The function takes what lies along the others entry by entry, and drops such a dim
    or keeps it as it is; then its result for a block is that block of its result. All variables of the dataset are
    read: give it those that the function needs.
    """
    places = list(blocks(dataset, whole))
    if len(places) < 2:
        return function(_read(dataset))
    results = (function(_read(dataset.isel(place))) for place in places)
    first = next(results)
    given = {name for name, one in dataset.coords.items() if name in first and one.dims == first[name].dims}
    made = {name: _room(first[name], dataset, places[0]) for name in first.variables.keys() - given}
    for place, found in zip(places, itertools.chain([first], results), strict=True):
        for name, room in made.items():
            room.values[tuple(place.get(dim, slice(None)) for dim in room.dims)] = found[name].values
    variables = {name: made.get(name, dataset.variables.get(name)) for name in first.variables}
    coords = {name: variables.pop(name) for name in first.coords}
    return xr.Dataset(variables, coords, first.attrs)


def blocks(dataset: xr.Dataset, whole: Collection[str]) -> Iterator[dict[Any, slice]]:
    """The places of blocks of neighbours, in C order, of at most AT_ONCE bytes where the dims `whole` allow it.

    A block ends where a stored chunk does, unless it is smaller than one, so that no chunk is read for two blocks.
    """
    variables, sizes = list(dataset.data_vars.values()), dataset.sizes
    most = max((one.dims for one in variables), key=len, default=())
    over = [dim for dim in dict.fromkeys((*most, *dataset.dims)) if dim not in whole]
    nbytes = sum(one.size * one.dtype.itemsize for one in variables)
    room = AT_ONCE * math.prod(sizes[dim] for dim in over) // max(1, nbytes)
    steps: dict[Any, int] = {}
    for dim in reversed(over):
        chunk = max(one.encoding.get("preferred_chunks", {}).get(dim, 1) for one in variables)
        steps[dim] = max(1, sizes[dim] if room >= sizes[dim] else room // chunk * chunk or room)
        room //= max(1, sizes[dim])
    parts = [[(dim, slice(i, i + steps[dim])) for i in range(0, sizes[dim], steps[dim])] for dim in over]
    return (dict(place) for place in itertools.product(*parts))


def _read(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset in memory; the given one stays as it is."""
    with zarr.config.set({"async.concurrency": THREADS}):
        return dataset.compute()


def _room(part: xr.DataArray, dataset: xr.Dataset, place: Mapping[Any, slice]) -> xr.Variable:
    """The room for a result of all blocks, as it is of one."""
    shape = [dataset.sizes[dim] if dim in place else size for dim, size in part.sizes.items()]
    return xr.Variable(part.dims, np.empty(shape, part.dtype), part.attrs)

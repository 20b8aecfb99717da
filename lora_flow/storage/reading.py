"""Stored datasets, read with every number checked, box by box; what is stored box by box is read when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
import zarr
from xarray.core import indexing

from lora_flow.checks import InputError
from lora_flow.storage.blocks import THREADS
from lora_flow.storage.checksums import (
    CHECKS,
    LANES,
    RUN_ID,
    attributes,
    chunk,
    damaged_files,
    description_sum,
    lane_sums,
    notes,
)
from lora_flow.storage.lanes import NOT_RUN, Boxes, waiting
from lora_flow.storage.remote import RunPath, is_of_store, zarr_store


class Damaged(InputError):
    """Metadata or coordinates of a group are damaged, so the group cannot be read."""

    def __init__(self, path: RunPath, files: Sequence[str]):
        super().__init__(f"'{path}' must be as it was written, got damaged or missing {listed(files)}")
        self.path, self.files = path, files


class Reading(NamedTuple):
    """A stored dataset, the names of its damaged parts, whose lanes have status NOT_RUN, and the notes.

    What is stored box by box is read when it is asked for, but for `status`; lanes that have not run read as missing.
    """

    dataset: xr.Dataset
    damaged: list[str]
    notes: dict[str, Any]


def read(path: RunPath, values: bool = True) -> Reading:
    """The contents of a group, with every number checked; a group without checks only has to be readable.

    Without `values` those that are stored box by box are not looked at, and only described.

    **Raises:** `Damaged` for metadata, coordinates and other final data; `InputError` where the path is no such group.
    """
    damaged = damaged_files(path)
    if damaged:
        raise Damaged(path, damaged)
    try:
        return _read(path, damaged is not None, values)
    except PermissionError:
        raise
    except Exception as error:  # whatever damaged files make the readers raise
        if is_of_store(error):
            raise
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"'{path}' must be readable by xarray.open_zarr, got {told}") from error


def lanes(path: RunPath, dataset: xr.Dataset, where: Mapping[str, Any]) -> xr.Dataset:
    """Some lanes of a group that was described by `read`, in memory: those at these places along the dims.

    Values of lanes that have not run are missing. Of each chunk its own checksum is looked at.

    **Raises:** `InputError` where another run has taken the place of the one that was described.
    """
    _check_in_place(path, dataset.attrs.get(RUN_ID))
    with zarr.config.set({"async.concurrency": THREADS}):
        part = dataset.isel(where).compute()
    _check_in_place(path, dataset.attrs.get(RUN_ID))
    waits = xr.DataArray(waiting(part["status"]), dims=part["status"].dims)
    over = set(waits.dims)
    held = {name: one.where(~waits) for name, one in part.items() if one.dtype.kind == "f" and over <= set(one.dims)}
    status = part["status"].where(~waits, NOT_RUN).astype(part["status"].dtype)
    return part.assign({**held, "status": status})


def listed(names: Sequence[str]) -> str:
    """A few names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read(path: RunPath, verify: bool, values: bool) -> Reading:
    dataset = xr.open_zarr(zarr_store(path), consolidated=True, mask_and_scale=False, chunks=None)
    group: Any = zarr.open_group(zarr_store(path), mode="r", zarr_format=2)
    sums = group[CHECKS].get(LANES) if verify else None
    if sums is None and (verify or not _had_lanes(dataset)):
        return Reading(_settled(dataset.load()), [], notes(path))
    live = sorted(map(str, dataset.data_vars))
    dataset = _settled(dataset.assign_coords(dataset[list(dataset.coords)].load().coords))
    if not values:
        return Reading(dataset, [], notes(path))
    status, damaged = _checked(path, {name: group[name] for name in live}, sums, description_sum(dataset))
    wait = ~np.isin(status, np.setdiff1d(dataset["status"].attrs["flag_values"], [NOT_RUN]))
    run_id = dataset.attrs.get(RUN_ID)
    lazy = {name: _Stored(path, group[name], run_id, wait) for name in live if name != "status"}
    held = {name: indexing.LazilyIndexedArray(array) for name, array in lazy.items()} | {"status": status}
    variables = {}
    for name in live:
        dims, attrs = dataset[name].dims, dataset[name].attrs
        chunks = dict(zip(dims, group[name].chunks, strict=True))
        variables[name] = xr.Variable(dims, held[name], attrs, {"preferred_chunks": chunks})
    return Reading(dataset.drop_vars(live).assign(variables)[list(dataset.data_vars)], damaged, notes(path))


def _settled(dataset: xr.Dataset) -> xr.Dataset:
    """Without what only says how it is stored."""
    dataset = dataset.drop_encoding()
    for variable in dataset.variables.values():
        variable.attrs.pop("_FillValue", None)
    return dataset


def _checked(path: RunPath, arrays: Mapping[str, Any], sums: Any, begin: int) -> tuple[np.ndarray, list[str]]:
    """The status of every lane, NOT_RUN where the lane is damaged, and the names of what is damaged; box by box."""
    status, damaged, many = np.full(arrays["status"].shape, NOT_RUN, arrays["status"].dtype), list[str](), 0
    boxes = Boxes(arrays["status"].shape, arrays["status"].chunks)
    checked = dict(arrays) if sums is None else {**arrays, f"{CHECKS}/{LANES}": sums}
    try:
        every = np.asarray(arrays["status"][...])
    except Exception:  # damaged, so that it is read box by box
        every = None
    for number in range(boxes.count):
        place, block = boxes.place(number), boxes.block(number)
        # first: a writer writes it last
        ended = _block(arrays["status"], "status", place, block, damaged) if every is None else every[block]
        lost = ended == np.iinfo(ended.dtype).min
        ran = (ended != NOT_RUN) & ~lost
        damaged += _missing(path, ["status"], arrays, place) if lost.any() else []
        if ran.any():
            before = len(damaged)
            values = {
                name: ended if name == "status" else _block(array, name, place, block, damaged)
                for name, array in checked.items()
            }
            if sums is None:
                wrong = (ended == 0) & np.isnan(values["loss"]).any(-1)
            else:
                stored = values.pop(f"{CHECKS}/{LANES}")
                rows = {name: one.reshape(ended.size, *one.shape[ended.ndim :]) for name, one in values.items()}
                wrong = ran & (lane_sums(begin, rows).reshape(ended.shape) != stored)
            wrong |= ran if len(damaged) > before else False
            if wrong.any() and sums is not None and len(damaged) == before:
                damaged += _missing(path, checked, checked, place)
                many += wrong.sum() if len(damaged) == before else 0
            lost |= wrong
        status[block] = np.where(lost, NOT_RUN, ended)
    return status, damaged + ([f"the values of {many} lanes"] if many and not damaged else [])


def _block(array: Any, name: str, place: tuple[int, ...], block: tuple[slice, ...], damaged: list[str]) -> np.ndarray:
    """A box of an array; fill values where the chunk cannot be read, whose name is noted."""
    try:
        return np.asarray(array[block])
    except PermissionError:
        raise
    except Exception as error:  # whatever its codecs raise
        if is_of_store(error):
            raise
        damaged.append(f"{name}/{chunk(array, place)}")
        missing = np.nan if array.dtype.kind == "f" else 0 if array.dtype.kind == "u" else NOT_RUN
        return np.full(
            [part.stop - part.start for part in block] + list(array.shape[len(block) :]), missing, array.dtype
        )


def _missing(path: RunPath, names: Iterable[str], arrays: Mapping[str, Any], place: tuple[int, ...]) -> list[str]:
    """The chunks of a box that are not there."""
    chunks = (f"{name}/{chunk(arrays[name], place)}" for name in names)
    return [one for one in chunks if not (path / one).is_file()]


class _Stored(xr.backends.BackendArray):
    """A variable that is read when it is asked for, while its run is in place; missing where lanes have not run."""

    def __init__(self, path: RunPath, array: Any, run_id: str | None, wait: np.ndarray):
        self.shape, self.dtype = array.shape, array.dtype
        self._path, self._array, self._run_id, self._wait = path, array, run_id, wait

    def __getitem__(self, key: Any) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        _check_in_place(self._path, self._run_id)
        wait = _at(self._wait, key[: self._wait.ndim])
        if not wait.any():
            return np.asarray(self._array.oindex[key])
        missing = self.dtype.type(np.nan if self.dtype.kind == "f" else NOT_RUN)
        try:
            values = np.asarray(self._array.oindex[key])
        except Exception:  # a damaged chunk, of lanes that wait
            whole = np.full(self.shape, missing)
            boxes = Boxes(self._wait.shape, self._array.chunks[: self._wait.ndim])
            for block in map(boxes.block, boxes.where(~self._wait)):
                whole[block] = self._array[block]
            values = _at(whole, key)
        return np.where(wait.reshape(wait.shape + (1,) * (values.ndim - wait.ndim)), missing, values)


def _check_in_place(path: RunPath, run_id: str | None) -> None:
    """Raises where another run has taken the place of the one that is read."""
    if attributes(path).get(RUN_ID) != run_id:
        raise InputError(f"'{path}' must stay in place while it is read, got another run's, or none")


def _at(values: np.ndarray, key: tuple[Any, ...]) -> np.ndarray:
    """Of an array what is at these places along each axis."""
    return xr.Variable([f"axis_{i}" for i in range(values.ndim)], values)[key].values


def _had_lanes(dataset: xr.Dataset) -> bool:
    """Whether a dataset of an earlier version was written lane by lane."""
    return {"status", "loss"} <= set(dataset.data_vars) and NOT_RUN in dataset["status"].attrs.get("flag_values", ())

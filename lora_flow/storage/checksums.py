"""Datasets as Zarr groups that prove themselves, and that every reader of Zarr reads alike.

The groups have format 2, which old and new readers know. Every array has a fill value of its own, so a missing chunk
reads as missing and not as some number. Every chunk is gzip's, without compression, for its CRC-32, which every reader
checks. The subgroup `checks` has the checksums that readers do not check by themselves:

- its attribute `sha256` has a digest for each file that is final once the group is made: metadata and coordinates;
  other attributes hold notes on the group;
- its array `lanes` has, for each lane of the variables that are written box by box, a CRC-32 of all the lane's values
  and of the dataset's own description, so that values do not pass under other coordinates.

A box of lanes is a chunk of every such variable. Groups are made of metadata and a status that says so, and checked box
by box, so that no memory depends on their size. A stored variable is read when its values are asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from lora_flow.storage.lanes import NOT_RUN, Boxes
from lora_flow.storage.remote import RemotePath, RunPath, below, contents, copy, zarr_store
from lora_flow.storage.swap import is_generated

CHECKS, LANES, SUMS = "checks", "lanes", "sha256"
RUN_ID = "run_id"  # the attribute of stored results that tells runs apart
OWN = f"{CHECKS}/.zattrs"  # the file that holds the digests, and the notes
_METADATA = (".zgroup", ".zattrs", ".zarray")
_CONSOLIDATED = ".zmetadata"
_CHECKSUM_ONLY = {"id": "gzip", "level": 0}


def create(
    path: Path,
    dataset: xr.Dataset,
    box: tuple[int, ...] | None = None,
    noted: Mapping[str, Any] | None = None,
) -> None:
    """Makes a group of a dataset, with notes that readers of the dataset do not see.

    With the size of a `box` of lanes, the dims of `status`, the data variables are written later, box by box. Only
    `status` is stored now, NOT_RUN for every lane. Without a box everything is stored, and final.
    """
    live = list(dataset.data_vars) if box else []
    final = dataset.drop_vars(live)
    encoding = {name: _encoding(final[name]) for name in final.variables}
    final.to_zarr(path, encoding=encoding, zarr_format=2, consolidated=False, write_empty_chunks=True)
    group: Any = zarr.open_group(path, mode="r+", zarr_format=2, use_consolidated=False)
    checks = group.create_group(CHECKS)
    if box:
        _live_array(checks, LANES, dataset["status"].astype(np.uint32).drop_attrs(), box)
        for name in map(str, live):
            _live_array(group, name, dataset[name], (*box, *dataset[name].shape[len(box) :]))
    fixed = [name for name in _files(path) if name != OWN]
    checks.attrs.put(dict(noted or {}) | {SUMS: {name: _sha256(one) for name, one in contents(path, fixed).items()}})
    (path / _CONSOLIDATED).write_text(_consolidated(contents(path, [*fixed, OWN])))
    if box:  # every reader finds that they have not run, and a chunk that is lost is no such chunk
        open_arrays(path)["status"][...] = NOT_RUN


def open_arrays(path: RunPath) -> dict[str, Any]:
    """The variables that are written box by box, and the sums of the lanes, which write what is empty as well."""
    with zarr.config.set({"array.write_empty_chunks": True}):
        group: Any = zarr.open_group(zarr_store(path), mode="r+", zarr_format=2)
        return dict(group.arrays()) | dict(group[CHECKS].arrays())


def chunk(array: Any, place: tuple[int, ...]) -> str:
    """The file's name of the chunk that holds the box at this place in the grid of boxes."""
    return ".".join(map(str, [*place, *[0] * (array.ndim - len(place))]))


def description_sum(dataset: xr.Dataset) -> int:
    """The CRC-32 of a dataset's attributes and coordinates, with which the sums of its lanes begin."""
    told = {name: value for name, value in dataset.attrs.items() if name != RUN_ID}
    begin = zlib.crc32(json.dumps(told, sort_keys=True).encode())
    for name in sorted(map(str, dataset.coords)):
        values = dataset[name].values
        begin = zlib.crc32(f"{name} {dataset[name].dims} {values.dtype}".encode() + values.tobytes(), begin)
    return begin


def lane_sums(begin: int, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """The CRC-32 of each lane, given that of the description and all the values, `(lane, ...)`, by name."""
    arrays = [np.ascontiguousarray(values[name]) for name in sorted(values)]
    rows = np.concatenate([one.reshape(len(one), -1).view(np.uint8) for one in arrays], axis=1)
    return np.array([zlib.crc32(memoryview(row), begin) for row in rows], np.uint32)


def carried_over(sums: np.ndarray, length: int, before: int, after: int) -> np.ndarray:
    """The sums of lanes of `length` bytes under another description: those of their values as they were summed.

    No value is looked at, and a lane that is damaged stays so: what another beginning changes about a CRC depends on
    nothing but the length.
    """
    zeros = bytes(length)
    return sums ^ np.uint32(zlib.crc32(zeros, before) ^ zlib.crc32(zeros, after))


def copy_lanes(old: RunPath, new: RunPath) -> None:
    """Has a new group hold the data written box by box; damage shows when the new group is read."""
    made = _files(new)
    arrays = [name.removesuffix("/.zarray") for name in made if name.endswith("/.zarray")]
    there = [name for name in made if not name.startswith("status/")]
    share_chunks(old, new, [name for name in arrays if (old / name).is_dir()], there)


def share_chunks(old: RunPath, new: RunPath, names: Iterable[str], but: Collection[str] = ()) -> None:
    """Has the arrays of these names in a new group hold the chunks that they have in the old one, but for some."""
    chunks = ((name, chunk) for name in names for chunk in (old / name).iterdir())
    shared = [(chunk, new / name / chunk.name) for name, chunk in chunks if f"{name}/{chunk.name}" not in but]
    _share([(chunk, to) for chunk, to in shared if _is_chunk(chunk.name) and chunk.is_file()])


def attributes(path: RunPath) -> dict[str, Any]:
    """The attributes of a group that may be damaged, none where they cannot be read."""
    return _json_of(path / ".zattrs", {})


def notes(path: RunPath) -> dict[str, Any]:
    """The notes of a group, as `attributes`; there are two copies."""
    copies = _json_of(path / _CONSOLIDATED, {}).get("metadata")
    copied = copies.get(OWN) if isinstance(copies, dict) else None
    return _json_of(path / OWN, copied if isinstance(copied, dict) else {})


def boxes_of(path: RunPath) -> Boxes:
    """The boxes that a group with lanes, which can be read, is written in."""
    status: Any = zarr.open_group(zarr_store(path), mode="r", zarr_format=2)["status"]
    return Boxes(status.shape, status.chunks)


def damaged_files(path: RunPath) -> list[str] | None:
    """The damaged files among the final ones; None for a group without checks."""
    if not (path / CHECKS).exists():
        return [OWN] if RUN_ID in _json_of(path / ".zattrs", {}) else None
    sums = _json_of(path / OWN, {}).get(SUMS)
    if not isinstance(sums, dict) or not all(map(_is_inside, sums)):
        return [OWN]
    files = contents(path, (*sums, OWN))
    damaged = [name for name, digest in sums.items() if name not in files or _sha256(files[name]) != digest]
    consolidated = _json_of(path / _CONSOLIDATED, None)
    if not damaged and consolidated != json.loads(_consolidated(files), parse_constant=str):
        damaged.append(_CONSOLIDATED)
    return damaged


def _is_inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _json_of(path: RunPath, otherwise: Any) -> Any:
    try:
        found = json.loads(path.read_bytes(), parse_constant=str)  # a NaN is not equal to itself
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return otherwise
    return found if isinstance(found, dict) else otherwise


def _consolidated(files: Mapping[str, bytes]) -> str:
    metadata = {name: json.loads(one) for name, one in files.items() if name.split("/")[-1] in _METADATA}
    return json.dumps({"metadata": metadata, "zarr_consolidated_format": 1}, indent=1)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _files(path: RunPath) -> list[str]:
    return sorted(below(path, file) for file in path.rglob("*") if file.is_file() and not is_generated(file.name))


def _share(pairs: Sequence[tuple[RunPath, RunPath]]) -> None:
    """Second names of files, which no writer changes: they replace files whole. Copies where they cannot have any."""
    copy((chunk, to) for chunk, to in pairs if isinstance(chunk, RemotePath) and isinstance(to, RemotePath))
    for chunk, to in pairs:
        if isinstance(chunk, Path) and isinstance(to, Path):
            to.unlink(missing_ok=True)
            try:
                os.link(chunk, to)
            except OSError:
                shutil.copyfile(chunk, to)


def _is_chunk(name: str) -> bool:
    return re.fullmatch(r"[0-9]+(\.[0-9]+)*", name) is not None


def _encoding(variable: xr.DataArray) -> dict[str, Any]:
    """The encoding of final variables: a fill value that is none of their values."""
    kind = variable.dtype.kind
    if kind not in "iufU":
        return {"compressors": _CHECKSUM_ONLY}
    fill: Any = {"f": np.nan, "U": ""}.get(kind)
    if kind in "iu":
        fill = np.iinfo(variable.dtype).min if kind == "i" else np.iinfo(variable.dtype).max
    return {"_FillValue": variable.dtype.type(fill), "compressors": _CHECKSUM_ONLY}


def _live_array(group: Any, name: str, variable: xr.DataArray, chunks: tuple[int, ...]) -> None:
    fill = {"f": np.nan, "i": NOT_RUN, "u": 0}[variable.dtype.kind]
    group.create_array(
        name,
        shape=variable.shape,
        chunks=chunks,
        dtype=variable.dtype,
        fill_value=np.iinfo(variable.dtype).min if name == "status" else fill,  # which is written in `create`
        compressors=_CHECKSUM_ONLY,
        attributes=dict(variable.attrs) | {"_ARRAY_DIMENSIONS": list(variable.dims)},
    )

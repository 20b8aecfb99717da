"""Datasets as Zarr groups that prove themselves, and that every reader of Zarr reads alike.

The groups have format 2, which old and new readers know. Every array has a fill value of its own, so a missing chunk
reads as missing and not as some number. Every chunk is gzip's, without compression, for its CRC-32, which every reader
checks. The subgroup `checks` has the checksums that readers do not check by themselves:

- its attribute `sha256` has a digest for each file that is final once the group is made: metadata and coordinates;
  other attributes hold notes on the group;
- its array `lanes` has, for each lane of the variables that are written lane by lane, a CRC-32 of all the lane's values
  and of the dataset's own description, so that values do not pass under other coordinates;
- its array `batches` has for each lane the number of the batch that the lane is written with.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
import zarr

from lora_flow.checks import InputError
from lora_flow.storage.lanes import NOT_RUN, lane_chunks
from lora_flow.storage.swap import is_generated

CHECKS, LANES, BATCHES, SUMS = "checks", "lanes", "batches", "sha256"
RUN_ID = "run_id"  # the attribute of stored results that tells runs apart
OWN = f"{CHECKS}/.zattrs"  # the file that holds the digests, and the notes
_METADATA = (".zgroup", ".zattrs", ".zarray")
_CONSOLIDATED = ".zmetadata"
_CHECKSUM_ONLY = {"id": "gzip", "level": 0}
_AT_ONCE = 4096  # lanes whose values are joined in memory


class Damaged(InputError):
    """Metadata or coordinates of a group are damaged, so the group cannot be read."""

    def __init__(self, path: Path, files: Sequence[str]):
        super().__init__(f"'{path}' must be as it was written, got damaged or missing {listed(files)}")
        self.path, self.files = path, files


class Reading(NamedTuple):
    """A stored dataset, the names of its damaged parts, whose lanes have status NOT_RUN, and the notes.

    `sums` are the `lane_sums` of the dataset as read; empty for a group without checks.
    """

    dataset: xr.Dataset
    damaged: list[str]
    notes: dict[str, Any]
    sums: np.ndarray


def create(
    path: Path,
    dataset: xr.Dataset,
    chunks: Mapping[str, tuple[int, ...]] | None = None,
    noted: Mapping[str, Any] | None = None,
    batches: Sequence[np.ndarray] = (),
) -> None:
    """Makes a group of a dataset, with notes that readers of the dataset do not see.

    With `chunks` the data variables are written later, lane by lane; only `status` is stored now, NOT_RUN for every
    lane. The dims of `status` are the lanes, and `batches` has the numbers of the batches that are written together.
    Without chunks everything is stored, and final.
    """
    live = list(dataset.data_vars) if chunks else []
    final = dataset.drop_vars(live)
    encoding = {name: _encoding(final[name]) for name in final.variables}
    final.to_zarr(path, encoding=encoding, zarr_format=2, consolidated=False, write_empty_chunks=True)
    group: Any = zarr.open_group(path, mode="r+", zarr_format=2, use_consolidated=False)
    checks = group.create_group(CHECKS)
    if chunks:
        sums = dataset["status"].astype(np.uint32).drop_attrs()
        _live_array(checks, LANES, sums, chunks["status"])
        for name in map(str, live):
            _live_array(group, name, dataset[name], chunks[name])
        together = sums.astype(np.int32).copy(data=_numbered(batches, sums.shape))
        _live_array(checks, BATCHES, together, sums.shape)
        open_arrays(path)[BATCHES][...] = together.values
    fixed = [name for name in _files(path) if name != OWN]
    checks.attrs.put(dict(noted or {}) | {SUMS: {name: _sha256(path / name) for name in fixed}})
    (path / _CONSOLIDATED).write_text(_consolidated(path, [*fixed, OWN]))
    if chunks:  # every reader finds that they have not run, and a chunk that is lost is no such chunk
        open_arrays(path)["status"][...] = NOT_RUN


def open_arrays(path: Path) -> dict[str, Any]:
    """The variables that are written lane by lane, and the sums of the lanes, which write what is empty as well."""
    with zarr.config.set({"array.write_empty_chunks": True}):
        group: Any = zarr.open_group(path, mode="r+", zarr_format=2)
        return dict(group.arrays()) | dict(group[CHECKS].arrays())


def read(path: Path) -> Reading:
    """The contents of a group, with every number checked; a group without checks only has to be readable.

    **Raises:** `Damaged` for metadata, coordinates and other final data; `InputError` where the path is no such group.
    """
    damaged = _damaged_files(path)
    if damaged:
        raise Damaged(path, damaged)
    try:
        return _read(path, verify=damaged is not None)
    except PermissionError:
        raise
    except Exception as error:  # whatever damaged files make the readers raise
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"'{path}' must be readable by xarray.open_zarr, got {told}") from error


def lane_sums(dataset: xr.Dataset, lanes: np.ndarray | None = None) -> np.ndarray:
    """The CRC-32 of each of the lanes with these numbers, or of all."""
    count = dataset["status"].size
    lanes = np.arange(count) if lanes is None else lanes
    begin = zlib.crc32(json.dumps({k: v for k, v in dataset.attrs.items() if k != RUN_ID}, sort_keys=True).encode())
    for name in sorted(map(str, dataset.coords)):
        values = dataset[name].values
        begin = zlib.crc32(f"{name} {dataset[name].dims} {values.dtype}".encode() + values.tobytes(), begin)
    arrays = [dataset[name].values.reshape(count, -1) for name in sorted(map(str, dataset.data_vars))]
    sums = np.empty(len(lanes), np.uint32)
    for first in range(0, len(lanes), _AT_ONCE):
        some = lanes[first : first + _AT_ONCE]
        rows = np.concatenate([np.ascontiguousarray(one[some]).view(np.uint8) for one in arrays], axis=1)
        sums[first : first + len(some)] = [zlib.crc32(memoryview(row), begin) for row in rows]
    return sums


def copy_lanes(old: Path, new: Path) -> None:
    """Copies the data written lane by lane to a new group; damage shows when the new group is read."""
    for name in _files(new):
        if name.endswith("/.zarray") and (old / name).parent.is_dir():
            for chunk in (old / name).parent.iterdir():
                to = (new / name).with_name(chunk.name)
                live = not to.exists() or to.parent.name == "status"
                if live and _is_chunk(chunk.name) and chunk.is_file():
                    shutil.copyfile(chunk, to)


def attributes(path: Path) -> dict[str, Any]:
    """The attributes of a group that may be damaged, none where they cannot be read."""
    return _json_of(path / ".zattrs", {})


def notes(path: Path) -> dict[str, Any]:
    """The notes of a group, as `attributes`."""
    return _json_of(path / OWN, {})


def batches_of(path: Path) -> np.ndarray | None:
    """For each lane of a group that can be read the number of its batch; None where an earlier version made it."""
    group: Any = zarr.open_group(path, mode="r", zarr_format=2)
    stored = group[CHECKS].get(BATCHES) if CHECKS in group else None
    return None if stored is None else np.asarray(stored[...])


def listed(names: Sequence[str]) -> str:
    """A few names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read(path: Path, verify: bool) -> Reading:
    dataset = xr.open_zarr(path, consolidated=True, mask_and_scale=False, chunks=None)
    damaged: list[str] = []
    group: Any = zarr.open_group(path, mode="r", zarr_format=2)
    arrays = dict(group.arrays()) | ({f"{CHECKS}/{LANES}": group[CHECKS].get(LANES)} if verify else {})
    has_lanes = arrays.get(f"{CHECKS}/{LANES}") is not None if verify else _had_lanes(dataset)
    found, sums = np.empty(0, np.uint32), None
    if has_lanes:  # status first: a run that is still writing writes it last
        names = sorted(map(str, dataset.data_vars), key=lambda name: (name != "status", name))
        values = {name: _values(arrays[name], name, damaged) for name in names}
        sums = _values(arrays[f"{CHECKS}/{LANES}"], f"{CHECKS}/{LANES}", damaged) if verify else None
        dataset = dataset.assign({name: dataset[name].copy(data=array) for name, array in values.items()})
    dataset = dataset.load().drop_encoding()
    for variable in dataset.variables.values():
        variable.attrs.pop("_FillValue", None)
    if has_lanes:
        status = dataset["status"].values
        gone = np.flatnonzero(status == np.iinfo(status.dtype).min)
        if gone.size:
            damaged += _missing(path, arrays, gone, status.shape, ["status"])
            status[status == np.iinfo(status.dtype).min] = NOT_RUN
        if sums is None:
            lost = (status == 0) & dataset["loss"].isnull().any("time").values
        else:
            found = lane_sums(dataset)
            lost = (status != NOT_RUN) & (found.reshape(status.shape) != sums)
        if sums is not None and lost.any():
            damaged += _missing(path, arrays, np.flatnonzero(lost), status.shape, [*values, f"{CHECKS}/{LANES}"])
            damaged += [] if damaged else [f"the values of {lost.sum()} lanes"]
        status[lost] = NOT_RUN
    return Reading(dataset, damaged, notes(path), found)


def _numbered(batches: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    numbers = np.full(int(np.prod(shape)), NOT_RUN, np.int32)
    for number, lanes in enumerate(batches):
        numbers[lanes] = number
    return numbers.reshape(shape)


def _had_lanes(dataset: xr.Dataset) -> bool:
    """Whether a dataset of an earlier version was written lane by lane."""
    return {"status", "loss"} <= set(dataset.data_vars) and NOT_RUN in dataset["status"].attrs.get("flag_values", ())


def _values(array: Any, name: str, damaged: list[str]) -> np.ndarray:
    """All values of an array; fill values where a chunk cannot be read, whose name is noted."""
    try:
        return np.asarray(array[...])
    except PermissionError:
        raise
    except Exception:  # whatever its codecs raise
        missing = np.nan if array.dtype.kind == "f" else 0 if array.dtype.kind == "u" else NOT_RUN
        values = np.full(array.shape, missing, array.dtype)
    for place in np.ndindex(*(-(-size // chunk) for size, chunk in zip(array.shape, array.chunks, strict=True))):
        part = tuple(slice(i * chunk, (i + 1) * chunk) for i, chunk in zip(place, array.chunks, strict=True))
        try:
            values[part] = array[part]
        except Exception:
            damaged.append(f"{name}/{'.'.join(map(str, place))}")
    return values


def _missing(path: Path, arrays: Any, lanes: np.ndarray, shape: tuple[int, ...], names: Sequence[str]) -> list[str]:
    """The chunks of these lanes that are not there."""
    found = []
    for name in names:
        rest = [0] * (arrays[name].ndim - len(shape))
        for place in lane_chunks(lanes, shape, arrays[name].chunks):
            chunk = f"{name}/{'.'.join(map(str, [*place, *rest]))}"
            if not (path / chunk).is_file():
                found.append(chunk)
    return found


def _damaged_files(path: Path) -> list[str] | None:
    """The damaged files among the final ones; None for a group without checks."""
    if not (path / CHECKS).exists():
        return [OWN] if RUN_ID in _json_of(path / ".zattrs", {}) else None
    sums = _json_of(path / OWN, {}).get(SUMS)
    if not isinstance(sums, dict) or not all(map(_is_inside, sums)):
        return [OWN]
    damaged = [name for name, digest in sums.items() if _sha256(path / name) != digest]
    whole = [name for name in (*sums, OWN) if name not in damaged]
    if not damaged and _json_of(path / _CONSOLIDATED, None) != json.loads(
        _consolidated(path, whole), parse_constant=str
    ):
        damaged.append(_CONSOLIDATED)
    return damaged


def _is_inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _json_of(path: Path, otherwise: Any) -> Any:
    try:
        found = json.loads(path.read_bytes(), parse_constant=str)  # a NaN is not equal to itself
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return otherwise
    return found if isinstance(found, dict) else otherwise


def _consolidated(path: Path, names: Sequence[str]) -> str:
    metadata = {name: json.loads((path / name).read_bytes()) for name in names if name.split("/")[-1] in _METADATA}
    return json.dumps({"metadata": metadata, "zarr_consolidated_format": 1}, indent=1)


def _sha256(path: Path) -> str:
    """The digest of a file, "" where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""


def _files(path: Path) -> list[str]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and not is_generated(file.name))
    return [file.relative_to(path).as_posix() for file in files]


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

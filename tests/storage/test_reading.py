"""Stored variables are read when they are asked for, and never as another run's numbers."""

import shutil

import numpy as np
import pytest
import xarray as xr

from lora_flow import InputError
from lora_flow.storage import blocks, checksums, folder
from lora_flow.storage.folder import Folder, Kind, Template
from lora_flow.storage.reading import read

KIND = Kind(
    "tide", "a harbour's", lambda table: "tide" in table, lambda path: [], lambda path: f"tide on --out {path} --resume"
)


def template():
    status = ("row", "cup"), np.full((3, 4), -1, np.int8), {"flag_values": [-1, 0]}
    dataset = xr.Dataset(
        {
            "height": (("row", "cup", "time"), np.broadcast_to(np.nan, (3, 4, 5))),
            "count": (("row", "cup"), np.broadcast_to(np.int32(0), (3, 4))),
            "status": status,
        },
        {"row": [0, 1, 2], "cup": [0, 1, 2, 3], "time": np.arange(5.0)},
    )
    return Template({"tide": 1}, dataset, (1, 3))


def values(number, lanes):
    return {
        "height": number + np.arange(lanes * 5.0).reshape(lanes, 5),
        "count": np.full(lanes, number),
        "status": np.zeros(lanes),
    }


@pytest.fixture
def stored(tmp_path):
    """Five of six boxes, of three lanes and of one."""
    KIND.make(tmp_path, {"": template()})
    run = KIND.resume(tmp_path, template())
    for number in (0, 1, 2, 3, 5):
        run.write(number, values(number, 3 if number % 2 == 0 else 1))
    return tmp_path


SELECTIONS = (
    {},
    {"row": 1},
    {"row": [2, 0], "cup": slice(1, 4)},
    {"cup": slice(None, None, -2), "time": 3},
    {"row": 2, "cup": 1, "time": slice(1, 3)},
    {"cup": np.array([True, False, True, True])},
)


@pytest.mark.parametrize("where", SELECTIONS)
def test_a_part_that_is_asked_for_is_that_part_of_the_whole(stored, where):
    lazy, whole = read(stored / "results.zarr").dataset, read(stored / "results.zarr").dataset.load()
    assert whole["height"].isel(row=2, cup=slice(0, 3)).isnull().all()
    xr.testing.assert_identical(lazy.isel(where).load(), whole.isel(where))


def test_only_the_chunks_that_are_asked_for_are_read(stored):
    lazy = read(stored / "results.zarr").dataset
    shutil.rmtree(stored / "results.zarr" / "count")
    for chunk in ("0.0.0", "0.1.0", "2.1.0"):
        (stored / "results.zarr" / "height" / chunk).unlink()
    np.testing.assert_array_equal(lazy["height"].isel(row=1, cup=3).values, 3 + np.arange(5.0))


def test_blocks_that_are_computed_one_by_one_end_where_boxes_do(stored, monkeypatch):
    """A lane of height has 40 bytes: two at once are less than a box of three, and three are one."""
    height = read(stored / "results.zarr").dataset[["height"]]
    for lanes, ends in ((2, [2, 4]), (3, [3, 6])):
        monkeypatch.setattr(blocks, "AT_ONCE", 40 * lanes)
        assert [place["cup"].stop for place in blocks.blocks(height.isel(row=[1]), ("time",))] == ends


def test_another_run_in_its_place_is_not_read(stored):
    lazy = read(stored / "results.zarr").dataset
    shutil.rmtree(stored / "results.zarr")
    KIND.make(stored, {"": template()})
    with pytest.raises(InputError, match="must stay in place while it is read, got another run's, or none"):
        lazy["height"].load()


def test_what_is_small_is_in_memory_and_what_is_large_is_not(stored, monkeypatch):
    assert KIND.load(stored, partial=True)["height"].variable._in_memory
    monkeypatch.setattr(folder, "_IN_MEMORY", 100)
    assert not KIND.load(stored, partial=True)["height"].variable._in_memory


def test_lanes_that_have_run_keep_their_values_when_their_box_is_written_again(stored):
    reading = read(stored / "results.zarr")
    run = Folder(stored, reading.dataset.attrs["run_id"], checksums.description_sum(reading.dataset))
    ended = np.array([[0, -1, 0]], np.int8)
    run.correct(0, ended)
    assert run.pending() == [0, 4]
    run.write(0, {name: one + 100 if name == "height" else one for name, one in values(0, 3).items()})
    again = read(stored / "results.zarr")
    assert (again.damaged, run.pending()) == ([], [4])
    np.testing.assert_array_equal(
        again.dataset["height"].values[0, :3], np.arange(15.0).reshape(3, 5) + np.array([[0], [100], [0]])
    )

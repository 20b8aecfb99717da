"""Stored groups prove themselves: whatever is damaged, no other number is read. Other libraries read them alike."""

import gzip
import json
import re
import shutil

import numpy as np
import pytest
import xarray as xr

from lora_flow import InputError
from lora_flow.storage.checksums import (
    LANES,
    boxes_of,
    copy_lanes,
    create,
    description_sum,
    lane_sums,
    open_arrays,
)
from lora_flow.storage.lanes import Boxes
from lora_flow.storage.reading import Damaged, read

LANE_DIMS = ("init", "seed")
BOX = (1, 2)


def example():
    """Sums that are all zero, NaN, negative; coordinates of every kind, some of them zero."""
    draw = np.random.default_rng(0)
    loss = draw.normal(size=(2, 3, 5))
    loss[1] = 0.0
    return xr.Dataset(
        {
            "loss": ((*LANE_DIMS, "time"), loss, {"long_name": "loss"}),
            "floor": (LANE_DIMS, np.array([[np.nan, 0.0, 1.0], [0.0, 0.0, 0.0]])),
            "status": (LANE_DIMS, np.array([[0, 1, 2], [0, 0, 0]], np.int8), {"flag_values": [-1, 0, 1, 2]}),
            "steps": (LANE_DIMS, np.array([[7, 8, 9], [0, 0, 0]], np.int32)),
        },
        coords={
            "init": ["gaussian", "spectral"],
            "seed": [0, 1, 2],
            "time": np.linspace(0, 1, 5),
            "sigma": 3.0,
            "aligned": ("init", [0, 0]),
        },
        attrs={"run_id": "a", "t1": 1.0, "sigmas": [3.0, 0.1], "nothing": float("nan")},
    )


def store(path, dataset):
    create(path, dataset, BOX, {"settings": {"alpha": [0.1]}})
    arrays = open_arrays(path)
    for name in dataset.data_vars:
        arrays[name][...] = dataset[name].values
    lanes = {name: one.values.reshape(6, -1) for name, one in dataset.data_vars.items()}
    arrays[LANES][...] = lane_sums(description_sum(read(path).dataset), lanes).reshape(2, 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "results.zarr"
    store(path, example())
    return path


def test_what_is_stored_is_read(whole):
    dataset, damaged, notes = read(whole)
    xr.testing.assert_identical(dataset, example())
    assert {name: dataset[name].dtype for name in dataset.variables} == {
        name: example()[name].dtype for name in example().variables
    }
    assert (damaged, notes["settings"]) == ([], {"alpha": [0.1]})
    with xr.open_zarr(whole) as opened:
        xr.testing.assert_equal(opened.load(), example())


def test_lanes_that_have_not_run_say_so_to_every_reader_and_a_lost_status_is_named(tmp_path):
    path = tmp_path / "new.zarr"
    create(path, example(), BOX)
    with xr.open_zarr(path) as opened:
        assert np.all(opened["status"].values == -1)
    assert read(path).damaged == []
    (path / "status/1.0").unlink()
    dataset, damaged = read(path)[:2]
    assert (np.all(dataset["status"].values == -1), damaged) == (True, ["status/1.0"])


def plain_reader(path):
    """The arrays of a Zarr group of format 2, by its specification and nothing else."""
    arrays = {}
    for file in path.rglob(".zarray"):
        meta = json.loads(file.read_text())
        assert (meta["zarr_format"], meta["order"], meta["filters"]) == (2, "C", None)
        assert meta["compressor"]["id"] == "gzip"
        grid = [-(-size // chunk) for size, chunk in zip(meta["shape"], meta["chunks"], strict=True)]
        array = np.empty(np.multiply(grid, meta["chunks"]), meta["dtype"])
        for place in np.ndindex(*grid):
            content = gzip.decompress((file.parent / ".".join(map(str, place or (0,)))).read_bytes())
            block = tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, meta["chunks"], strict=True))
            array[block] = np.frombuffer(content, meta["dtype"]).reshape(meta["chunks"])
        arrays[file.parent.relative_to(path).as_posix()] = array[tuple(map(slice, meta["shape"]))]
    return arrays


def tensorstore_reader(path):
    """The same by another library; it has no text."""
    tensorstore = pytest.importorskip("tensorstore")
    arrays = {}
    for file in path.rglob(".zarray"):
        if "U" not in json.loads(file.read_text())["dtype"]:
            spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(file.parent)}}
            name = file.parent.relative_to(path).as_posix()
            arrays[name] = np.asarray(tensorstore.open(spec).result().read().result())
    return arrays


@pytest.mark.parametrize("reader", [plain_reader, tensorstore_reader])
def test_other_readers_read_the_same(whole, reader):
    """Every chunk is there, what is all zero or all missing too, so that no reader makes one up."""
    seen = reader(whole)
    for name in set(example().variables) & set(seen):
        assert seen[name].dtype == example()[name].dtype
        np.testing.assert_array_equal(seen[name].reshape(example()[name].shape), example()[name].values)
    assert set(seen) >= {"loss", "status", "steps", "seed", "time", f"checks/{LANES}"}


def test_every_array_has_a_fill_value_that_is_none_of_its_values(whole):
    for file in whole.rglob(".zarray"):
        fill = json.loads(file.read_text())["fill_value"]
        assert fill is not None
        name = file.parent.relative_to(whole).as_posix()
        assert fill == 0 if name == f"checks/{LANES}" else not np.any(example()[name].values == fill)


def test_the_boxes_are_the_chunks(whole):
    assert boxes_of(whole) == Boxes((2, 3), BOX)
    assert {open_arrays(whole)[name].chunks[:2] for name in (*example().data_vars, LANES)} == {BOX}


def damages(content):
    """Ways to damage a file, by what is then in it: a bit in two places, cut short, emptied, absent."""
    for place in sorted({len(content) // 2, len(content) - 5} & set(range(len(content)))):
        yield f"byte {place}", content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]
    yield "cut", content[: len(content) // 2]
    yield "empty", b""
    yield "zeros", bytes(len(content))
    yield "absent", None


def files(path):
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def is_right(path):
    """Whether a group reads as it was, or says what is damaged; its undamaged lanes always read as they were."""
    try:
        dataset, damaged = read(path)[:2]
    except InputError as error:
        return "refused" if "\n" not in str(error) else error
    done = dataset["status"].values != -1
    for name in dataset.variables:
        there, was = dataset[name].values, example()[name].values
        mask = done if name in example().data_vars else np.ones(there.shape, bool)
        np.testing.assert_array_equal(there[mask], was[mask])
    assert not (damaged and done.all())
    return "as it was" if done.all() else "lanes"


def test_damaged_bytes_and_files_never_read_as_other_numbers(whole, tmp_path):
    """In every way; the further chunks of an array, which are read as its first is, in one of the ways each."""
    path = tmp_path / "results.zarr"
    shutil.copytree(whole, path)
    seen = {}
    for number, name in enumerate(files(path)):
        content = (path / name).read_bytes()
        ways = [*damages(content)]
        if re.search(r"/[0-9.]*[1-9][0-9.]*$", name):
            ways = [ways[number % len(ways)]]
        for how, damaged in ways:
            (path / name).unlink()
            if damaged is not None:
                (path / name).write_bytes(damaged)
            seen[name, how] = is_right(path)
            (path / name).write_bytes(content)
    assert len(seen) > 170
    assert set(seen.values()) == {"refused", "lanes"}
    assert is_right(path) == "as it was"


@pytest.mark.parametrize(
    ("one", "other"), [("loss/0.0.0", "loss/1.0.0"), ("steps/0.0", "steps/1.0"), ("seed/0", "aligned/0")]
)
def test_chunks_that_change_places_are_noticed(whole, tmp_path, one, other):
    """Each is whole, and a reader of chunks alone cannot tell."""
    path = tmp_path / "results.zarr"
    shutil.copytree(whole, path)
    shutil.copyfile(whole / one, path / other)
    assert is_right(path) != "as it was"


@pytest.mark.parametrize(("name", "lanes"), [("loss/0.1.0", 1), ("steps/1.0", 2), ("checks/lanes/0.0", 2)])
def test_damaged_lanes_are_named_and_have_not_run(whole, tmp_path, name, lanes):
    path = tmp_path / "results.zarr"
    shutil.copytree(whole, path)
    for content in (None, b"", b"damaged"):
        (path / name).unlink()
        if content is not None:
            (path / name).write_bytes(content)
        assert read(path).damaged == [name]
        assert np.sum(read(path).dataset["status"] == -1) == lanes
        (path / name).touch()


@pytest.mark.parametrize(
    "name", ["seed/0", "init/0", "steps/.zarray", "loss/.zattrs", ".zattrs", ".zmetadata", "checks/.zattrs"]
)
def test_damaged_files_that_all_lanes_need_are_named(whole, tmp_path, name):
    path = tmp_path / "results.zarr"
    shutil.copytree(whole, path)
    (path / name).unlink()
    with pytest.raises(Damaged, match=re.escape(f"must be as it was written, got damaged or missing {name}") + "$"):
        read(path)


@pytest.mark.parametrize("name", [".zmetadata", ".zattrs", "loss/.zarray", "checks/.zattrs"])
@pytest.mark.parametrize("content", ["[" * 10**5, "[]", "null", "\0", '{"metadata": 3}', '{"sha256": {"../../x": ""}}'])
def test_metadata_that_is_anything_is_refused_in_one_line(whole, tmp_path, name, content):
    path = tmp_path / "results.zarr"
    shutil.copytree(whole, path)
    (path / name).write_text(content)
    with pytest.raises(Damaged, match="must be as it was written, got damaged or missing"):
        read(path)


def test_lanes_move_to_a_group_made_anew_only_if_it_says_the_same_of_itself(whole, tmp_path):
    for number, (attrs, kept) in enumerate([({}, 6), ({"run_id": "b"}, 6), ({"t1": 2.0}, 0)]):
        path = tmp_path / str(number)
        create(path, example().assign_attrs(attrs), BOX)
        copy_lanes(whole, path)
        assert np.sum(read(path).dataset["status"] != -1) == kept
    path = tmp_path / "other coordinates"
    create(path, example().assign_coords(seed=[0, 1, 3]), BOX)
    copy_lanes(whole, path)
    assert np.all(read(path).dataset["status"] == -1)


def test_what_is_not_written_yet_reads_as_missing(tmp_path):
    path = tmp_path / "results.zarr"
    create(path, example(), BOX)
    for dataset in (read(path).dataset, xr.open_zarr(path, mask_and_scale=False).load()):
        assert np.all(dataset["status"] == -1)
        assert np.all(dataset["steps"] == -1)
        assert np.all(np.isnan(dataset["loss"]))
        np.testing.assert_array_equal(dataset["seed"], [0, 1, 2])


def test_a_dataset_without_lanes_is_final_as_a_whole(tmp_path):
    path = tmp_path / "results.zarr"
    dataset = example().drop_vars("aligned")
    create(path, dataset)
    xr.testing.assert_identical(read(path).dataset, dataset)
    for name in files(path):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(Damaged):
            read(path)
        (path / name).write_bytes(content)


def test_groups_of_earlier_versions_are_read(tmp_path):
    """Without fill values for what is whole, without checks; a lane that has lost its loss has not run."""
    path = tmp_path / "results.zarr"
    encoding = {name: {"chunks": (*BOX, *one.shape[2:])} for name, one in example().data_vars.items()}
    example().drop_attrs(deep=False).to_zarr(path, encoding=encoding, zarr_format=2, consolidated=True)
    dataset, damaged, notes = read(path)
    xr.testing.assert_equal(dataset, example())
    assert (damaged, notes) == ([], {})
    (path / "loss" / "0.0.0").unlink()
    assert read(path).dataset["status"].values.tolist() == [[-1, 1, 2], [0, 0, 0]]
    (path / "loss" / "0.1.0").write_bytes(b"")
    assert read(path).damaged == ["loss/0.1.0"]

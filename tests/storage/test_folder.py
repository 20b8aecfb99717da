"""Run folders of a kind made up here: what is stored last, what runs again, and whose folders are left alone."""

import numpy as np
import pytest
import xarray as xr

from lora_flow import InputError
from lora_flow.storage.folder import Folder, Kind, Template, read_settings
from lora_flow.storage.lanes import waiting
from lora_flow.storage.resumable import check_same

DONE, LOST = 1, 2


def unchanged(path, template, notes, attrs):
    for then in (notes and notes["asked"], attrs):
        if then is not None:
            check_same(path, then, template.dataset.attrs, ["t1"])


def go_on(path):
    return f"brew on --out {path} --resume"


BREW = Kind(
    "brew", "a brewery's", lambda table: "brew" in table, lambda path: ["label.txt"], go_on, unchanged=unchanged
)


def template(path=None, t1=1.0):
    """Three rows of two cups each, and in `path` a file beside the results for each row."""
    status = ("row", "cup"), np.full((3, 2), -1, np.int8), {"flag_values": [-1, DONE, LOST]}
    values = ("row", "cup", "time"), np.full((3, 2, 4), np.nan)
    dataset = xr.Dataset({"heat": values, "status": status}, {"row": [0, 1, 2], "cup": [0, 1]}, {"t1": t1})
    lost = path and (lambda number: [] if (path / f"{number}.txt").is_file() else [f"{number}.txt"])
    return Template({"brew": {"t1": t1}}, dataset, (1, 2), {"asked": {"t1": t1}}, lost=lost)


def values(number, status=DONE):
    return {"heat": number + np.arange(8.0).reshape(2, 4), "status": np.full(2, status, np.int8)}


def begun(path, *numbers):
    BREW.make(path, {"": template()})
    folder = BREW.resume(path, template())
    for number in numbers:
        folder.write(number, values(number))
    return folder


def stored(path):
    return {one.relative_to(path).as_posix(): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def test_what_is_written_is_read_and_what_is_left_is_pending(tmp_path):
    assert begun(tmp_path).pending() == [0, 1, 2]
    folder = begun(tmp_path, 0)
    folder.write(1, values(1, LOST))
    again = BREW.resume(tmp_path, template())
    assert (folder.pending(), again.pending(), again.damaged) == ([2], [2], [])
    with pytest.raises(InputError, match=r"finished brew, got 4 of 6 lanes; finish it with: brew on --out .* --resume"):
        BREW.load(tmp_path)
    assert BREW.load(tmp_path, partial=True)["status"].values.tolist() == [[1, 1], [2, 2], [-1, -1]]
    again.write(2, values(2))
    dataset = BREW.load(tmp_path)
    np.testing.assert_array_equal(dataset["heat"][2], values(2)["heat"])
    assert dataset.attrs == {"t1": 1.0}
    assert read_settings(tmp_path) == {"brew": {"t1": 1.0}}


def test_status_is_written_last_and_no_chunk_of_other_lanes(tmp_path, monkeypatch):
    folder = begun(tmp_path, 0)
    before = stored(tmp_path)
    for step in range(4):  # before all, before the values, before the checksums, before the status
        ways = iter([*[None] * step, KeyboardInterrupt])
        monkeypatch.setattr(Folder, "check_in_place", lambda folder, ways=ways: _stop(next(ways)))
        with pytest.raises(KeyboardInterrupt):
            folder.write(2, values(2))
        assert BREW.load(tmp_path, partial=True)["status"].values.tolist() == [[1, 1], [-1, -1], [-1, -1]]
    monkeypatch.undo()
    folder.write(2, values(2))
    changed = [name for name, content in stored(tmp_path).items() if before.get(name) != content]
    assert sorted(changed) == [f"results.zarr/{name}" for name in ("checks/lanes/2.0", "heat/2.0.0", "status/2.0")]


def _stop(error):
    if error:
        raise error


@pytest.mark.parametrize("meanings", [[-1, DONE, LOST], None])
def test_a_lane_waits_whose_status_means_nothing(meanings):
    status = xr.DataArray([-1, 0, 1, 2], attrs={} if meanings is None else {"flag_values": meanings})
    assert waiting(status).tolist() == [True, meanings is not None, False, False]


def test_a_box_whose_file_is_lost_runs_again(tmp_path):
    begun(tmp_path, 0, 1)
    (tmp_path / "0.txt").write_text("whole")
    folder = BREW.resume(tmp_path, template(tmp_path))
    assert (folder.pending(), folder.damaged) == ([1, 2], ["1.txt"])


@pytest.mark.parametrize("lost", ["", ".zattrs", "checks/.zattrs", "row/0"])
def test_a_run_goes_on_only_as_it_was_started_whatever_is_damaged(tmp_path, lost):
    begun(tmp_path, 0, 1)
    before = BREW.load(tmp_path, partial=True)
    if lost:
        (tmp_path / "results.zarr" / lost).unlink()
    damaged = stored(tmp_path)
    with pytest.raises(InputError, match=rf"t1 must be 1.0, as '{tmp_path}' was started, to resume it, got 2.0"):
        BREW.resume(tmp_path, template(t1=2.0))
    assert stored(tmp_path) == damaged
    folder = BREW.resume(tmp_path, template())
    assert (folder.damaged, folder.pending()) == ([lost] if lost else [], [2])
    xr.testing.assert_identical(BREW.load(tmp_path, partial=True), before)


def test_other_axes_are_other_runs(tmp_path):
    begun(tmp_path)
    other = template()
    other = other._replace(dataset=other.dataset.assign_coords(cup=[0, 7]))
    with pytest.raises(InputError, match=r"cup must be \(0, 1\), as '.*' was started, to resume it, got \(0, 7\)"):
        BREW.resume(tmp_path, other)


def test_only_runs_of_the_kind_are_replaced_with_what_they_made(tmp_path):
    out = tmp_path / "run"
    BREW.check_free(out, overwrite=False)
    out.mkdir()
    (out / "results.zarr.bak").mkdir()  # set aside by a person
    BREW.check_free(out, overwrite=False)
    (out / "settings.toml").write_text("t1 = 1.0")
    for overwrite in (False, True):
        with pytest.raises(
            InputError, match=r"out must be a new folder or a brewery's, got '.*', which holds something"
        ):
            BREW.check_free(out, overwrite)
    (out / "settings.toml").unlink()
    begun(out, 0)
    with pytest.raises(InputError, match=r"be new \(--overwrite replaces it, --resume continues it\), got the brew '"):
        BREW.check_free(out, overwrite=False)
    BREW.check_free(out, overwrite=True)
    for name in ("label.txt", "diary.txt"):
        (out / name).write_text("mine")
    assert begun(out).pending() == [0, 1, 2]
    assert sorted(one.name for one in out.iterdir()) == [
        "diary.txt",
        "results.zarr",
        "results.zarr.bak",
        "settings.toml",
    ]


def test_a_run_without_lanes_is_whole_or_not_there(tmp_path):
    whole = Kind("book", "a library's", lambda table: "book" in table, lambda path: [])
    dataset = xr.Dataset({"x": ("seed", [1.0, 2.0])}, {"seed": [0, 1]})
    with pytest.raises(InputError, match=r"must hold results.zarr, got an unfinished book; --overwrite runs it again"):
        whole.load(tmp_path)
    whole.make(tmp_path, {"": Template({"book": 1}, dataset)})
    xr.testing.assert_identical(whole.load(tmp_path), dataset)
    with pytest.raises(InputError, match=r"out must be new \(--overwrite replaces it\), got the book"):
        whole.check_free(tmp_path, overwrite=False)


@pytest.mark.parametrize("content", ['{"run_id": "b"}', "{}", "[]", "", "\0", None])
def test_a_run_that_was_replaced_is_noticed(tmp_path, content):
    folder = begun(tmp_path, 0)
    (tmp_path / "results.zarr" / ".zattrs").unlink()
    if content is not None:
        (tmp_path / "results.zarr" / ".zattrs").write_text(content)
    before = stored(tmp_path)
    with pytest.raises(InputError, match="must stay in place while its run is solved, got another run's, or none"):
        folder.write(2, values(2))
    assert stored(tmp_path) == before

"""Runs that grow, of a kind made up here: the old values, or the new run with all of them, whatever happens."""

import errno
import itertools
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from entries import told_by, touching

from lora_flow import InputError
from lora_flow.storage import checksums
from lora_flow.storage.folder import Kind, Template
from lora_flow.storage.growing import grow
from lora_flow.storage.lanes import NOT_RUN, Boxes
from lora_flow.storage.locks import locked

BREW = Kind("brew", "a brewery's", lambda table: "brew" in table, lambda path: ["label.txt"], str)
OLD, NEW = (2, 3), (3, 7)


def template(rows, cups):
    """Cups in boxes of two: the last of a row of three has one."""
    status = ("row", "cup"), np.full((rows, cups), -1, np.int8), {"flag_values": [-1, 0, 1]}
    values = ("row", "cup", "time"), np.full((rows, cups, 4), np.nan)
    told = xr.Dataset({"heat": values, "status": status}, {"row": [*"abc"[:rows]], "cup": range(cups)}, {"cups": cups})
    return Template({"brew": {"cups": cups}}, told, (1, 2))


def fill(path, size, salt=0.0, boxes=None):
    """Writes the boxes that wait: a value of its own for every row, cup and time, and the salt added to it."""
    folder = BREW.resume(path, template(*size))
    for number in folder.pending() if boxes is None else boxes:
        at = np.stack(np.unravel_index(Boxes(size, (1, 2)).lanes(number), size), axis=1)
        heat = salt + at @ [100.0, 10.0] + np.arange(4.0)[:, None]
        folder.write(number, {"heat": heat.T, "status": np.zeros(len(at), np.int8)})
    return folder


def begun(path, size=OLD, boxes=None):
    path.mkdir()
    BREW.make(path, {"": template(*size)})
    fill(path, size, boxes=boxes)
    (path / "label.txt").write_text("three cups")
    return path


def larger(path):
    with locked(path):
        grow(BREW.resume(path, template(*OLD)), template(*NEW), ["label.txt"])


def stored(path):
    return {one.relative_to(path).as_posix(): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def state(path):
    """The size of a run of which every value is whole, and the values are those of `begun`."""
    dataset = BREW.load(path, partial=True)
    old = dataset.isel(row=slice(2), cup=slice(3))
    wanted = np.arange(2)[:, None, None] * 100.0 + np.arange(3)[:, None] * 10.0 + np.arange(4.0)
    np.testing.assert_array_equal(old["heat"], wanted)
    assert (old["status"] == 0).all()
    assert int((dataset["status"] == 0).sum()) == 6
    assert (path / "label.txt").exists() == (dataset["status"].shape == OLD)
    return dataset["status"].shape


@pytest.fixture
def path(tmp_path):
    return begun(tmp_path / "run")


def test_sums_are_carried_over_to_another_description_without_their_values():
    rows = {"x": np.random.default_rng(0).normal(size=(5, 9)), "status": np.arange(5, dtype=np.int8)}
    before, after = (checksums.lane_sums(begin, rows) for begin in (1, 2**32 - 7))
    np.testing.assert_array_equal(checksums.carried_over(before, 9 * 8 + 1, 1, 2**32 - 7), after)


def test_what_is_stored_stays_to_the_bit_and_the_rest_waits(path, tmp_path):
    larger(path)
    assert state(path) == NEW
    assert BREW.load(path, partial=True).attrs == {"cups": 7}
    read = xr.open_zarr(path / "results.zarr", mask_and_scale=False)
    assert (read["status"] == NOT_RUN).sum() == 15
    assert np.isnan(read["heat"].where(read["status"] == NOT_RUN)).all()
    fill(path, NEW, salt=0.5)
    begun(tmp_path / "alone", NEW)
    dataset, alone = BREW.load(path), BREW.load(tmp_path / "alone")
    np.testing.assert_array_equal(dataset["heat"][:2, :3], alone["heat"][:2, :3])  # one shared its box with a new one
    salt = (dataset["heat"] - alone["heat"]).values
    salt[:2, :3] += 0.5
    assert (salt == 0.5).all()


def test_a_run_grows_again_and_is_as_one_that_was_made_large(path, tmp_path):
    sizes = [OLD, (2, 4), (3, 4), NEW]
    for then, now in itertools.pairwise(sizes):
        with locked(path):
            grow(BREW.resume(path, template(*then)), template(*now), [])
        fill(path, now)
    xr.testing.assert_identical(BREW.load(path), BREW.load(begun(tmp_path / "alone", NEW)))


def test_chunks_are_shared_where_files_may_have_two_names(path, monkeypatch):
    chunk = path / "results.zarr/heat/0.0.0"
    before = chunk.stat()
    larger(path)
    assert (chunk.stat().st_ino, chunk.stat().st_nlink) == (before.st_ino, 1)
    fill(path, NEW)

    link = os.link

    def refused(one, other):
        if one.name[0].isdigit():
            raise OSError(errno.EPERM, "no second names for chunks")
        link(one, other)

    shutil.rmtree(path)
    begun(path)
    inode = chunk.stat().st_ino
    monkeypatch.setattr(os, "link", refused)
    larger(path)
    assert chunk.stat().st_ino != inode
    assert state(path) == NEW


def test_a_lane_that_is_damaged_while_its_run_grows_is_found_afterwards(path, tmp_path):
    folder = BREW.resume(path, template(*OLD))
    chunk = path / "results.zarr/heat/0.0.0"
    chunk.write_bytes((path / "results.zarr/heat/1.0.0").read_bytes())
    with locked(path):
        grow(folder, template(*NEW), [])
    with pytest.raises(InputError, match="got 4 of 21 lanes, damaged or missing the values of 2 lanes"):
        BREW.load(path, partial=True)
    fill(path, NEW)
    xr.testing.assert_identical(BREW.load(path), BREW.load(begun(tmp_path / "alone", NEW)))


def test_lanes_that_had_not_run_wait_in_the_larger_run(tmp_path):
    path = begun(tmp_path / "run", boxes=[1])
    larger(path)
    assert np.argwhere(BREW.load(path, partial=True)["status"].values == 0).tolist() == [[0, 2]]
    fill(path, NEW)
    assert BREW.load(path)["status"].shape == NEW


@pytest.mark.parametrize("for_good", [False, True])
def test_a_disk_that_is_full_at_any_step_leaves_the_old_or_the_new(tmp_path, for_good):
    path, states = tmp_path / "run", []
    whole = stored(begun(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "count")
    calls = itertools.count()
    with touching(lambda: next(calls)):
        larger(tmp_path / "count")
    total = next(calls)
    assert total > 100
    for step in [*np.linspace(0, total - 15, 7).astype(int), *range(total - 14, total)]:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", path)
        calls = itertools.count()

        def full(calls=calls, step=step):
            number = next(calls)
            if number == step or (for_good and number > step):
                raise OSError(errno.ENOSPC, "No space left on device")

        with touching(full), suppress(OSError):
            larger(path)
        states.append(state(path))
        with locked(path):
            pass
        assert states[-1] == NEW or stored(path) == whole
    assert states == sorted(states)
    assert set(states[-14:]) == {OLD, NEW}


def test_killed_at_any_step_it_leaves_the_old_or_the_new(tmp_path):
    """A process for each step, which the kernel ends there; without JAX, whose threads do not survive a fork."""
    script = f"""
        import itertools, os, shutil, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from entries import touching
        from test_growing import begun, larger, locked, state
        whole, seen = begun(Path({str(tmp_path)!r}, "whole")), []
        for step in itertools.count(0, 17):
            path = Path({str(tmp_path)!r}, str(step))
            shutil.copytree(whole, path)
            child = os.fork()
            if not child:
                calls = itertools.count()
                with touching(lambda: next(calls) == step and os.kill(os.getpid(), signal.SIGKILL)):
                    larger(path)
                os._exit(0)
            killed = os.waitpid(child, 0)[1] == signal.SIGKILL
            seen.append((killed, state(path)))
            with locked(path):
                pass
            assert sorted(one.name for one in path.iterdir() if one.name != "label.txt") == [
                "results.zarr", "settings.toml"
            ]
            if not killed:
                break
        print(seen)
    """
    states = [size for _, size in told_by(script)]
    assert len(states) > 8
    assert states == sorted(states)
    assert set(states) == {OLD, NEW}

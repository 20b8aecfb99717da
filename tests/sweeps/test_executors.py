"""Whoever solves the boxes, the results have the same bits."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from lora_flow import InputError, load_run
from lora_flow.settings import Settings, build_plan, to_table
from lora_flow.storage.locks import InUse, locked
from lora_flow.sweeps.executors import Part
from lora_flow.sweeps.run import open_runs, run, share_run

ASKED = Settings(m=4, n=5, h=6, alpha=(1e-1, 1e-2), rank=(1,), seeds=7, t1=0.5, saves=3, batch_size=2)


@given(st.integers(1, 9), st.integers(0, 40))
def test_every_part_takes_every_box_its_own_first(parts, count):
    orders = [Part(part, parts).order(range(count)) for part in range(parts)]
    for part, order in enumerate(orders):
        assert sorted(order) == list(range(count))
        own = [number for number in range(count) if number % parts == part]
        assert order[: len(own)] == own


@pytest.fixture(scope="module")
def plan():
    return build_plan(ASKED)


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    with open_runs(out, {"": (to_table(ASKED), plan)}) as folders:
        run(folders[""], plan, progress=False)
    return load_run(out)


def test_parts_in_one_folder_leave_out_what_is_stored(plan, whole, tmp_path):
    """Two at once, in turns: one has solved a box when the other one begins."""
    asked, solved = (to_table(ASKED), plan), {0: [], 1: []}
    with share_run(tmp_path / "run", asked) as one, share_run(tmp_path / "run", asked) as other:
        first = Part(0, 2).solve(plan, one, one.pending())
        for number, values in (next(first), *Part(1, 2).solve(plan, other, other.pending()), *first):
            solved[0 if values is None else 1].append(number)
    every = list(range(plan.layout.boxes.count))
    assert len(every) >= 6
    assert sorted(set(solved[1])) == every  # what the first has in hand while the other ends is solved twice
    assert len(solved[1]) <= len(every) + 1
    xr.testing.assert_identical(load_run(tmp_path / "run"), whole)


def test_the_number_of_devices_changes_no_bit(whole, tmp_path):
    asked = Settings(**{**vars(ASKED), "devices": 1})
    alone = build_plan(asked)
    with open_runs(tmp_path / "run", {"": (to_table(asked), alone)}) as folders:
        run(folders[""], alone, progress=False)
    one = load_run(tmp_path / "run")
    assert one.attrs["devices"] == 1
    xr.testing.assert_equal(one, whole)


def test_parts_and_whole_runs_refuse_each_other(plan, tmp_path):
    asked = to_table(ASKED), plan
    with share_run(tmp_path / "run", asked) as folder:
        assert folder.pending()
        with (
            pytest.raises(InUse, match=r"must be written by one process at a time, got one that process .* has"),
            open_runs(tmp_path / "run", {"": asked}, resume=True),
        ):
            pass
    with locked(tmp_path / "run"), pytest.raises(InUse), share_run(tmp_path / "run", asked):
        pass
    other = Settings(**{**vars(ASKED), "t1": 0.6})
    message = "t1 must be 0.5, as '.*' was started, to resume it, got 0.6"
    with pytest.raises(InputError, match=message), share_run(tmp_path / "run", (to_table(other), build_plan(other))):
        pass


def test_the_last_of_several_parts_takes_the_lock_with_it(plan, tmp_path):
    asked, lock = (to_table(ASKED), plan), Path(tmp_path / "run" / ".lora-flow.lock")
    with share_run(tmp_path / "run", asked):
        with share_run(tmp_path / "run", asked):
            assert lock.exists()
        assert lock.exists()
    assert not lock.exists()


def test_a_damaged_box_is_mended_by_whoever_finds_nobody_there(plan, whole, tmp_path):
    asked = to_table(ASKED), plan
    with share_run(tmp_path / "run", asked) as folder:
        run(folder, plan, Part(0, 1), progress=False)
    (tmp_path / "run/results.zarr/loss/0.0.0.0.0").write_bytes(b"")
    with share_run(tmp_path / "run", asked) as folder:
        assert folder.pending() == [0]
        run(folder, plan, Part(2, 3), progress=False)
    xr.testing.assert_identical(load_run(tmp_path / "run"), whole)
    assert np.all(whole["status"] == 0)

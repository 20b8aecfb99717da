"""Sweeps that get further values along their axes; the values are made up, a different one for every number."""

import dataclasses
import shutil
import zlib

import numpy as np
import pytest
import xarray as xr

from lora_flow import InputError, load_run
from lora_flow.growth import growing
from lora_flow.settings import Settings, build_plan, to_table
from lora_flow.sweeps.folder import stored_layout
from lora_flow.sweeps.run import open_runs

ASKED = Settings(
    m=4, n=5, h=6, alpha=(1e-1, 1e-2), rank=(2,), seeds=3, t1=0.5, saves=3, batch_size=2, devices=1, side=("B",)
)


def made_up(plan, box, salt=0):
    """Values that depend on the coordinates of a lane alone, and on the salt."""
    values, empty = {}, plan.outline()
    lanes = [plan.grid.lane(number) for number in plan.layout.boxes.lanes(box)]
    keys = [zlib.crc32(repr(sorted(lane.items())).encode()) for lane in lanes]
    for number, (name, one) in enumerate(sorted(empty.data_vars.items())):
        rest = one.shape[empty["status"].ndim :]
        drawn = np.asarray([np.random.default_rng([number, key, salt]).uniform(1, 99, rest) for key in keys])
        values[name] = np.zeros(len(lanes), np.int8) if name == "status" else drawn.astype(one.dtype)
    return values


def write(folder, plan, boxes, salt=0):
    for box in boxes:
        folder.write(box, made_up(plan, box, salt))


def resume(out, settings, salt=0, layout=None):
    plan = build_plan(settings, layout or (stored_layout(out) if out.exists() else None))
    with open_runs(out, {"": (to_table(settings), plan)}, resume=True) as folders:
        damaged, pending = folders[""].damaged, folders[""].pending()
        write(folders[""], plan, pending, salt)
    return damaged, pending


def extend(out, then, now, salt=0):
    with growing(out, then, now) as (folder, plan):
        pending = folder.pending()
        write(folder, plan, pending, salt)
    return plan, pending


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    resume(out, ASKED)
    (out / "report.md").write_text("old")
    return out


@pytest.fixture
def out(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


GROWN = {
    "seeds": {"seeds": 8},
    "seeds that were named": {"seeds": (0, 1, 2, 7, 5)},
    "alpha": {"alpha": (1e-1, 1e-2, 1e-3)},
    "rank": {"rank": (2, 1, 4)},
    "init": {"init": ("gaussian", "spectral", "pissa")},
    "two": {"alpha": (1e-1, 1e-2, 1e-3), "seeds": 4},
    "all": {"alpha": (1e-1, 1e-2, 1e-3), "seeds": 5, "rank": (2, 3), "init": ("gaussian", "spectral")},
}


@pytest.mark.parametrize("axes", GROWN.values(), ids=GROWN)
def test_a_run_that_grew_is_the_larger_run_and_keeps_what_it_had(out, tmp_path, axes):
    old, now = load_run(out), dataclasses.replace(ASKED, **axes)
    plan, _ = extend(out, ASKED, now, salt=1)
    resume(tmp_path / "alone", now, salt=1, layout=plan.noted_layout)
    dataset, alone = load_run(out), load_run(tmp_path / "alone")
    held = {dim: old[dim] for dim in old["status"].dims}
    xr.testing.assert_identical(dataset.sel(held).drop_attrs(deep=False), old.drop_attrs(deep=False))
    assert dataset.attrs == alone.attrs
    for name in alone.variables:
        one = alone[name].copy()
        if name in old.data_vars:
            one.loc[held] = old[name]
        xr.testing.assert_identical(dataset[name], one)
    assert (out / "settings.toml").read_text() == (tmp_path / "alone" / "settings.toml").read_text()
    assert not (out / "report.md").exists()


def test_boxes_that_are_full_are_not_solved_again(out):
    plan, pending = extend(out, ASKED, dataclasses.replace(ASKED, seeds=9))
    boxes = plan.layout.boxes
    assert boxes.box == (1, 1, 1, 1, 3)
    assert [boxes.block(number)[-1].start for number in pending] == [3, 6] * 2


def test_a_run_that_grew_is_resumed_in_its_own_boxes(out):
    """Those of a run that were chosen anew would be others."""
    now = dataclasses.replace(ASKED, seeds=40)
    with growing(out, ASKED, now) as (folder, plan):
        write(folder, plan, folder.pending()[:7])
        left = folder.pending()
    assert build_plan(now).noted_layout != plan.noted_layout
    assert resume(out, now) == ([], left)
    (out / "results.zarr/checks/.zattrs").unlink()  # the layout is noted twice
    assert resume(out, now) == (["checks/.zattrs"], [])
    assert load_run(out).sizes["seed"] == 40


def test_what_is_damaged_is_mended_and_what_is_unfinished_finished(out, tmp_path):
    now = dataclasses.replace(ASKED, seeds=5)
    (out / "results.zarr/loss/0.0.0.0.0").write_bytes(b"")
    (out / "results.zarr/seed/0").unlink()
    with growing(out, ASKED, now) as (folder, plan):
        assert folder.damaged == ["seed/0", "loss/0.0.0.0.0"]
        write(folder, plan, folder.pending())
    resume(tmp_path / "alone", now, layout=plan.noted_layout)
    xr.testing.assert_identical(load_run(out), load_run(tmp_path / "alone"))


def test_a_run_grows_step_by_step(out, tmp_path):
    then = ASKED
    for axes in ({"seeds": 4}, {"init": ("gaussian", "spectral")}, {"alpha": (1e-1, 1e-2, 1.0)}, {"seeds": 7}):
        now = dataclasses.replace(then, **axes)
        plan, _ = extend(out, then, now)
        then = now
    resume(tmp_path / "alone", then, layout=plan.noted_layout)
    xr.testing.assert_identical(load_run(out), load_run(tmp_path / "alone"))


def test_without_further_values_nothing_is_replaced(out):
    inode = (out / "results.zarr").stat().st_ino
    _, pending = extend(out, ASKED, ASKED)
    assert (pending, (out / "results.zarr").stat().st_ino) == ([], inode)
    assert (out / "report.md").exists()


def test_a_run_of_a_problem_of_ones_own_grows_with_that_problem(tmp_path):
    problem = build_plan(dataclasses.replace(ASKED, problem_seed=(5,))).problems.members[0]
    plan, out = build_plan(ASKED, problem=problem), tmp_path / "run"
    with open_runs(out, {"": (to_table(ASKED), plan)}) as folders:
        write(folders[""], plan, folders[""].pending())
    now = dataclasses.replace(ASKED, seeds=4)
    with pytest.raises(InputError, match="problem must be the one that"), growing(out, ASKED, now):
        pass
    with growing(out, ASKED, now, problem) as (folder, plan):
        write(folder, plan, folder.pending())
    assert load_run(out).sizes["seed"] == 4


@pytest.mark.parametrize(
    ("then", "axes", "attrs", "told"),
    [
        ({"details": True, "rank": (1,)}, {"rank": (1, 2)}, {}, "rank must be at most 1, to extend a run with details"),
        ({}, {"rank": (2, 5)}, {}, "rank must "),
        ({}, {"init": ("gaussian", "hot")}, {}, "init must be"),
        (
            {},
            {"seeds": 4},
            {"figure": "3"},
            "out must be a run of `lora-flow sweep`, to extend it, got one of figure 3",
        ),
    ],
)
def test_what_is_refused_changes_nothing(tmp_path, then, axes, attrs, told):
    out, then = tmp_path / "run", dataclasses.replace(ASKED, **then)
    plan = build_plan(then)
    with open_runs(out, {"": (to_table(then), plan)}, attrs=attrs) as folders:
        write(folders[""], plan, folders[""].pending())
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=told), growing(out, then, dataclasses.replace(then, **axes)):
        pass
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

"""Runs that are not finished: what `status` says of them, and what can be read and drawn."""

import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import zarr

from lora_flow import InputError, load_run
from lora_flow.cli import main
from lora_flow.cli.status_text import status
from lora_flow.cli.sweep import plan_run
from lora_flow.settings import Settings, build_plan, to_table
from lora_flow.storage import checksums
from lora_flow.storage.disk import used
from lora_flow.storage.lanes import NOT_RUN
from lora_flow.storage.locks import holder, locked
from lora_flow.storage.swap import LOCK
from lora_flow.sweeps.run import open_runs

ASKED = Settings(m=4, n=5, h=6, alpha=(1e-1, 1e-2), rank=(1,), seeds=4, t1=0.5, saves=3, batch_size=2, devices=1)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """Three of four boxes."""
    out = tmp_path_factory.mktemp("unfinished") / "run"
    plan = build_plan(ASKED)
    with open_runs(out, {"": (to_table(ASKED), plan)}) as folders:
        for number, values in plan.solve([0, 1, 2]):
            folders[""].write(number, values)
    return out


def test_status_counts_lanes_and_says_how_to_go_on(unfinished, capsys):
    assert main(["status", str(unfinished)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{unfinished}: 6 of 8 lanes done (3 of 4 boxes); ended: 6 success"
    assert lines[1].startswith("last written ")
    assert " ago (" in lines[1]
    assert lines[2] == "no process is at work in it"
    assert lines[3] == f"not finished; continue with: lora-flow sweep --out {unfinished} --resume"
    assert len(lines) == 4


@pytest.mark.parametrize("name", ["loss", "status"])
def test_lanes_whose_values_are_damaged_are_not_done(unfinished, tmp_path, name):
    copied = tmp_path / "run"
    shutil.copytree(unfinished, copied)
    chunk = next(file for file in sorted((copied / f"results.zarr/{name}").iterdir()) if file.name[0].isdigit())
    whole = [lanes_done(line) for line in status(copied).splitlines()[:1]]
    chunk.write_bytes(b"damaged")
    told = status(copied).splitlines()
    assert lanes_done(told[0]) < whole[0] == 6
    assert told[0].endswith(f"; damaged or missing {name}/{chunk.name}")
    assert told[-1] == f"not finished; continue with: lora-flow sweep --out {copied} --resume"


def test_boxes_are_counted_by_their_lanes(tmp_path):
    """One lane of each of two boxes is lost, which is as many as one box has."""
    plan, out = build_plan(ASKED), tmp_path / "run"
    with open_runs(out, {"": (to_table(ASKED), plan)}) as folders:
        for number, values in plan.solve():
            folders[""].write(number, values)
    status_of = zarr.open_array(out / "results.zarr" / "status")
    lost, boxes = status_of[...], plan.layout.boxes
    lost.reshape(-1)[[boxes.lanes(0)[0], boxes.lanes(2)[1]]] = NOT_RUN
    status_of[...] = lost
    assert status(out).startswith(f"{out}: 6 of 8 lanes done (2 of 4 boxes); ended: 6 success")


def lanes_done(line):
    return int(line.split(": ")[1].split()[0])


def test_a_folder_whose_coordinates_are_damaged_is_said_to_be(unfinished, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(unfinished, copied)
    (copied / "results.zarr/alpha/0").unlink()
    told = status(copied).splitlines()
    assert told[0] == f"{copied}: damaged or missing alpha/0"
    assert told[-1] == f"not finished; continue with: lora-flow sweep --out {copied} --resume"


def test_status_tells_the_age_of_the_last_write(unfinished, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(unfinished, copied)
    for file in copied.rglob("*"):
        os.utime(file, (time.time() - 3700, time.time() - 3700))
    assert "last written 1 h 1 min ago" in status(copied)


def test_status_names_the_process_that_is_at_work(unfinished):
    code = (
        "import sys; from lora_flow.storage.locks import locked\n"
        f"with locked({str(unfinished)!r}): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        told = status(unfinished)
        assert f"process {other.pid} on " in told
        assert "is at work in" in told
        assert "--resume" not in told
        with pytest.raises(InputError, match="one process at a time"), locked(unfinished):
            pass  # still held: to ask has not taken it
        other.stdin.close()
    assert holder(unfinished) == ""
    assert "no process is at work in it" in status(unfinished)


def test_a_run_goes_on_with_room_for_what_is_not_stored(unfinished, tmp_path, monkeypatch):
    """Where a new one has not, which needs room for all of it."""
    needed = used(unfinished)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20 + needed / 2))
    monkeypatch.setattr("lora_flow.sizes.LANE", needed / 8)
    plan_run(unfinished, ASKED, resume=True, overwrite=False)
    with pytest.raises(InputError, match="out must have room for"):
        plan_run(tmp_path / "run", ASKED, resume=False, overwrite=False)


def test_status_tells_the_pace_of_those_at_work_and_the_time_left(unfinished, tmp_path):
    """A box of 2 lanes every 100 s; not one that was stored before, a day earlier."""
    copied = tmp_path / "run"
    shutil.copytree(unfinished, copied)
    boxes = checksums.boxes_of(copied / "results.zarr")
    now = time.time()
    with locked(copied):
        for number, ago in enumerate((86_400, 200, 100)):
            chunk = copied / "results.zarr/status" / ".".join(map(str, boxes.place(number)))
            os.utime(chunk, (now - ago, now - ago))
        os.utime(copied / LOCK, (now - 300, now - 300))
        assert status(copied).splitlines()[0].endswith("; ended: 6 success; 0.02 lanes/s, 1 min 40 s left")
        os.utime(copied / LOCK, (now - 150, now - 150))
        assert status(copied).splitlines()[0].endswith("; ended: 6 success")


def test_status_of_finished_runs_figures_and_other_folders(unfinished, tmp_path):
    with pytest.raises(InputError, match="must be a run folder"):
        status(tmp_path)
    with pytest.raises(InputError, match="must exist"):
        status(tmp_path / "missing")
    (tmp_path / "study").mkdir()
    (tmp_path / "study/settings.toml").write_text('study = "scaling"\nseeds = 2\n')
    told = status(tmp_path / "study")
    assert "figure scaling, not finished" in told
    assert f"continue with: lora-flow figure scaling --out {tmp_path / 'study'} --overwrite" in told
    (tmp_path / "bare").mkdir()
    shutil.copy(unfinished / "settings.toml", tmp_path / "bare")
    assert "nothing stored yet" in status(tmp_path / "bare")
    assert "continue with: lora-flow sweep" in status(tmp_path / "bare")


def test_a_figure_of_several_runs_has_a_line_for_each(tmp_path):
    plan = build_plan(ASKED)
    for name, boxes in (("delta_w-0.01", [0, 1, 2, 3]), ("delta_w-0.25", [0])):
        with open_runs(tmp_path / name, {"": (to_table(ASKED), plan)}, attrs={"figure": "3"}) as folders:
            for number, values in plan.solve(boxes):
                folders[""].write(number, values)
    lines = status(tmp_path).splitlines()
    assert [line.split(": ")[1] for line in lines[:2]] == [
        "8 of 8 lanes done (4 of 4 boxes); ended",
        "2 of 8 lanes done (1 of 4 boxes); ended",
    ]
    assert lines[2] == f"{tmp_path / 'delta_w-0.907'}: nothing stored yet"
    assert lines[-1] == f"not finished; continue with: lora-flow figure 3 --out {tmp_path} --resume"


def test_a_partial_run_is_nan_where_nothing_has_run(unfinished):
    with pytest.raises(InputError, match=r"must hold a finished run, got 6 of 8 lanes; finish it with"):
        load_run(unfinished)
    dataset = load_run(unfinished, partial=True)
    waits = dataset["status"] == NOT_RUN
    assert int(waits.sum()) == 2
    for name, values in dataset.data_vars.items():
        if values.dtype.kind == "f" and name != "loss_floor":  # which two layers do not have
            np.testing.assert_array_equal(values.isnull().any(set(values.dims) - set(waits.dims)), waits, err_msg=name)


def test_vision_units_are_counted(tmp_path):
    vision = pytest.importorskip("lora_flow_vision.results")
    from lora_flow_vision.settings import VisionSettings

    settings = VisionSettings(optimizer=("flow",), init=("gaussian-A",), seeds=2, steps=10)
    with locked(tmp_path / "run"):
        folder = vision.VisionFolder.create(tmp_path / "run", settings, {"train_loss": "loss"}, {})
    lanes = 2 * len(settings.alphas) * len(settings.rank)
    told = status(tmp_path / "run")
    assert f"0 of {lanes} lanes done (0 of {len(vision.units(settings))} units); ended: none" in told
    assert f"continue with: lora-flow vision --out {tmp_path / 'run'} --resume" in told
    unit = vision.units(settings)[0]
    trained = lanes * len(unit.seeds) // 2 // len(settings.rank)
    losses = np.ones((len(settings.alphas), len(unit.seeds), len(vision.saved_steps(settings.steps))))
    folder.write(unit, {"train_loss": losses}, {})
    assert f"{trained} of {lanes} lanes done (1 of {len(vision.units(settings))} units)" in status(tmp_path / "run")
    (tmp_path / "run/results.zarr/train_loss/0.0.0.0.0.0").write_bytes(b"damaged")
    told = status(tmp_path / "run").splitlines()[0]
    assert lanes_done(told) < trained
    assert told.endswith("; damaged or missing train_loss/0.0.0.0.0.0")

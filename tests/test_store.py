"""Run folders: what is stored, and what survives kill -9, a full disk and other people's files."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import xarray as xr
import zarr

from lora_flow import InputError, load_run
from lora_flow.cli import main

FLAGS = ["--alpha", "1e-2", "1e-4", "--rank", "2", "--seeds", "50", "--side", "B", "--batch-size", "2"]
FLAGS += ["--m", "5", "--n", "4", "--h", "6", "--t1", "3", "--saves", "11"]
LANES = 100


def start(out, *flags):
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from lora_flow.cli import main; raise SystemExit(main())",
            "sweep",
            "--out",
            str(out),
            *flags,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process):
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()


def solved(out):
    """How many lanes a run folder, perhaps in use, says are done."""
    try:
        return int((zarr.open_array(out / "results.zarr" / "status", mode="r")[:] >= 0).sum())
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    began = time.monotonic()
    finish(start(out, *FLAGS))
    return out, time.monotonic() - began


def stored_bytes(out):
    """Every stored array byte for byte, through xarray's own reader."""
    dataset = xr.open_zarr(out / "results.zarr").load()
    return {name: dataset[name].values.tobytes() for name in dataset.variables}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.long)])
def test_killed_at_random_moments_and_resumed_is_bit_identical(unbroken, tmp_path, kills):
    whole, duration = unbroken
    out = tmp_path / "run"
    moments = random.Random(2026)
    mid_run = 0
    for kill in range(kills):
        resuming = (out / "settings.toml").exists()
        before = solved(out)
        process = start(out, *(["--resume"] if resuming else FLAGS))
        if kill % 2:  # at any moment of the process, while it starts included
            time.sleep(moments.uniform(0, 0.7) * duration)
        else:  # among the batches
            target = before + moments.randint(1, 12)
            while solved(out) < target and process.poll() is None:
                time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        mid_run += before < solved(out) < LANES
        if solved(out) == LANES:  # start over, so that there is something to kill
            shutil.rmtree(out)
    assert mid_run >= 0.4 * kills, "too few kills fell among the batches"
    finish(start(out, *(["--resume"] if (out / "settings.toml").exists() else FLAGS)))
    assert stored_bytes(out) == stored_bytes(whole)
    assert not [path for path in out.rglob("*.partial") if path.parent == out]


def test_a_batch_without_its_status_is_solved_again(unbroken, tmp_path):
    """The marker is what counts: values without it are replaced, finished batches are not touched."""
    whole, _ = unbroken
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    dataset = xr.open_zarr(out / "results.zarr").load()
    dataset["status"].values[0, 1, 0, :2] = -1
    dataset["loss"].values[0, 1, 0, :2] = 123.0
    dataset["loss"].values[0, 0, 0, 0] = 456.0  # done, so not solved again
    for name in ("status", "loss"):
        dataset[name].encoding.clear()
    dataset[["status", "loss"]].drop_vars(list(dataset.coords)).to_zarr(out / "results.zarr", mode="r+")
    with pytest.raises(
        InputError, match="must hold a finished run, got 98 of 100 lanes; finish it with: lora-flow sweep"
    ):
        load_run(out)
    assert main(["sweep", "--out", str(out), "--resume"]) == 0
    resumed, original = load_run(out), load_run(whole)
    np.testing.assert_array_equal(resumed["loss"].values[0, 1], original["loss"].values[0, 1])
    assert np.all(resumed["loss"].values[0, 0, 0, 0] == 456.0)


def test_a_run_folder_is_what_it_says(unbroken):
    out, _ = unbroken
    assert sorted(path.name for path in out.iterdir()) == ["figures", "report.md", "results.zarr", "settings.toml"]
    dataset = load_run(out)
    assert dataset["loss"].dims == ("init", "alpha", "rank", "seed", "time")
    assert dataset.sizes == {"init": 1, "alpha": 2, "rank": 1, "seed": 50, "time": 11}
    assert np.all(dataset["status"] == 0)
    assert dataset.attrs["side"] == "B"
    assert (dataset.attrs["problem"], dataset.attrs["m"], dataset.attrs["batch_size"]) == ("aligned", 5, 2)
    assert {"jax_version", "diffrax_version", "lora_flow_version", "sigma_shift", "delta_w"} <= set(dataset.attrs)
    report = (out / "report.md").read_text()
    assert "| gaussian | B | 0.0001 | 2 |" in report
    assert (out / "figures" / "sweep.png").stat().st_size > 10_000
    assert "figures/sweep.png" in report


def test_refuses_to_resume_with_other_settings(unbroken, capsys):
    out, _ = unbroken
    before = stored_bytes(out)
    assert main(["sweep", "--out", str(out), "--resume", "--alpha", "1e-3"]) == 2
    assert (
        f"alpha must be (0.01, 0.0001), as '{out}' was started, to resume it, got (0.001,)" in capsys.readouterr().err
    )
    assert stored_bytes(out) == before


def test_refuses_to_resume_with_another_target_of_the_same_name(tmp_path, capsys):
    def save(seed):
        draw = np.random.default_rng(seed).normal
        np.savez(tmp_path / "t.npz", w1=draw(size=(4, 3)), w2=draw(size=(3, 4)), shift=draw(size=(3, 3)))

    flags = ["--problem", str(tmp_path / "t.npz"), "--rank", "1", "--t1", "0.5", "--saves", "3"]
    save(0)
    assert main(["sweep", "--out", str(tmp_path / "run"), *flags]) == 0
    save(1)
    assert main(["sweep", "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "problem must be the one that" in capsys.readouterr().err


def test_refuses_to_overwrite_unless_told_to(unbroken, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(unbroken[0], out)
    assert main(["sweep", "--out", str(out), *FLAGS]) == 2
    assert "out must be new (--overwrite replaces it, --resume goes on with it)" in capsys.readouterr().err
    assert stored_bytes(out) == stored_bytes(unbroken[0])
    assert main(["sweep", "--out", str(out), "--overwrite", "--rank", "1", "--t1", "0.1", "--saves", "2"]) == 0
    assert load_run(out).sizes["time"] == 2


def test_a_finished_lane_whose_values_are_lost_is_solved_again(unbroken, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(unbroken[0], out)
    chunks = sorted((out / "results.zarr" / "loss").glob("[0-9]*"))
    chunks[0].unlink()
    with pytest.raises(InputError, match="must hold a finished run"):
        load_run(out)
    assert main(["sweep", "--out", str(out), "--resume"]) == 0
    assert stored_bytes(out) == stored_bytes(unbroken[0])


@pytest.mark.parametrize("moment", ["empty.to_zarr", "write_atomically", "shutil.rmtree"])
@pytest.mark.long
def test_a_failure_while_overwriting_loses_no_run(unbroken, tmp_path, moment, monkeypatch, capsys):
    """The old run stays until the new one is whole beside it; after that the new one can be resumed."""
    out = tmp_path / "run"
    shutil.copytree(unbroken[0], out)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if moment == "empty.to_zarr":
        monkeypatch.setattr(xr.Dataset, "to_zarr", fail)
    elif moment == "write_atomically":
        monkeypatch.setattr("lora_flow.store.write_atomically", fail)
    else:
        monkeypatch.setattr("lora_flow.store.shutil.rmtree", fail)
    flags = ["--overwrite", "--rank", "1", "--m", "4", "--n", "4", "--h", "5", "--t1", "0.1", "--saves", "2"]
    assert main(["sweep", "--out", str(out), *flags]) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert said.count("\n") == 1
    monkeypatch.undo()
    if moment == "empty.to_zarr":
        assert stored_bytes(out) == stored_bytes(unbroken[0])
        return
    assert main(["sweep", "--out", str(out), "--resume"]) == 0
    assert load_run(out).sizes["time"] == (2 if moment == "shutil.rmtree" else 11)


def test_other_peoples_folders_with_a_settings_file_are_left_alone(tmp_path, capsys):
    (tmp_path / "figures").mkdir()
    for name in ("settings.toml", "figures/thesis.png", "report.md"):
        (tmp_path / name).write_text("x = 1")
    assert main(["sweep", "--out", str(tmp_path), "--overwrite", "--rank", "1"]) == 2
    assert "must be a new folder or a run folder" in capsys.readouterr().err
    assert all(
        (tmp_path / name).read_text() == "x = 1" for name in ("settings.toml", "figures/thesis.png", "report.md")
    )


def test_a_grid_that_cannot_be_stored_is_refused_at_once(tmp_path, capsys):
    assert main(["sweep", "--out", str(tmp_path / "run"), "--seeds", "1000000000000"]) == 2
    assert "seeds must leave what fits into" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_never_overwrites_what_is_not_a_run(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    for flags in (["--overwrite"], []):
        assert main(["sweep", "--out", str(tmp_path), *flags]) == 2
        assert "must be a new folder or a run folder" in capsys.readouterr().err
    assert main(["sweep", "--out", str(tmp_path / "thesis.tex"), "--overwrite"]) == 2
    assert "out must be a folder, got the file" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.long
def test_a_disk_that_fills_up_keeps_what_was_stored(unbroken, tmp_path):
    """From the fourth batch on writes fail with ENOSPC; the run ends with one line and can be resumed."""
    out = tmp_path / "run"
    script = """
import errno, sys
import zarr.storage._local as local
from lora_flow import store
from lora_flow.cli import main

put, write, batches = local._put, store.RunFolder.write, []

def full(path, value, exclusive=False):
    if len(batches) > 3:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    return put(path, value, exclusive=exclusive)

def counted(self, lanes, values):
    batches.append(lanes)
    write(self, lanes, values)

local._put, store.RunFolder.write = full, counted
raise SystemExit(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, "sweep", "--out", str(out), *FLAGS], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("lora-flow:")]
    assert done.returncode == 2
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
    assert "--resume" in lines[0]
    assert int((xr.open_zarr(out / "results.zarr")["status"] >= 0).sum()) == 6
    finish(start(out, "--resume"))
    assert stored_bytes(out) == stored_bytes(unbroken[0])


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert main(["sweep", "--out", str(tmp_path / "run"), "--rank", "1"]) == 2
    assert "out must have room for" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_missing_and_half_written_folders_are_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "settings.toml").write_text("rank = [1]\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "settings.toml").write_text("rank = [1\n")
    (tmp_path / "torn" / "results.zarr").mkdir(parents=True)
    (tmp_path / "torn" / "settings.toml").write_text("rank = [1]\n")
    for command, folder, message in (
        (["plot"], "none", "the run folder must exist, got"),
        (["plot"], "empty", "must be a run folder, got one without settings.toml"),
        (["plot"], "begun", "must hold results.zarr, got an unfinished run; finish it with: lora-flow sweep --out"),
        (["plot"], "torn", "must be readable by xarray.open_zarr"),
        (["sweep", "--resume", "--out"], "none", "the run folder must exist, got"),
        (["sweep", "--resume", "--out"], "empty", "must be a run folder, got one without settings.toml"),
        (["sweep", "--resume", "--out"], "broken", "must be a TOML file"),
        (["sweep", "--resume", "--out"], "torn", "must be readable by xarray.open_zarr"),
    ):
        assert main([*command, str(tmp_path / folder)]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1

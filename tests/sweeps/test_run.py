"""Run folders: what is stored, and what survives kill -9, a full disk and other people's files."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tomli_w
import xarray as xr
import zarr

from lora_flow import InputError, aligned_problem, load_run
from lora_flow.cli import main
from lora_flow.settings import build_plan, from_table
from lora_flow.storage import checksums
from lora_flow.storage.folder import read_settings
from lora_flow.sweeps.folder import SWEEP, template_of

FLAGS = ["--alpha", "1e-2", "1e-4", "--rank", "1", "--seeds", "20", "--side", "B", "--batch-size", "2"]
FLAGS += ["--m", "4", "--n", "5", "--h", "6", "--t1", "3", "--saves", "3"]
LANES = 40


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


def wait_for(process, out, lanes):
    """Until so many lanes are stored, or the process has ended."""
    while solved(out) < lanes and process.poll() is None:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert main(["sweep", "--out", str(out), *FLAGS]) == 0
    return out


def stored_bytes(out):
    """Every stored array byte for byte, through xarray's own reader."""
    dataset = xr.open_zarr(out / "results.zarr", mask_and_scale=False).load()
    return {name: dataset[name].values.tobytes() for name in dataset.variables}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_resumes_and_an_overwrite_beside_a_running_sweep_mix_nothing(unbroken, tmp_path):
    """Whoever comes second is refused with one line, whatever the first is at; the first ends as if it were alone."""
    out = tmp_path / "run"
    first = start(out, *FLAGS)
    wait_for(first, out, 2)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    first, others = start(out, "--resume"), []
    while f"process {first.pid} on" not in (out / ".lora-flow.lock").read_text():  # which the killed one left
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    for flags in (["--resume"], ["--overwrite", "--rank", "1"]):
        other = start(out, *flags)
        others.append((other, other.communicate()[1].decode()))
    first.send_signal(signal.SIGCONT)
    finish(first)
    for other, said in others:
        assert other.returncode == 2
        assert said.count("\n") == 1
        assert f"must be written by one process at a time, got one that process {first.pid} on" in said
    assert stored_bytes(out) == stored_bytes(unbroken)


def test_killed_and_resumed_is_bit_identical(unbroken, tmp_path):
    """Killed between two boxes; tests/storage/test_killed.py has kills at the steps of writing one."""
    out = tmp_path / "run"
    process = start(out, *FLAGS)
    wait_for(process, out, 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < solved(out) < LANES
    assert main(["sweep", "--out", str(out), "--resume"]) == 0
    assert stored_bytes(out) == stored_bytes(unbroken)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_at_random_moments_and_resumed_is_bit_identical(unbroken, tmp_path):
    out, kills = tmp_path / "run", 18
    began = time.monotonic()
    finish(start(tmp_path / "timed", *FLAGS))
    duration = time.monotonic() - began
    moments = random.Random(2026)
    mid_run = 0
    for kill in range(kills):
        resuming = (out / "settings.toml").exists()
        before = solved(out)
        process = start(out, *(["--resume"] if resuming else FLAGS))
        if kill % 2:  # at any moment of the process, while it starts included
            time.sleep(moments.uniform(0, 0.7) * duration)
        else:  # among the batches
            wait_for(process, out, before + moments.randint(1, 5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        mid_run += before < solved(out) < LANES
        if solved(out) == LANES:  # start over, so that there is something to kill
            shutil.rmtree(out)
    assert mid_run >= 0.4 * kills, "too few kills fell among the batches"
    finish(start(out, *(["--resume"] if (out / "settings.toml").exists() else FLAGS)))
    assert stored_bytes(out) == stored_bytes(unbroken)
    assert not [path for path in out.rglob("*.partial") if path.parent == out]


def test_a_batch_without_its_status_is_solved_again(unbroken, tmp_path):
    """The marker is what counts: values without it are replaced."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    status, loss = (zarr.open_array(out / "results.zarr" / name) for name in ("status", "loss"))
    status[0, 1, 0, :2], loss[0, 1, 0, :2] = -1, 123.0
    with pytest.raises(
        InputError, match="must hold a finished run, got 38 of 40 lanes; finish it with: lora-flow sweep"
    ):
        load_run(out)
    assert main(["sweep", "--out", str(out), "--resume"]) == 0
    assert stored_bytes(out) == stored_bytes(unbroken)


def test_a_run_folder_is_what_it_says(unbroken):
    out = unbroken
    made = ["figures", "report.html", "report.md", "results.zarr", "settings.toml"]
    assert sorted(path.name for path in out.iterdir()) == made
    dataset = load_run(out)
    assert dataset["loss"].dims == ("init", "alpha", "rank", "seed", "time")
    assert dataset.sizes == {"init": 1, "alpha": 2, "rank": 1, "seed": 20, "time": 3}
    assert np.all(dataset["status"] == 0)
    assert dataset.attrs["side"] == "B"
    assert (dataset.attrs["problem"], dataset.attrs["m"], dataset.attrs["batch_size"]) == ("aligned", 4, 2)
    assert {"jax_version", "diffrax_version", "lora_flow_version", "sigma_shift", "delta_w"} <= set(dataset.attrs)
    report = (out / "report.md").read_text()
    assert "| gaussian | B | 0.0001 | 1 |" in report
    assert (out / "figures" / "sweep.png").stat().st_size > 10_000
    assert "figures/sweep.png" in report


def test_refuses_to_resume_with_other_settings(unbroken, capsys):
    out = unbroken
    before = stored_bytes(out)
    assert main(["sweep", "--out", str(out), "--resume", "--alpha", "1e-3"]) == 2
    assert (
        f"alpha must be (0.01, 0.0001), as '{out}' was started, to resume it, got (0.001,)" in capsys.readouterr().err
    )
    assert stored_bytes(out) == before


def test_a_run_keeps_its_target(tmp_path, capsys):
    """The file may move or change; the copy may not."""
    target, out = tmp_path / "t.npz", tmp_path / "run"

    def save(seed):
        problem = aligned_problem(jax.random.key(seed), m=4, n=5, h=6)
        np.savez(target, w1=problem.w1, w2=problem.w2, shift=problem.shift)

    save(0)
    first = target.read_bytes()
    flags = ["--problem", str(target), "--rank", "1", "--seeds", "4", "--t1", "0.5", "--saves", "3"]
    assert main(["sweep", "--out", str(out), *flags, "--batch-size", "2"]) == 0
    stored, copy = stored_bytes(out), out / "problem-as-started.npz"
    assert copy.read_bytes() == first
    target.unlink()
    shutil.rmtree(out / "results.zarr" / "loss")
    (out / "results.zarr" / "alpha" / "0").unlink()
    capsys.readouterr()
    assert main(["sweep", "--out", str(out), "--resume"]) == 0
    assert f"problem: {copy}, a copy of '{target}'" in capsys.readouterr().out
    assert stored_bytes(out) == stored
    assert copy.read_bytes() == first
    save(1)
    shutil.copy(target, copy)
    assert main(["sweep", "--out", str(out), "--resume"]) == 2
    assert "problem must be the one that" in capsys.readouterr().err
    copy.write_bytes(first[:200] + bytes([first[200] ^ 1]) + first[201:])
    assert main(["sweep", "--out", str(out), "--resume"]) == 2
    assert f"problem must be a readable .npz file, got '{copy}'" in capsys.readouterr().err
    assert stored_bytes(out) == stored


def test_refuses_to_overwrite_unless_told_to(unbroken, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    assert main(["sweep", "--out", str(out), *FLAGS]) == 2
    assert "out must be new (--overwrite replaces it, --resume continues it)" in capsys.readouterr().err
    assert stored_bytes(out) == stored_bytes(unbroken)
    fewer = ["2" if flag == "20" else flag for flag in FLAGS]
    assert main(["sweep", "--out", str(out), *fewer, "--overwrite"]) == 0
    assert load_run(out).sizes["seed"] == 2


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            {"loss/0.0.0.0.0": None, "norm_z1/0.1.0.2.0": b"", "steps/0.0.0.1": b"cut"},
            "must hold a finished run, got 34 of 40 lanes, damaged or missing loss/0.0.0.0.0, steps/0.0.0.1, ",
        ),
        (
            {"alpha/0": None, ".zmetadata": b"[" * 10**5, "steps/.zarray": b"{}", "loss/0.0.0.3.0": None},
            "results.zarr' must be as it was written, got damaged or missing alpha/0, steps/.zarray; mend it with: ",
        ),
    ],
)
def test_what_is_damaged_is_named_and_solved_again(unbroken, tmp_path, damage, told, capsys):
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    for name, content in damage.items():
        assert (out / "results.zarr" / name).is_file()
        (out / "results.zarr" / name).unlink()
        if content is not None:
            (out / "results.zarr" / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(told)):
        load_run(out)
    assert main(["plot", str(out)]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
    assert main(["sweep", "--out", str(out), "--resume"]) == 0
    assert "damaged, and solved again: " in capsys.readouterr().out
    assert stored_bytes(out) == stored_bytes(unbroken)
    assert load_run(out).attrs == load_run(unbroken).attrs


EDITS = [
    ({"alpha": [1e-2, 0.1]}, "alpha must be (0.01, 0.0001), as '{out}' was started, to resume it, got (0.01, 0.1)"),
    ({"rank": [2]}, "rank must be (1), as '{out}' was started, to resume it, got (2)"),
    ({"seeds": 21}, "seeds must be 20, "),
    ({"init": ["spectral"]}, "init must be (gaussian), "),
    ({"side": ["A"]}, "side must be (B), "),
    ({"side": ["A", "B"]}, "side must be (B), "),
    ({"t1": 3.5}, "t1 must be 3.0, "),
    ({"saves": 12}, "saves must be 3, "),
    ({"spacing": "log"}, "spacing must be linear, "),
    ({"flow": "lora-plus:2"}, "flow must be plain, "),
    ({"solver": "Tsit5"}, "solver must be auto, "),
    ({"rtol": 1e-4}, "rtol must be 0.0005, "),
    ({"max_steps": 99}, "max_steps must be 100000, "),
    ({"batch_size": 3}, "batch_size must be 2, "),
    ({"details": True}, "details must be False, "),
    ({"m": 6}, "m must be 4, "),
    ({"delta_w": [0.5]}, "delta_w must be (0.907029478458"),
    ({"delta_w": [0.5, 0.6]}, "delta_w must be (0.907029478458"),
    ({"problem_seed": [1]}, "problem_seed must be (0), "),
    ({"angle": [10.0]}, "angle must be (0.0), "),
    ({"shift_scale": [4.0]}, "shift_scale must be (5.0), "),
    ({"component": ["bottom"]}, "component must be (top), "),
]


def test_edited_settings_are_not_gone_on_with(unbroken, tmp_path, capsys):
    """Whatever settings.toml says by now: values are stored under what the results were made with."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    started = read_settings(out)
    for edit, told in (EDITS[0], EDITS[7], EDITS[17]):
        (out / "settings.toml").write_text(tomli_w.dumps(started | edit))
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert main(["sweep", "--out", str(out), "--resume"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"lora-flow: {told.format(out=out)}")
        assert said.count("\n") == 1
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_no_setting_may_be_another_than_that_of_the_results(unbroken):
    started, notes = read_settings(unbroken), checksums.notes(unbroken / "results.zarr")
    template = template_of(started, build_plan(from_table(started, "there")), {})
    SWEEP.unchanged(unbroken, template, notes, None)
    for edit, told in EDITS:
        with pytest.raises(InputError, match=f"^{re.escape(told.format(out=unbroken))}"):
            SWEEP.unchanged(unbroken, template._replace(settings=started | edit), notes, None)


def test_edited_settings_are_not_gone_on_with_where_something_is_damaged(unbroken, tmp_path, capsys):
    """What is made anew from the settings is made from those that the run was started with, or not at all."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    (out / "settings.toml").write_text(tomli_w.dumps(read_settings(out) | {"alpha": [1e-2, 0.1]}))
    for name in ("alpha/0", ".zmetadata", ".zattrs"):
        (out / "results.zarr" / name).unlink()
        assert main(["sweep", "--out", str(out), "--resume"]) == 2
        assert "alpha must be (0.01, 0.0001), as" in capsys.readouterr().err
    (out / "results.zarr" / "checks" / ".zattrs").unlink()


@pytest.mark.parametrize("mine", ["x = 1", "init = 'cold'\nalpha = 0.1\nrank = 2\nt1 = 5.0\nowner = 'me'"])
def test_other_peoples_folders_with_a_settings_file_are_left_alone(tmp_path, mine, capsys):
    (tmp_path / "figures").mkdir()
    for name in ("settings.toml", "figures/thesis.png", "report.md"):
        (tmp_path / name).write_text(mine)
    assert main(["sweep", "--out", str(tmp_path), "--overwrite", "--rank", "1"]) == 2
    assert "must be a new folder or a run folder" in capsys.readouterr().err
    assert all((tmp_path / name).read_text() == mine for name in ("settings.toml", "figures/thesis.png", "report.md"))


def test_a_grid_that_cannot_be_stored_is_refused_at_once(tmp_path, capsys):
    assert main(["sweep", "--out", str(tmp_path / "run"), "--seeds", "1000000000000"]) == 2
    told = capsys.readouterr().err
    assert re.match(r"lora-flow: out must have room for 6.5 PB of results \(seeds 10{12}\), got .* free\n", told)
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
    """From the fourth box on writes fail with ENOSPC; the run ends with one line and can be resumed."""
    out = tmp_path / "run"
    script = """
import errno, sys
import zarr.storage._local as local
from lora_flow.storage import folder as store
from lora_flow.cli import main

put, write, boxes = local._put, store.Folder.write, []

def full(path, value, exclusive=False):
    if len(boxes) > 3:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    return put(path, value, exclusive=exclusive)

def counted(self, number, values):
    boxes.append(number)
    write(self, number, values)

local._put, store.Folder.write = full, counted
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
    assert stored_bytes(out) == stored_bytes(unbroken)


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

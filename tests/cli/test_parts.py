"""Parts of a run: which one a process is, and what two of them leave behind."""

import os
import subprocess
import sys

import pytest
import xarray as xr

from lora_flow import InputError, load_run
from lora_flow.cli import main
from lora_flow.cli.parts import part_of

FLAGS = ["--m", "4", "--n", "5", "--h", "6", "--alpha", "1e-1", "1e-2", "--rank", "1", "--seeds", "6"]
FLAGS += ["--t1", "0.5", "--saves", "3", "--batch-size", "2"]


@pytest.mark.parametrize(
    ("asked", "environment", "part"),
    [
        (None, {}, None),
        ("0/1", {}, (0, 1)),
        ("3/64", {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, (3, 64)),
        ("none", {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, None),
        (None, {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, (1, 2)),
        (None, {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}, (3, 4)),
        (None, {"SLURM_ARRAY_TASK_ID": "1"}, None),
        (None, {"PBS_ARRAY_INDEX": "5"}, (5, 64)),
        (None, {"PBS_ARRAY_INDEX": "64"}, (0, 64)),
    ],
)
def test_which_part(asked, environment, part):
    assert part_of(asked, environment) == part


@pytest.mark.parametrize("asked", ["", "2/2", "1", "-1/2", "1/0", "a/b", "0/2/3", "1e0/2", "0 / 2", "9" * 30 + "/2"])
def test_what_is_no_part(asked):
    with pytest.raises(InputError, match=r"part must be I/N with I from 0 to N - 1, such as 0/4, or none, got"):
        part_of(asked, {})


def test_two_parts_side_by_side_are_one_run(tmp_path, capsys):
    assert main(["sweep", "--out", str(tmp_path / "whole"), *FLAGS]) == 0
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PBS_"))}
    out = tmp_path / "parts"
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "lora_flow", "sweep", "--out", str(out), *FLAGS, "--part", f"{part}/2"],
            stdout=subprocess.PIPE,
            text=True,
            env=alone,
        )
        for part in range(2)
    ]
    told = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("report: " in one for one in told) >= 1
    xr.testing.assert_identical(load_run(out), load_run(tmp_path / "whole"))
    capsys.readouterr()
    assert main(["sweep", "--out", str(out), *FLAGS, "--part", "0/2", "--overwrite"]) == 2
    assert capsys.readouterr().err == "lora-flow: overwrite must be left out with --part, got both\n"

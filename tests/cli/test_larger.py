"""`lora-flow sweep --extend`: the larger run, or one line on what stands against it."""

import pytest
import xarray as xr

from lora_flow import load_run
from lora_flow.cli import main
from lora_flow.storage.checksums import boxes_of

FLAGS = ["--m", "4", "--n", "5", "--h", "6", "--rank", "1", "--t1", "0.5", "--saves", "3", "--batch-size", "2"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(["sweep", *FLAGS, "--alpha", "1e-1", "1e-2", "--seeds", "3", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--t1 6", "t1 must be 0.5, as '{out}' was started, to extend it, got 6.0"),
        ("--seeds 2", "seeds must be at least 3, as many as '{out}' has, or further seeds, got 2"),
        ("--side A B", "side must be ('A',), as '{out}' was started, to extend it, got ('A', 'B')"),
        ("--delta-w 0.5", "delta_w must be (0.907"),
        ("--seeds 9 --overwrite", "overwrite must be left out with --extend, got --overwrite"),
        ("--seeds 9 --resume", "resume must be left out with --extend, got --resume"),
        ("--seeds 9 --part 0/2", "part must be left out with --extend, got --part"),
        ("--seeds 9 --config a.toml", "config must be left out with --extend, got --config"),
        ("--alpha 1e-3 1e-3", "alpha must name each value once"),
        ("--rank 1 9", "rank must "),
        ("--init hot", "init must be "),
    ],
)
def test_wrong_words_get_one_line_and_change_nothing(out, words, told, capsys):
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(["sweep", "--out", str(out), "--extend", *words.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lora-flow: {told.format(out=out)}")
    assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_where_there_is_no_run_there_is_none_to_extend(tmp_path, capsys):
    assert main(["sweep", "--out", str(tmp_path / "none"), "--extend", "--seeds", "9"]) == 2
    assert "the run folder must exist, got" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_further_values_are_solved_and_the_larger_run_is_drawn(out, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    assert main(["sweep", "--out", str(out), "--extend", "--seeds", "7", "--init", "spectral"]) == 0
    said = capsys.readouterr().out
    assert "28 runs, 22 of them to solve, 2 at a time on each device\n" in said
    monkeypatch.undo()
    whole = [*FLAGS, "--alpha", "1e-1", "1e-2", "--seeds", "7", "--init", "gaussian", "spectral"]
    assert main(["sweep", *whole, "--out", str(tmp_path / "alone")]) == 0
    xr.testing.assert_identical(load_run(out), load_run(tmp_path / "alone"))
    assert (out / "report.md").read_text() == (tmp_path / "alone" / "report.md").read_text()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "alone").iterdir())
    grown, alone = (boxes_of(run / "results.zarr").box for run in (out, tmp_path / "alone"))
    assert grown != alone
    next((out / "results.zarr" / "loss").glob("[0-9]*")).unlink()
    assert main(["sweep", "--out", str(out), "--resume"]) == 0  # in the boxes that there are
    assert boxes_of(out / "results.zarr").box == grown
    xr.testing.assert_identical(load_run(out), load_run(tmp_path / "alone"))
    capsys.readouterr()
    assert main(["sweep", "--out", str(out), "--extend", "--alpha", "1e-1"]) == 0
    assert capsys.readouterr().out.startswith(f"nothing new: '{out}' has all of these values\n")

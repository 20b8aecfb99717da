"""`lora-flow animate`: the lane that is named is solved again, and is the stored one."""

import re
import shutil

import jax
import pytest

from lora_flow import aligned_problem, sweep
from lora_flow.cli import main
from lora_flow.sweeps.folder import drawn

WORDS = ["sweep", "--m", "4", "--n", "5", "--h", "6", "--alpha", "1e-2", "1e-3", "--rank", "1", "2", "--seeds", "2"]
WORDS += ["--init", "gaussian", "pissa", "--delta-w", "0.3", "0.6", "--t1", "2", "--saves", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("animate") / "run"
    assert main([*WORDS, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("lane", [["alpha=1e-3", "seed=1", "rank=2"], ["init=pissa", "alpha=0.01", "delta_w=6e-1"]])
def test_the_lane_is_the_stored_one_solved_again(folder, capsys, lane):
    capsys.readouterr()
    assert main(["animate", str(folder), "--lane", *lane, "--frames", "3"]) == 0
    told, decades, file = capsys.readouterr().out.splitlines()
    for word in ("alpha 0.001", "seed 1", "rank 2") if lane[0] == "alpha=1e-3" else ("pissa", "delta_w 0.6"):
        assert word in told
    assert float(re.search(r"within (\S+) decades", decades)[1]) < 0.01
    name = file.removeprefix(f"animation: {folder}/")
    assert (folder / name).read_bytes().startswith(b"GIF89a")
    assert name in drawn(folder), "goes when another run takes this one's place"


def test_a_descent_is_repeated_with_its_optimiser_and_noise(tmp_path, capsys):
    words = ["sweep", "--m", "4", "--n", "5", "--h", "6", "--alpha", "1e-2", "--rank", "2", "--saves", "5"]
    words += ["--descend", "gd:1e-2", "adam:1e-2", "--steps", "20", "--gradient-noise", "0", "0.1"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    lane = ["optimizer=adam", "gradient_noise=0.1"]
    assert main(["animate", str(tmp_path / "run"), "--lane", *lane, "--frames", "2"]) == 0
    assert float(re.search(r"within (\S+) decades", capsys.readouterr().out)[1]) < 1e-6


@pytest.mark.parametrize(
    ("lane", "message"),
    [
        (["alpha"], "lane must be pairs such as alpha=1e-4 seed=0, got alpha"),
        (["alpha=1e-3", "alpha=1e-2"], "lane must name each axis once, got alpha"),
        (["beta=1"], "an axis of lane must be 'delta_w', 'init', 'alpha', 'rank' or 'seed', got 'beta'"),
        (["alpha=1e-5"], "alpha of lane must be one of the run's (0.01, 0.001), got 1e-5"),
        (["init=milora"], "init of lane must be one of the run's (gaussian, pissa), got milora"),
        (["seed=x"], "seed of lane must be one of the run's (0, 1), got x"),
    ],
)
def test_a_lane_that_is_not_there_is_refused_by_its_axis(folder, capsys, lane, message):
    before = sorted((folder / "figures").iterdir())
    capsys.readouterr()
    assert main(["animate", str(folder), "--lane", *lane]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert sorted((folder / "figures").iterdir()) == before


def test_a_film_is_refused_before_anything_is_solved_where_ffmpeg_is_missing(folder, capsys, monkeypatch):
    if shutil.which("ffmpeg"):
        pytest.skip("ffmpeg is installed")
    monkeypatch.setattr("lora_flow.experiments.animate.solve_lane", lambda *_: pytest.fail("solved"))
    assert main(["animate", str(folder), "--format", "mp4"]) == 2
    assert "format must be gif where ffmpeg is not installed, got mp4" in capsys.readouterr().err


def test_a_run_of_python_is_refused(tmp_path, capsys):
    problem = aligned_problem(jax.random.key(0), m=4, n=5, h=6)
    sweep(problem, alpha=1e-2, rank=1, seeds=1, t1=1.0, saves=3, out=str(tmp_path / "run"))
    assert main(["animate", str(tmp_path / "run")]) == 2
    assert "must be a run that a command has started, got one of Python's sweep" in capsys.readouterr().err

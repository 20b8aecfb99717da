"""`lora-flow fit`: a folder with results, a picture and a report, which other commands know."""

import tomllib

import jax
import numpy as np
import pytest
import xarray as xr

from lora_flow import aligned_problem, gaussian_init
from lora_flow.cli import main
from lora_flow.dynamics.lanes import solve_lanes, stack

SMALL = ["--m", "3", "--n", "3", "--h", "4", "--rank", "2"]
TIMES = np.linspace(0.0, 1.5, 76)


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    problem = aligned_problem(jax.random.key(0), m=3, n=3, h=4, delta_w=0.6)
    start = stack([gaussian_init(jax.random.key(1), problem, rank=2, alpha=2e-3)])
    losses = solve_lanes(problem, start, TIMES, rtol=1e-6, keep=("loss",)).observables["loss"][0]
    noisy = np.asarray(losses) * np.exp(0.01 * np.random.default_rng(0).normal(size=TIMES.size))
    path = tmp_path_factory.mktemp("curve") / "curve.csv"
    np.savetxt(path, np.c_[TIMES, noisy], delimiter=",", header="time,loss", comments="")
    return path


@pytest.fixture(scope="module")
def folder(curve, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "run"
    assert main(["fit", str(curve), *SMALL, "--unknown", "delta_w,alpha", "--seed", "1", "--out", str(out)]) == 0
    return out


def test_the_folder_has_results_settings_a_picture_and_a_report(folder, curve):
    dataset = xr.open_zarr(folder / "results.zarr")
    assert dataset["parameter"].values.tolist() == ["delta_w", "alpha"]
    np.testing.assert_allclose(dataset["estimate"], [0.6, 2e-3], rtol=0.01)
    settings = tomllib.loads((folder / "settings.toml").read_text())["fit"]
    assert settings["unknown"] == ["delta_w", "alpha"]
    assert (settings["curve"], settings["clock"], settings["seed"]) == (str(curve), "time", [1])
    assert (folder / "figures" / "fit.png").is_file()
    assert "delta_w = 0.6" in (folder / "report.md").read_text()


def test_it_is_drawn_again_and_told_of(folder, capsys):
    (folder / "report.md").unlink()
    assert main(["plot", str(folder)]) == 0
    assert (folder / "report.md").is_file()
    assert main(["status", str(folder)]) == 0
    assert "a fit, finished" in capsys.readouterr().out


BAD = {
    "nan": "step,loss\n0,1\n1,nan\n2,1\n",
    "unsorted": "step,loss\n0,1\n2,1\n1,1\n",
    "negative": "step,loss\n0,1\n1,-1\n2,1\n",
}


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("nan", [], "losses must be positive and finite, got nan at 1"),
        ("unsorted", [], "times must increase, got 1.0 after 2.0"),
        ("negative", [], "losses must be positive and finite, got -1.0 at 1"),
        (None, ["--unknown", "alpha,deltaw"], "did you mean 'delta_w'?"),
        (None, ["--columns", "los"], "did you mean 'loss'?"),
        (None, ["--init", "orthogonal"], "seed must be given, for the draw of 'orthogonal'"),
        (None, ["--alpha", "-1"], "alpha must be positive and finite, got -1.0"),
        (None, ["--kappa", "2"], "kappa must be left out with problem 'aligned'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(text, flags, message, curve, tmp_path, capsys):
    path = curve
    if text is not None:
        path = tmp_path / "bad.csv"
        path.write_text(BAD[text])
    assert main(["fit", str(path), *SMALL, *flags, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_there_is_is_not_replaced_unasked(folder, curve, capsys):
    assert main(["fit", str(curve), *SMALL, "--out", str(folder)]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err

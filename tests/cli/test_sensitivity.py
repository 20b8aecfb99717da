"""`lora-flow sensitivity`: a folder with results, pictures and a report, which other commands know."""

import tomllib

import numpy as np
import pytest
import xarray as xr

from lora_flow.cli import main

SMALL = ["--m", "3", "--n", "3", "--h", "4", "--rank", "1", "2", "--alpha", "1e-2", "1e-3", "--t1", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("sensitivity") / "run"
    assert main(["sensitivity", *SMALL, "--observable", "t_align", "--out", str(out)]) == 0
    return out


def test_the_folder_has_results_settings_pictures_and_a_report(folder):
    dataset = xr.open_zarr(folder / "results.zarr")
    assert dataset["parameter"].values.tolist() == ["alpha", "shift_scale", "delta_w"]  # angle and noise are 0
    elasticity = dataset["elasticity"].sel(observable="t_align")
    np.testing.assert_allclose(elasticity.sel(parameter="delta_w"), 0.5, atol=5e-3)
    np.testing.assert_allclose(elasticity.sel(parameter="shift_scale"), -1, atol=5e-3)
    settings = tomllib.loads((folder / "settings.toml").read_text())["sensitivity"]
    assert settings["observable"] == ["t_align"]
    assert settings["alpha"] == [1e-2, 1e-3]
    pictures = {picture.name for picture in (folder / "figures").glob("*.png")}
    assert pictures == {"sensitivity.png", "sensitivity-map.png"}
    assert "shift_scale matters most" in (folder / "report.md").read_text()


def test_by_default_only_what_the_problem_has_is_looked_at(tmp_path):
    layer = ["--problem", "regression", "--m", "3", "--n", "4", "--target-rank", "1", "--rank", "1", "--t1", "1"]
    assert main(["sensitivity", *layer, "--out", str(tmp_path / "run")]) == 0
    dataset = xr.open_zarr(tmp_path / "run/results.zarr")
    assert dataset["observable"].values.tolist() == ["log10 loss"]
    assert dataset["parameter"].values.tolist() == ["alpha", "shift_scale", "kappa"]


def test_it_is_drawn_again_and_told_of(folder, capsys):
    (folder / "report.md").unlink()
    assert main(["plot", str(folder)]) == 0
    assert (folder / "report.md").is_file()
    assert main(["status", str(folder)]) == 0
    assert "a sensitivity, finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--observable", "log10 los"], "did you mean 'log10 loss'?"),
        (["--with-respect-to", "delta-w"], "did you mean 'delta_w'?"),
        (["--at", "7"], "at must be a time after 0 and up to t1 = 1, got 7"),
        (["--delta-w", "0.5", "0.9"], "delta_w must have one value, at which derivatives are taken"),
        (["--kappa", "2"], "kappa must be left out with problem 'aligned'"),
        (["--problem-seed", "99999999999999999999"], "problem_seed must be at most 9223372036854775807"),
        (["--seeds", "1e14"], "(seeds 100000000000000)"),
        (["--init", "pissa"], "init must leave the frozen weights as they are"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flags, message, tmp_path, capsys):
    assert main(["sensitivity", *SMALL, *flags, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_there_is_is_not_replaced_unasked(folder, capsys):
    assert main(["sensitivity", *SMALL, "--out", str(folder)]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err

"""One way from results to pictures and a report: a sweep's folder, and that of an experiment that runs as a whole."""

import dataclasses
import json

import numpy as np
import pytest
import xarray as xr

from lora_flow import InputError
from lora_flow.cli import main
from lora_flow.experiments.base import Experiment
from lora_flow.experiments.folder import store_study
from lora_flow.experiments.present import present
from lora_flow.experiments.table import EXPERIMENTS
from lora_flow.figures.style import band, panels
from lora_flow.settings import Settings
from lora_flow.storage.locks import locked

RUN = Settings(m=4, n=4, h=8, alpha=(1e-2,), rank=(1,), seeds=2, t1=0.5, saves=5)
VALUES = xr.Dataset({"x": (("seed", "step"), [[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]])}, coords={"step": [0, 1]})


def draw(dataset):
    with panels(1, 1, height=2.0) as (figure, axes):
        band(dataset["x"] if "x" in dataset else dataset["loss"].isel(init=0, alpha=0, rank=0), axes[0, 0])
    return figure


def of_function(values=VALUES):
    return Experiment.of_one("what x is", lambda seeds, progress: values, draw, lambda dataset: "x is told", seeds=3)


def test_an_experiment_that_runs_as_a_whole_is_drawn_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(EXPERIMENTS, "mine", of_function())
    out = tmp_path / "mine"
    assert main(["figure", "mine", "--out", str(out)]) == 0
    picture = out / "figures" / "figure-mine.png"
    said = capsys.readouterr().out.splitlines()[-3:]
    assert said == ["x is told", f"picture: {picture}", f"report: {out / 'report.md'}"]
    assert (out / "report.md").read_text() == "# What x is\n\nx is told\n\n![](figures/figure-mine.png)\n"
    assert json.loads(picture.with_suffix(".json").read_text())[0]["lines"] == [[3.0, 4.0]]
    assert (out / "settings.toml").read_text() == 'study = "mine"\nseeds = 3\n'
    with xr.open_zarr(out / "results.zarr", mask_and_scale=False) as stored:
        np.testing.assert_array_equal(stored["x"], VALUES["x"])


def test_a_sweep_of_an_experiment_is_drawn_with_its_notes_and_its_part_alone_without(tmp_path, monkeypatch):
    one = Experiment("a run", {"a": RUN}, lambda datasets: {"-x": draw(datasets["a"])}, lambda datasets: "told of it")
    monkeypatch.setitem(EXPERIMENTS, "mine", one)
    out = tmp_path / "mine"
    assert main(["figure", "mine", "--out", str(out)]) == 0
    done = present(out)
    assert done.lines[0] == "told of it"
    assert (done.failed, done.lanes) == ({}, 2)
    assert sorted(path.name for path in (out / "figures").iterdir()) == ["figure-mine-x.json", "figure-mine-x.png"]
    assert "\n\ntold of it\n\n# a\n\n" in (out / "report.md").read_text()
    alone = present(out / "a")
    assert (out / "a" / "figures" / "sweep.png").is_file()
    assert "told of it" not in alone.lines
    monkeypatch.setitem(EXPERIMENTS, "mine", dataclasses.replace(one, parts={"a": RUN, "b": RUN}))
    with pytest.raises(InputError, match="must hold all the runs of figure mine, got none of b; --resume goes on"):
        present(out)
    monkeypatch.delitem(EXPERIMENTS, "mine")
    with pytest.raises(InputError, match=r"the figure in '.*' must be '1', .* got 'mine'"):
        present(out)


def test_a_folder_of_an_unknown_experiment_is_refused(tmp_path):
    with locked(tmp_path / "old"):
        store_study(tmp_path / "old", "phase", 3, VALUES)
    with pytest.raises(InputError, match=r"the study in '.*' must be 'pretraining', .* got 'phase'"):
        present(tmp_path / "old")


def test_a_function_that_gives_other_numbers_draws_another_picture(tmp_path, monkeypatch):
    for factor in (1, 2):
        monkeypatch.setitem(EXPERIMENTS, "mine", of_function(factor * VALUES))
        assert main(["figure", "mine", "--out", str(tmp_path / "mine"), "--overwrite"]) == 0
        shown = json.loads((tmp_path / "mine/figures/figure-mine.json").read_text())
        np.testing.assert_allclose(shown[0]["lines"], [[3.0 * factor, 4.0 * factor]])

"""The figure of attention: its table has theory beside the runs, and its pictures the lines of both."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from lora_flow import load_run
from lora_flow.cli import main
from lora_flow.experiments import attention
from lora_flow.experiments.table import EXPERIMENTS


def test_predictions_are_those_of_the_settings():
    assert attention.over_ratio(3.0)["overlap"] == pytest.approx(0.988, abs=1e-3)
    assert attention.over_ridge(0.1, True)["test_error"] == pytest.approx(0.739, rel=0.006)
    assert attention.over_ridge(0.1, False)["test_error"] == pytest.approx(0.809, rel=0.006)


def made(part, axis, starts):
    """A result of the part's shape, whose overlap rises evenly to 1 while its loss falls evenly to 0, in 8 steps."""
    axes = {"problem_seed": part.problem_seed, **({axis: getattr(part, axis)} if axis else {})}
    axes |= {"init": ["tied"], "alpha": part.alpha, "rank": part.rank, "seed": range(starts), "time": range(9)}
    over_time = np.linspace(0.0, 1.0, 9) * np.ones([len(values) for values in axes.values()])
    values = {"overlap": over_time, "test_error": over_time, "loss": 1 - over_time}
    return xr.Dataset({name: (tuple(axes), one) for name, one in values.items()}, {k: list(v) for k, v in axes.items()})


@pytest.mark.parametrize("starts", [1, 3])
def test_several_starts_are_told_of_by_their_mean(starts, monkeypatch):
    monkeypatch.setattr(attention, "predicted", lambda *asked: dict.fromkeys(attention.NAMES, 0.5))
    axes = {"curves": "sample_ratio", "reused": "pretraining_ridge", "new": "pretraining_ridge", "flow": ""}
    datasets = {name: made(part, axes[name], starts) for name, part in attention.PARTS.items()}
    told = attention.notes(datasets)
    assert "comes to .6 while the loss has fallen by 62 %" in told
    assert "| alpha' = 3 | 1.0000 | 0.5000 | 1.0000 | 0.5000 |" in told
    (figure,) = attention.draw(datasets).values()
    plt.close(figure)


@pytest.mark.long
def test_the_figure_has_theory_beside_the_runs(tmp_path, monkeypatch):
    fewer = {"problem_seed": (0, 1)}
    parts = {name: dataclasses.replace(part, **fewer) for name, part in attention.PARTS.items()}
    parts["curves"] = dataclasses.replace(parts["curves"], sample_ratio=(2.0, 3.0))
    for name in ("reused", "new"):
        parts[name] = dataclasses.replace(parts[name], pretraining_ridge=(0.03, 0.4), m=40)
    for name, part in parts.items():
        monkeypatch.setitem(attention.PARTS, name, part)
    monkeypatch.setattr(attention, "REUSED", parts["reused"])
    monkeypatch.setattr(attention, "CURVES", parts["curves"])
    experiment = dataclasses.replace(attention.EXPERIMENT, parts=parts)
    monkeypatch.setitem(EXPERIMENTS, "attention", experiment)
    assert main(["figure", "attention", "--out", str(tmp_path / "run")]) == 0
    rows = [row.split(" | ") for row in (tmp_path / "run/report.md").read_text().splitlines() if "| alpha' = " in row]
    assert len(rows) == len(attention.CURVES.sample_ratio)
    for row in rows:
        overlap, predicted, error, told = (float(cell.strip(" |")) for cell in row[1:])
        assert overlap == pytest.approx(predicted, abs=0.03)
        assert error == pytest.approx(told, rel=0.15)
    datasets = {name: load_run(tmp_path / "run" / name) for name in parts}
    reused, new = (attention.ends(datasets[name])["overlap"].mean("problem_seed") for name in ("reused", "new"))
    assert np.all(reused.values > new.values)
    (figure,) = attention.draw(datasets).values()
    assert [len(ax.lines) for ax in figure.axes] == [2, 4, 1, 2, 4, 1]
    plt.close(figure)

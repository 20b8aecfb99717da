"""The figure of attention: its table has theory beside the runs, and its pictures the lines of both."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest

from lora_flow import load_run
from lora_flow.cli import main
from lora_flow.experiments import attention
from lora_flow.experiments.table import EXPERIMENTS


def test_predictions_are_those_of_the_settings():
    assert attention.over_ratio(3.0)["overlap"] == pytest.approx(0.988, abs=1e-3)
    assert attention.over_ridge(0.1, True)["test_error"] == pytest.approx(0.739, rel=0.006)
    assert attention.over_ridge(0.1, False)["test_error"] == pytest.approx(0.809, rel=0.006)


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

"""The figure of symmetric factorisations: its table and its picture have theory beside the runs."""

import dataclasses

import matplotlib.pyplot as plt
import pytest

from lora_flow import load_run
from lora_flow.cli import main
from lora_flow.experiments.symmetric import EXPERIMENT, SYMMETRIC, draw
from lora_flow.experiments.table import EXPERIMENTS

pytestmark = pytest.mark.long


def test_the_figure_has_the_tails_of_theory(tmp_path, monkeypatch):
    short = {"": dataclasses.replace(SYMMETRIC, seeds=2, saves=41)}
    monkeypatch.setitem(EXPERIMENTS, "symmetric", dataclasses.replace(EXPERIMENT, parts=short))
    assert main(["figure", "symmetric", "--out", str(tmp_path / "run")]) == 0
    rows = [row.split(" | ") for row in (tmp_path / "run/report.md").read_text().splitlines() if "| over |" in row]
    assert len(rows) == 3
    for row in rows:
        assert float(row[3]) == pytest.approx(0.5, abs=5e-3)
        assert float(row[4]) == pytest.approx(float(row[5].strip(" |")), rel=0.1)
    figure = draw(load_run(tmp_path / "run"))
    assert [len(ax.lines) for ax in figure.axes] == [11, 4]
    plt.close(figure)

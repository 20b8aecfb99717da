"""The figure of symmetric factorisations: its table and its picture have theory beside the runs."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from lora_flow import load_run
from lora_flow.cli import main
from lora_flow.experiments.symmetric import EXPERIMENT, SYMMETRIC, draw, notes
from lora_flow.experiments.table import EXPERIMENTS


def test_the_noise_is_told_where_theory_has_a_limit_for_it():
    """Of a dataset whose values are all 1e-3."""
    shape = {"alpha": 1, "init": 1, "rank": len(SYMMETRIC.rank), "seed": 2, "time": 2}
    one = xr.DataArray(np.full(tuple(shape.values()), 1e-3), dims=tuple(shape))
    coords = {"rank": list(SYMMETRIC.rank), "time": [0.0, 1000.0]}
    told = notes(xr.Dataset({"loss": one, "loss_floor": one, "noise": one}, coords=coords))
    cells = [row.split(" | ")[3] for row in told.splitlines() if row.startswith(("| 1", "| 2", "| 3", "| 4", "| 6"))]
    assert cells == ["-", "-", "1.0000", "1.0000", "1.0000"]


@pytest.mark.long
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

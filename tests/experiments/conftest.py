"""Small runs of the experiments that are functions, and what their pictures must have."""

import dataclasses

import matplotlib.pyplot as plt
import pytest
import xarray as xr

from lora_flow.cli import main
from lora_flow.experiments.folder import load_study
from lora_flow.experiments.table import EXPERIMENTS


@pytest.fixture
def small(monkeypatch):
    """Runs two draws of an experiment whose module has other sizes for the time of the test."""

    def run(module, **sizes):
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
        dataset = module.run(2, lambda items: items)
        assert set(dataset.variables) == set(module.EXPERIMENT.meanings)
        return dataset

    return run


@pytest.fixture
def check_pictures():
    """Eight panels with a letter, something to see in each, and one legend for all."""

    def check(figure):
        figure.draw_without_rendering()
        assert [ax.get_title(loc="left")[:3] for ax in figure.axes] == [f"({letter})" for letter in "abcdefgh"]
        assert all(ax.lines for ax in figure.axes)
        assert len(figure.legends) == 1
        plt.close(figure)

    return check


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """The report of an experiment's command where the function gives a dataset; stored and drawn as that dataset."""

    def run(name, dataset):
        parts = {"": lambda seeds, progress: dataset}
        monkeypatch.setitem(EXPERIMENTS, name, dataclasses.replace(EXPERIMENTS[name], parts=parts))
        out = tmp_path / name
        assert main(["figure", name, "--out", str(out)]) == 0
        assert (out / f"figures/figure-{name}.png").stat().st_size > 20_000
        stored = load_study(out)
        xr.testing.assert_allclose(stored, dataset)
        for variable in stored.variables.values():
            assert variable.attrs["long_name"]
            assert variable.dtype.kind not in "fi" or variable.attrs["units"] == "1"
        return (out / "report.md").read_text()

    return run

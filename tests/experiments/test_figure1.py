"""The main job: Figure 1 of arXiv 2503.06982, from the command to the published values."""

import dataclasses
import json

import numpy as np
import pytest
from stored import STORED, check_agrees

from lora_flow import load_run, sweep
from lora_flow.cli import main
from lora_flow.experiments.table import EXPERIMENTS
from lora_flow.recipes.kinds import draw_all
from lora_flow.results.report import log10
from lora_flow.settings import sweep_arguments


@pytest.fixture(scope="module")
def figure1(tmp_path_factory):
    out = tmp_path_factory.mktemp("figure") / "figure1"
    assert main(["figure", "1", "--out", str(out)]) == 0
    return out, load_run(out)


def test_it_is_the_papers_sweep(figure1):
    _, dataset = figure1
    assert dataset.sizes == {"init": 2, "alpha": 3, "rank": 1, "seed": 30, "time": 201}
    assert dataset.attrs["side"] == "B"
    assert float(dataset["time"][-1]) == 5.0
    assert np.all(dataset["status"] == 0)


@pytest.mark.parametrize(("alpha", "published"), [(1e-3, -4.75), (1e-4, -6.75), (1e-5, -8.74)])
def test_alignment_error_at_the_end_of_its_panel(figure1, alpha, published):
    error = log10(figure1[1]["alignment_error"].sel(init="gaussian", alpha=alpha).sel(time=1.1, method="nearest"))
    assert float(error.mean()) == pytest.approx(published, abs=0.25)


@pytest.mark.parametrize(("alpha", "published"), [(1e-3, -12.6), (1e-4, -16.4), (1e-5, -20.2)])
def test_loss_at_the_end_of_its_panel(figure1, alpha, published):
    loss = log10(figure1[1]["loss"].sel(init="gaussian", alpha=alpha).isel(time=-1))
    assert float(loss.mean()) == pytest.approx(published, abs=1.0)


def test_spectral_initialisation_removes_the_plateau(figure1):
    assert float(figure1[1]["loss"].sel(init="spectral").isel(time=-1).max()) < 1e-24


def test_the_other_side_does_not_reproduce_the_figure():
    """Why side "B": with A random, as the paper's text has it, the alignment panel ends 1.5 decades lower."""
    other = dataclasses.replace(EXPERIMENTS["1"].parts[""], side=("A",))
    dataset = sweep(draw_all(other), **sweep_arguments(other), progress=False)
    error = dataset["alignment_error"].sel(init="gaussian", alpha=1e-4).sel(time=1.1, method="nearest")
    assert float(log10(error).mean()) < -6.75 - 1.0


def test_it_draws_the_picture_of_the_readme(figure1):
    """Every curve and band, to what two runs may differ by: what docs/images shows is not from another version."""
    out, _ = figure1
    stored, fresh = (json.loads((folder / "figure1.json").read_text()) for folder in (STORED, out / "figures"))
    check_agrees(stored, fresh)
    assert [one["title"][:3] for one in stored] == ["(a)", "(b)", "(c)"]


def test_picture_and_report(figure1):
    out, _ = figure1
    before = (out / "report.md").read_text()
    assert main(["plot", str(out)]) == 0
    assert (out / "report.md").read_text() == before
    assert sorted(path.name for path in (out / "figures").iterdir()) == ["figure1.json", "figure1.png"]
    assert (out / "figures" / "figure1.png").stat().st_size > 50_000
    report = (out / "report.md").read_text()
    assert "figures/figure1.png" in report
    assert "| 0.907 | 1e-05 | log10 loss at t = 5 | -20.23 |" in report

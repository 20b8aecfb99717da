"""The named figures: Figure 3 against its published values, the others drawn from small grids of the same kind."""

import dataclasses
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from lora_flow import load_run
from lora_flow.cli import main
from lora_flow.cli.figure import Figure
from lora_flow.experiments import paper
from lora_flow.experiments import table as experiments
from lora_flow.results.report import log10


@pytest.fixture(scope="module")
def figure3(tmp_path_factory):
    out = tmp_path_factory.mktemp("figures") / "figure3"
    assert main(["figure", "3", "--seeds", "6", "--out", str(out)]) == 0
    return out, {name: load_run(out / name) for name in paper.FIGURE_3}


@pytest.mark.parametrize("name", paper.FIGURE_3)
def test_figure_3_has_the_published_alignment_errors_with_side_b_only(figure3, name):
    row = paper.FIGURE_3[name]
    errors = figure3[1][name]["alignment_error"].sel(init="gaussian")
    errors = errors.sel(time=row.alignment_until, method="nearest")
    mean = log10(errors).mean("seed").squeeze()
    np.testing.assert_allclose(mean.sel(side="B", alpha=list(paper.ALPHAS)), row.alignment, atol=0.25)
    assert np.all(mean.sel(side="A") < mean.sel(side="B") - 1.0)


@pytest.mark.parametrize("name", paper.FIGURE_3)
def test_figure_3_has_the_published_losses(figure3, name):
    """Within 1.0, where gradient descent resolves them; at delta_w = 1/100, alpha = 1e-5 the paper's is rounding."""
    row = paper.FIGURE_3[name]
    loss = log10(figure3[1][name]["loss"].isel(time=-1).sel(init="gaussian", side="B")).mean("seed").squeeze()
    for alpha, published in zip(paper.ALPHAS, row.loss, strict=True):
        if published > -27.0:
            assert float(loss.sel(alpha=alpha)) == pytest.approx(published, abs=1.0)
        else:
            assert float(loss.sel(alpha=alpha)) < published


def test_figure_3_is_one_picture_a_side_and_one_table(figure3):
    out, _ = figure3
    assert sorted(path.name for path in (out / "figures").iterdir()) == [
        f"figure3{side}.{kind}" for side in ("-A", "") for kind in ("json", "png")
    ]
    report = (out / "report.md").read_text()
    assert report.count("| log10(1 - cos) at t") == 9
    assert report.count("| log10 loss at t") == 9
    assert "What theory predicts" in report
    assert main(["plot", str(out)]) == 0
    assert (out / "report.md").read_text() == report
    assert main(["figure", "3", "--seeds", "6", "--out", str(out)]) == 2, "it is not overwritten unasked"
    assert main(["figure", "3", "--seeds", "6", "--out", str(out), "--resume"]) == 0
    assert main(["figure", "3", "--seeds", "7", "--out", str(out), "--resume"]) == 2


def test_a_figures_runs_can_be_drawn_alone_and_a_missing_one_is_named(figure3, tmp_path, capsys):
    out, _ = figure3
    part = tmp_path / "figure3"
    shutil.copytree(out / "delta_w-0.25", part / "delta_w-0.25")
    assert main(["plot", str(part)]) == 2
    assert "must hold all the runs of figure 3, got none of delta_w-0.01, delta_w-0.907" in capsys.readouterr().err
    assert main(["plot", str(part / "delta_w-0.25")]) == 0
    assert (part / "delta_w-0.25" / "figures" / "sweep-A.png").is_file()


def test_a_figure_of_several_runs_takes_no_folder_with_anything_else(tmp_path, capsys):
    (tmp_path / "report.txt").write_text("mine")
    for flags in ([], ["--overwrite"], ["--resume"]):
        assert main(["figure", "3", "--out", str(tmp_path), *flags]) == 2
        assert "out must be a new folder or this figure's, got" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report.txt"]


def smaller(settings):
    """The same axes with fewer values, seeds and times."""
    few = {name: getattr(settings, name)[::2] for name in ("alpha", "angle", "noise")}
    few |= {"delta_w": settings.delta_w[::3]}
    return dataclasses.replace(settings, **few, seeds=2, saves=21, t1=2.0)


@pytest.mark.long
@pytest.mark.parametrize("name", ["phase", "beyond", "4"])
def test_the_other_figures_are_drawn(name, tmp_path, monkeypatch, capsys):
    whole = experiments.EXPERIMENTS[name]
    runs = {run: smaller(settings) for run, settings in whole.parts.items()}
    monkeypatch.setitem(experiments.EXPERIMENTS, name, dataclasses.replace(whole, parts=runs))
    out = tmp_path / name
    assert main(["figure", name, "--out", str(out)]) == 0
    drawn = whole.draw({run: load_run(out / run) for run in runs})
    for suffix, figure in drawn.items():
        shown = [np.asarray(line.get_ydata(), float) for ax in figure.axes for line in ax.lines]
        shown += [image.get_array().filled(np.nan) for ax in figure.axes for image in ax.images]
        assert len(shown) >= 6, suffix
        assert all(np.isfinite(values).any() for values in shown)
        plt.close(figure)
    assert len(list((out / "figures").glob("*.png"))) == len(drawn)
    assert "picture: " in capsys.readouterr().out
    assert "| " in (out / "report.md").read_text()


def test_the_help_of_the_command_has_each_experiment_and_what_it_is_about():
    listed = re.findall(r"^    - ([\w-]+): (.*)$", Figure.__doc__, re.MULTILINE)
    assert listed == [(name, one.about) for name, one in experiments.EXPERIMENTS.items()]


def test_the_page_of_figures_has_each_experiment():
    page = (Path(__file__).parents[2] / "docs" / "figures.md").read_text()
    names = [name for name in experiments.EXPERIMENTS if not name.isdigit()]
    assert [name for name in names if f"`{name}`" not in page and f"figure {name}`" not in page] == []

"""What all pictures share: where plotting functions are imported from, bands, letters and legends."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from many_lanes import opened, results, with_gaps

from lora_flow import figures
from lora_flow.figures.style import STYLE, Mark, axes_or_new, band, keys, letters, panels, quantiles, shades
from lora_flow.storage import blocks

DRAWS = xr.DataArray(
    [[1.0, 1.0], [10.0, 2.0], [100.0, 4.0], [1000.0, 3.0]], dims=("seed", "x"), coords={"x": [2.0, 5.0]}
)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_the_documented_plotting_functions_are_imported_from_figures():
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    documented = re.findall(r"^::: lora_flow\.figures\.(\w+)$", page, re.MULTILINE)
    assert sorted(documented) == sorted(figures.__all__)


def test_matplotlib_is_imported_when_something_is_drawn():
    code = "import sys, lora_flow.figures.style; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_range_has_all_the_draws_and_the_median_of_the_axes_scale():
    np.testing.assert_allclose(quantiles(DRAWS, log=True, spread="range")[:, 0], [1.0, 10**1.5, 1000.0])
    np.testing.assert_allclose(quantiles(DRAWS, log=False, spread="range")[:, 0], [1.0, 55.0, 1000.0])


@pytest.mark.parametrize("log", [True, False])
def test_quantiles_of_a_few_columns_at_once_are_those_of_all(monkeypatch, log):
    """Of a lane that has failed the rest counts; two columns of 14 saves are read at once."""
    values, readings = with_gaps(results(seeds=9, saves=14)).isel(delta_w=0, init=0, side=0, alpha=0, rank=0), []
    expected = quantiles(values["loss"], log, floor=1e-9)
    monkeypatch.setattr(blocks, "AT_ONCE", 2 * 9 * 8)
    np.testing.assert_array_equal(quantiles(opened(values, readings)["loss"], log, floor=1e-9), expected)
    assert readings == [2 * 9 * 8] * 7
    assert np.isfinite(expected).all()


def test_a_band_is_the_median_between_its_ends_as_far_as_it_goes():
    ax = axes_or_new(None)
    band(DRAWS, ax, spread="range", color="C0")
    (line,), (filled,) = ax.lines, ax.collections
    np.testing.assert_allclose(line.get_ydata(), [55.0, 2.5])
    heights = filled.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (1.0, 1000.0)
    assert ax.get_xlim() == (2.0, 5.0)
    assert axes_or_new(ax) is ax


def test_panels_are_lettered_in_the_style_of_all_pictures_which_ends_with_them():
    before = plt.rcParams["font.size"]
    assert before != STYLE["font.size"]
    with panels(1, 2, height=2.0, look={"axes.titlesize": 5}, sharey=True) as (figure, axes):
        assert plt.rcParams["font.size"] == STYLE["font.size"]
        assert axes.shape == (1, 2)
        axes[0, 0].set(title="Loss", ylim=(1, 3))
        letters(axes)
    assert plt.rcParams["font.size"] == before
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["(a) Loss", "(b)"]
    assert [ax.get_title() for ax in figure.axes] == ["", ""]
    assert figure.axes[1].get_ylim() == (1, 3)
    assert figure.axes[0].title.get_fontsize() == 5
    assert tuple(figure.get_size_inches()) == (7.2, 2.0)


def test_a_legend_names_each_mark_once_without_the_gaps_of_its_curve():
    (key,) = keys([Mark("mine", {"color": "red", "marker": "o", "markevery": 20})])
    assert (key.get_label(), key.get_color(), key.get_markevery()) == ("mine", "red", None)


def test_shades_go_from_dark_to_light():
    brightness = shades(4)[:, :3].mean(axis=1)
    assert np.all(np.diff(brightness) > 0)
    assert shades(4, until=0.5)[-1, :3].mean() < brightness[-1]

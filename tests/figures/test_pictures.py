"""What pictures show: quartiles within what a quantity can be, the rounding floor, and saddles."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from lora_flow.figures import plot_alignment, plot_loss, plot_phases
from lora_flow.figures.over_time import save, shade_phases, single_cases
from lora_flow.figures.shown import shown
from lora_flow.figures.style import band, mark_rounding, quantiles


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def run(loss, seeds=3):
    """A run whose seeds differ by a factor 100 in everything that may, and in nothing that may not."""
    time = np.linspace(0, 20, 81)
    factor = np.geomspace(0.1, 10, seeds)[:, None]
    lane = {
        "loss": factor * loss(time),
        "alignment_error": np.minimum(1.0, factor * np.exp(-time)),
        "norm_z1": factor * np.ones_like(time),
        "overlap_1": factor * 1e-6 * np.exp(2 * time),
        "norm_along1": factor * 1e-3 * np.exp(time),
        "norm_across1": factor * np.full_like(time, 1e-2),
    }
    lane |= {name.replace("1", "2"): lane[name] for name in ("overlap_1", "norm_along1", "norm_across1")}
    gains = {"sigma": 2.0, "sigma_w1": 0.5, "sigma_w2": 1.0, "aligned": 1, "shift_rank": 1}
    dims = ("init", "alpha", "seed", "time")
    return xr.Dataset(
        {name: (dims, values[None, None]) for name, values in lane.items()}
        | {"rounding_floor": (dims[:3], np.full((1, 1, seeds), 1e-27))},
        coords={"init": ["gaussian"], "alpha": [1e-3], "seed": range(seeds), "time": time, **gains},
    )


def two_drops(time):
    return 10 ** np.interp(time, [0, 3, 5, 12, 14, 20], [0, 0, -2, -2.1, -8, -8.1])


def test_quartiles_are_those_of_the_draws_on_the_scale_of_the_axis():
    values = xr.DataArray([[1e-4], [1e-2], [1.0], [np.nan]], dims=("seed", "time"), coords={"time": [0.0]})
    np.testing.assert_allclose(quantiles(values, log=True)[:, 0], [1e-3, 1e-2, 1e-1])
    np.testing.assert_allclose(quantiles(values, log=False)[:, 0], np.quantile([1e-4, 1e-2, 1.0], [0.25, 0.5, 0.75]))
    np.testing.assert_allclose(quantiles(values, log=True, floor=1e-1)[:, 0], [1e-1, 1e-1, 10**-0.5])


def test_no_band_shows_an_alignment_error_above_one():
    """log10 mean plus deviation of .1, 1 and 1, which errors may be, is 1.49; quartiles are among the draws."""
    ax = plot_alignment(run(two_drops))
    (one,) = shown(ax.figure)
    assert one["scale"] == "log"
    assert len(one["bands"]) == 1
    assert max(edge for band in one["bands"] for side in band for edge in side) == 1.0


def test_a_loss_is_drawn_down_to_its_rounding_floor_which_is_a_line():
    def loss(time):
        return 10 ** np.interp(time, [0, 10, 20], [0, -30, -70])

    ax = plot_loss(run(loss))
    lines = [np.asarray(line.get_ydata()) for line in ax.lines]
    assert min(float(np.min(y)) for y in lines) == 1e-27
    assert [text.get_text() for text in ax.texts] == ["rounding"]
    assert ax.get_ylim()[0] >= 1e-31
    assert not plot_loss(run(two_drops)).texts, "not where no curve comes near it"


def test_a_curve_of_one_time_is_drawn_without_a_warning():
    """As of a run whose phases end before its second save."""
    one = run(two_drops).isel(time=[0])
    assert [len(line.get_xdata()) for line in plot_loss(one).lines] == [1]


def test_a_floor_that_differs_between_seeds_is_kept_to_by_each():
    loss = xr.DataArray(np.full((2, 2), 1e-40), dims=("seed", "time"), coords={"time": [0.0, 1.0]})
    ax = plt.subplots()[1]
    ax.set_yscale("log")
    band(loss, ax, 1e-25)
    mark_rounding(ax, 1e-25)
    assert all(np.all(np.asarray(line.get_ydata()) == 1e-25) for line in ax.lines)


def test_the_numbers_of_a_picture_end_at_the_edge_of_its_axes():
    ax = plt.subplots()[1]
    ax.set(yscale="log", ylim=(1e-12, 2))
    ax.plot([0, 1, 2], [1.0, np.nan, 1e-30])
    ax.fill_between([0, 1], [0.5, 1e-31], [4.0, 1e-29])
    (one,) = shown(ax.figure)
    assert one["lines"] == [[1.0, None, 1e-12]]
    assert sorted(map(sorted, one["bands"][0])) == [[1e-12, 0.5], [1e-12, 2.0]]


def test_a_run_of_which_nothing_has_run_yet_is_an_empty_picture():
    one = run(two_drops)
    empty = one.assign({name: one[name] * np.nan for name in one.data_vars})
    ax = plot_loss(empty)
    assert [line for line in ax.lines if np.isfinite(line.get_ydata()).any()] == []
    assert not ax.texts


@pytest.mark.parametrize(("sigma_w1", "layer"), [(0.5, 1), (1.0, 1), (1.0 + 1e-12, 1), (2.0, 2)])
def test_the_panels_show_the_layer_that_aligns_first_and_say_which(sigma_w1, layer):
    one = run(two_drops).assign_coords(sigma_w1=sigma_w1)
    one = one.assign(alignment_error_2=0.1 * one["alignment_error"], norm_z2=7 * one["norm_z1"])
    error, norm = one["alignment_error" if layer == 1 else "alignment_error_2"], one[f"norm_z{layer}"]
    alone = plot_alignment(one)
    np.testing.assert_allclose(alone.lines[0].get_ydata(), quantiles(error.squeeze(["init", "alpha"]), log=True)[1])
    assert alone.get_title() == f"Alignment of layer {layer}, gaussian"
    assert rf"\gamma_{layer}, Z_{layer}" in alone.get_ylabel()
    phases = plot_phases(one, until=20.0)
    curves = {line.get_label(): line.get_ydata() for line in phases.lines}
    for label, values in ((rf"$1 - \cos(\gamma_{layer}, Z_{layer})$", error), (rf"$\|Z_{layer}\|$", norm)):
        np.testing.assert_allclose(curves[label], quantiles(values.squeeze(["init", "alpha"]), log=True)[1])
    assert phases.get_ylabel() == f"layer {layer}, and loss L (log scale)"


@pytest.mark.parametrize(
    ("ends", "shaded"),
    [
        ((2.0, 5.0, 9.0), [("align", 0, 2), ("grow", 2, 5), ("converge", 5, 9), ("slow tail", 9, 20)]),
        ((2.0, 5.0, np.inf), [("align", 0, 2), ("grow", 2, 5), ("converge", 5, 20)]),
        ((2.0, np.inf, np.inf), [("align", 0, 2), ("grow", 2, 20)]),
        ((2.0, np.nan, np.nan), [("align", 0, 2)]),  # no layer is selected, or the start is taken off the weights
        ((np.nan, 5.0, 9.0), [("grow", 0, 5), ("converge", 5, 9), ("slow tail", 9, 20)]),  # over before the first save
        ((np.nan, np.nan, np.nan), []),  # failed
    ],
)
def test_phases_are_shaded_as_far_as_they_are_known(ends, shaded):
    ax = plt.subplots()[1]
    ax.set_xlim(0, 20)
    names = ("t_align", "t1", "t_plateau")
    spans = xr.Dataset(dict(zip(names, ends, strict=True)) | {"t1_predicted": np.nan, "aligned": 1, "shift_rank": 1})
    shade_phases(spans, ax)
    assert [(one.get_label(), one.get_x(), one.get_x() + one.get_width()) for one in ax.patches] == shaded


def test_the_rounding_floor_is_that_of_the_loss_alone():
    tiny = run(two_drops).assign(norm_z1=1e-35 * run(two_drops)["norm_z1"])
    assert not plot_phases(tiny).texts


def test_the_panels_of_one_layer_number_none():
    assert plot_alignment(run(two_drops)).get_title() == "Alignment error, gaussian"
    assert plot_phases(run(two_drops)).get_ylabel() == "value (log scale)"


def test_phases_are_named_as_what_they_are_and_saddles_hatched():
    ax = plot_phases(run(two_drops))
    labels = ax.get_legend_handles_labels()[1]
    assert {"align", "grow", "converge", "slow tail", "saddle"} <= set(labels)
    assert "plateau" not in labels
    (hatched,) = [patch for patch in ax.patches if patch.get_hatch()]
    left, right = hatched.get_x(), hatched.get_x() + hatched.get_width()
    assert (left, right) == (5.0, 12.0)


def test_pictures_have_names_that_files_can_have(tmp_path):
    labels = ["a/b", "c d:2", "gaussian-both:0.1", "a b", "a-b", "A-B", "a-b-2"]
    several = xr.concat([run(two_drops)] * len(labels), "problem", coords="minimal").assign_coords(problem=labels)
    status = several["rounding_floor"].expand_dims(rank=[1])
    names = [suffix for suffix, _ in single_cases(several.expand_dims(rank=[1]).assign(status=status))]
    assert names[:3] == ["-problem-a-b", "-problem-c-d-2", "-problem-gaussian-both-0.1"]
    assert names[3:] == ["-problem-a-b-2", "-problem-a-b-3", "-problem-A-B-4", "-problem-a-b-2-2"]
    save({name: plt.figure() for name in names}, tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == len(labels)

"""What the pictures of an image check show: of each draw what it can be, and of several their quartiles."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from lora_flow_vision.figures import plot_early, plot_over_stds, plot_starts
from lora_flow_vision.results import saved_steps

from lora_flow.figures.shown import shown

STEPS = saved_steps(20)
COORDS = {"optimizer": ["sgd"], "init": ["gaussian-A"], "alpha": [1e-3, 0.1, 1.0], "rank": [2], "seed": range(3)}
COORDS["step"] = STEPS
ATTRS = {"aligned_at": 1e-3, "sgd_rate": 0.1}


def results(*draws):
    """Every quantity is the same at all steps and standard deviations: these numbers, one for each seed."""
    sizes = tuple(map(len, COORDS.values()))
    values = np.broadcast_to(np.asarray(draws)[:, None], sizes)
    names = ("alignment", "norm_z", "train_loss", "test_loss", "train_accuracy", "test_accuracy")
    return xr.Dataset({name: (tuple(COORDS), values) for name in names}, COORDS, ATTRS)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def ends(ax):
    """The least and the largest that bands, bars and lines show."""
    (one,) = shown(ax.figure)
    bars = [
        corner
        for bar in ax.collections
        if hasattr(bar, "get_segments")
        for line in bar.get_segments()
        for corner in line[:, 1]
    ]
    values = (
        [y for line in one["lines"] for y in line] + [y for two in one["bands"] for edge in two for y in edge] + bars
    )
    return min(values), max(values)


def test_alignment_is_shown_between_0_and_1():
    """Of 0.7, 1 and 1, which alignments may be, mean plus deviation is 1.04."""
    early = results(0.7, 1.0, 1.0).sel(init="gaussian-A", alpha=1e-3)
    assert ends(plot_early(early, "alignment", "sgd")) == (0.85, 1.0)


def test_accuracies_are_shown_up_to_1():
    for name in ("train_accuracy", "test_accuracy"):
        ax = plot_over_stds(results(0.7, 1.0, 1.0).isel(rank=0), name, "sgd")
        assert ends(ax) == pytest.approx((0.85, 1.0))
        assert ax.get_yscale() == "linear"


def test_losses_and_norms_are_shown_above_0():
    """Of 1e-4, 1e-2 and 100 mean minus deviation is -14; on a logarithmic axis the quartiles are 1e-3 and 1."""
    data = results(1e-4, 1e-2, 100.0)
    early = data.sel(init="gaussian-A", alpha=1e-3)
    for ax in (
        plot_early(early, "norm_z", "sgd"),
        plot_over_stds(data.isel(rank=0), "train_loss", "sgd"),
        plot_starts(data["train_loss"].isel(rank=0, alpha=1), "sgd"),
    ):
        assert ax.get_yscale() == "log"
        assert ends(ax) == pytest.approx((1e-3, 1.0))


def test_a_run_that_diverged_is_left_out_of_the_quartiles():
    ax = plot_starts(results(1e-2, 1.0, np.nan)["train_loss"].isel(rank=0, alpha=1), "sgd")
    assert ends(ax) == pytest.approx((10**-1.5, 10**-0.5), rel=1e-3)

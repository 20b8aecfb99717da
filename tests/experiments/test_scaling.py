"""What is read off the plane of (sqrt(s) std, sqrt(s) eta), on planes of known shape, and the figure's small run."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from lora_flow.experiments import relu_layers, scaling, scaling_plane

RANKS = np.array(scaling.RANKS)


def plane_of(log_loss):
    """The plane with this log10 of the loss, a function of log10 of (rank, a, e)."""
    axes = {"rank": RANKS, "size": scaling_plane.SIZES, "step": scaling_plane.STEP_SIZES}
    ranks, sizes, steps = (xr.DataArray(np.log10(values), {dim: values}, dim) for dim, values in axes.items())
    return 10 ** log_loss(ranks, sizes, steps).transpose("rank", "size", "step").expand_dims(seed=[0, 1])


def test_the_best_lora_alpha_is_found_between_the_grid_points():
    """Losses that are a parabola in log10(lora_alpha) about 1.6 + p log10(r), whatever the step."""
    exponent, unit = 0.5, np.log10(scaling_plane.STD)

    def log_loss(rank, size, step):
        return ((2 * (size - unit) + rank - 1.6 - exponent * rank) / 3) ** 2 + 0 * step

    for rate in scaling.RATES[:3]:
        found = scaling_plane.best_alphas(plane_of(log_loss), rate)
        np.testing.assert_allclose(found["place"], (1.6 + exponent * np.log10(RANKS))[:, None] + [[0, 0]], atol=1e-9)
        np.testing.assert_allclose(found["p"], exponent)
        np.testing.assert_allclose(found["high"] - found["low"], 6 * np.log10(1.1) ** 0.5, rtol=0.1)


def test_each_law_has_the_exponent_that_it_is_told_to_have_where_the_signal_alone_matters():
    """A loss of e^2 r alone."""
    plane = plane_of(lambda rank, size, step: (2 * step + rank + 4.3) ** 2 / 9 + 0 * size)
    for name, law in scaling.LAWS.items():
        rates, exponents = scaling_plane.best_rates(plane, law.scaling)
        np.testing.assert_allclose(exponents, law.exponent, atol=1e-9, err_msg=name)
        squared = 10 ** (2 * rates) * (law.scaling(RANKS) * RANKS)[:, None]  # s eta^2 r
        np.testing.assert_allclose(np.log10(squared), -4.3, atol=1e-9)


def test_a_best_value_at_the_end_of_the_grid_is_none():
    best = scaling_plane.least(np.arange(5.0), np.arange(5.0))
    assert np.isnan(best.place)
    assert (best.low, best.high) == (0.0, pytest.approx(np.log10(1.1), abs=0.01))


@pytest.mark.long
def test_the_figure_draws_planes_laws_and_layers(small, reported, monkeypatch):
    monkeypatch.setattr(relu_layers, "STEPS", 50)
    dataset = small(scaling, RANKS=(1, 2, 3, 4), STEPS=60, SAVES=7, FACTORS=(1.0, 512.0))
    assert np.isfinite(dataset["last"].sel(step=1e-3, method="nearest")).all()
    blown = dataset["layers_largest"].isel(factor=-1).max("seed") > 2
    assert blown.sel(optimizer="adam").values.tolist() == [False, True]
    assert blown.sel(optimizer="gd", raised="lora_alpha")
    figure = scaling.draw(dataset)
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]
    assert [title[:3] for title in titles] == [f"({letter})" for letter in "abcdefghijkl"]
    plt.close(figure)
    report = reported("scaling", dataset)
    assert "LoRA-alpha" in report
    assert "x 512" in report

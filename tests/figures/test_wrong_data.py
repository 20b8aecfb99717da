"""What the plotting functions, and those that read a dataset, say of data that are not theirs: one line."""

import jax
import jaxtyping
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from lora_flow import (
    InputError,
    SingleLayer,
    aligned_problem,
    descend,
    figures,
    gaussian_init,
    phases,
    solve,
    sweep,
)
from lora_flow.figures import panels, phase_diagram, plot_alignment, plot_distance, plot_loss, plot_map, plot_phases

PROBLEM = aligned_problem(jax.random.key(0), m=4, n=4, h=6)
OF_DATASETS = [getattr(figures, name) for name in figures.__all__ if name not in ("panels", "plot_map")]


@pytest.fixture(autouse=True)
def _as_users_have_it(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def swept():
    return sweep(PROBLEM, alpha=(1e-1, 1e-2), rank=2, t1=0.1, saves=3, progress=False)


def called(function, data):
    return function(data, rank=2, delta_w=0.5) if function is phase_diagram else function(data)


@pytest.mark.parametrize("function", [*OF_DATASETS, phases], ids=lambda one: one.__name__)
def test_a_trajectory_is_told_where_its_curves_are(function):
    start = gaussian_init(jax.random.key(1), PROBLEM, rank=2, alpha=1e-2)
    for kind, run in (
        ("Trajectory", solve(PROBLEM, start, t1=0.1, saves=3)),
        ("Descent", descend(PROBLEM, start, steps=3, step=1e-3, saves=3)),
    ):
        with pytest.raises(InputError) as error:
            called(function, run)
        assert str(error.value) == (
            f"dataset must be an xarray.Dataset, as sweep returns it, got a {kind}, whose curves are "
            "trajectory.observables over trajectory.times"
        )


@pytest.mark.parametrize("function", OF_DATASETS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("wrong", [None, 3, "runs/demo", [1.0], xr.DataArray([1.0]), xr.Dataset()], ids=str)
def test_other_data_are_named(function, wrong):
    with pytest.raises(InputError, match=r"^dataset must (be an xarray\.Dataset|have )"):
        called(function, wrong)


def test_what_a_panel_cannot_show_is_named(swept):
    one = swept.isel(rank=0)
    with pytest.raises(InputError, match=r"dataset must have the dims init, alpha, seed, time, such as .*, got alpha,"):
        plot_loss(swept)
    with pytest.raises(InputError, match="dataset must have distance, for plot_distance, got one with alignment_error"):
        plot_distance(one)
    for until in ("1", -1.0, np.nan):
        with pytest.raises(InputError, match="until must be a time, or None, got"):
            plot_alignment(one, until=until)
    for ax in (plt.subplots(1, 2)[1], "ax", one):
        with pytest.raises(InputError, match=r"ax must be one matplotlib\.axes\.Axes, or None, got"):
            plot_phases(one, ax)
    with pytest.raises(InputError, match=r"datasets must be a list of datasets, such as \[dataset.isel\(rank=0\)\]"):
        panels(one, [None])
    with pytest.raises(InputError, match="alignment_until must have 1 items, got"):
        panels([one], [None, None])
    with pytest.raises(InputError, match="alignment_until must be a list"):
        panels([one], 1.0)
    with pytest.raises(InputError, match=r"values must be an xarray\.DataArray"):
        plot_map(swept)
    with pytest.raises(InputError, match="values must have the dim alpha and one more, got alpha, rank, time"):
        plot_map(swept["loss"].isel(init=0, seed=0))
    with pytest.raises(InputError, match="dataset must have the dims alpha, delta_w, init, rank, seed, time, got"):
        phase_diagram(swept, rank=2, delta_w=0.5)
    with pytest.raises(InputError, match="rank must be one of"):
        phase_diagram(swept.expand_dims(delta_w=[0.5]), rank=3, delta_w=0.5)


@pytest.mark.parametrize("name", ["norm_z1", "alignment_error", "sigma_w2", "aligned", "shift_rank", "overlap_1"])
def test_phases_are_drawn_of_all_that_they_show(swept, name):
    with pytest.raises(InputError, match=f"dataset must have .*{name}|dataset must have all .* without {name}"):
        plot_phases(swept.isel(rank=0).drop_vars(name))


@pytest.mark.parametrize(("function", "name"), [(plot_phases, "norm_z2"), (plot_alignment, "alignment_error_2")])
def test_the_second_layer_is_asked_for_where_it_is_shown(swept, function, name):
    """Where W1 has the larger gain the second layer is selected, and layer 1's curve would stand under its name."""
    one = swept.isel(rank=0)
    turned = one.assign_coords(sigma_w1=one["sigma_w2"], sigma_w2=one["sigma_w1"])
    function(turned)
    with pytest.raises(InputError, match=f"dataset must have {name}, for {function.__name__}, got one with"):
        function(turned.drop_vars(name))


def test_a_sweep_of_one_layer_is_drawn_and_has_no_phases():
    one = sweep(SingleLayer(np.eye(3)), alpha=1e-2, rank=1, t1=5.0, saves=11, progress=False).isel(rank=0)
    for function in (plot_loss, plot_alignment, plot_phases):
        function(one).figure.canvas.draw()
    with pytest.raises(InputError, match="dataset must be of a factorisation, for phases"):
        phases(one)

"""What the plotting functions, and those that read a dataset, say of data that are not theirs: one line."""

import dataclasses

import jax
import jaxtyping
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from lora_flow import InputError, SingleLayer, aligned_problem, figures, phases
from lora_flow.dynamics.descend import Descent
from lora_flow.dynamics.integrator import MAX_STEPS, RTOL
from lora_flow.dynamics.solve import Trajectory
from lora_flow.figures import panels, phase_diagram, plot_alignment, plot_distance, plot_loss, plot_map, plot_phases
from lora_flow.sweeps.plan import plan_sweep

PROBLEM = aligned_problem(jax.random.key(0), m=4, n=4, h=6)
OF_DATASETS = [getattr(figures, name) for name in figures.__all__ if name not in ("animate", "panels", "plot_map")]


@pytest.fixture(autouse=True)
def _as_users_have_it(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    yield
    plt.close("all")


def planned(problem, alpha, rank):
    """The dataset of a sweep in which all falls as exp(-t)."""
    how = {"init": "gaussian", "side": "A", "seeds": 1, "solver": "auto", "rtol": RTOL, "max_steps": MAX_STEPS}
    dataset = plan_sweep(problem, alpha=alpha, rank=rank, t1=5.0, saves=11, batch_size=2, **how).empty()
    for one in dataset.data_vars.values():
        one.values[...] = np.exp(-dataset["time"].values) if "time" in one.dims else 0
    return dataset


@pytest.fixture(scope="module")
def swept():
    return planned(PROBLEM, (1e-1, 1e-2), 2)


def called(function, data):
    return function(data, rank=2, delta_w=0.5) if function is phase_diagram else function(data)


@pytest.mark.parametrize("function", [*OF_DATASETS, phases], ids=lambda one: one.__name__)
def test_a_trajectory_is_told_where_its_curves_are(function):
    for kind in (Trajectory, Descent):
        run = object.__new__(kind)  # whose numbers nobody looks at
        for field in dataclasses.fields(kind):
            object.__setattr__(run, field.name, None)
        with pytest.raises(InputError) as error:
            called(function, run)
        assert str(error.value) == (
            f"dataset must be an xarray.Dataset, as sweep returns it, got a {kind.__name__}, whose curves are "
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
    one = planned(SingleLayer(np.eye(3)), 1e-2, 1).isel(rank=0)
    for function in (plot_loss, plot_alignment, plot_phases):
        function(one).figure.canvas.draw()
    with pytest.raises(InputError, match="dataset must be of a factorisation, for phases"):
        phases(one)

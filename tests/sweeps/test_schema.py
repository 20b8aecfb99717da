"""Results in xarray's hands: other formats, joins, and labels of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from lora_flow import (
    DeepLinear,
    InputError,
    LinearNetwork,
    Regression,
    SingleLayer,
    SoftmaxRegression,
    aligned_problem,
    load_run,
    sweep,
)
from lora_flow.cli import main
from lora_flow.results.report import about
from lora_flow.settings import Settings, build_plan
from lora_flow.sweeps.plan import plan_sweep
from lora_flow.sweeps.schema import layers_of

SMALL = aligned_problem(jax.random.key(0), m=4, n=5, h=6)
OTHER = aligned_problem(jax.random.key(1), m=4, n=5, h=6, delta_w=0.25)
SHORT = 70  # letters that fit beside an axis
ASKED = {"rank": 1, "t1": 0.5, "saves": 3, "progress": False, "batch_size": 2}


@pytest.fixture(scope="module")
def dataset():
    return sweep(SMALL, alpha=(1e-2, 1e-1), seeds=2, **ASKED)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("stored") / "run")
    asked = ["--m", "4", "--n", "5", "--h", "6", "--rank", "1", "--alpha", "1e-2", "--seeds", "2", "--details"]
    assert main(["sweep", *asked, "--component", "1", "--t1", "0.5", "--saves", "3", "--out", out]) == 0
    return load_run(out)


@pytest.mark.parametrize("which", ["dataset", "stored"])
def test_results_go_through_netcdf_and_back(which, request, tmp_path):
    dataset = request.getfixturevalue(which)
    dataset.to_netcdf(tmp_path / "run.nc", engine="scipy")
    again = xr.load_dataset(tmp_path / "run.nc", engine="scipy")
    xr.testing.assert_equal(again, dataset)
    assert set(again.attrs) == set(dataset.attrs)
    assert layers_of(again) == layers_of(dataset) == ((6, 5), (4, 6))
    assert about(again) == about(dataset)


def test_attributes_are_text_numbers_or_lists_of_numbers(stored):
    for name, value in stored.attrs.items():
        flat = value if isinstance(value, list) else [value]
        assert all(isinstance(one, int | float) for one in flat) or isinstance(value, str), name
        assert not any(isinstance(one, bool) for one in flat), name
    assert (stored.attrs["component"], stored.attrs["details"], stored.attrs["aligned"]) == ("1", 1, 1)


def test_layers_of_the_first_versions_are_read():
    assert layers_of(xr.Dataset(attrs={"layers": [[6, 5], [4, 6]]})) == ((6, 5), (4, 6))
    assert layers_of(xr.Dataset(attrs={"layers": np.array([4, 5])})) == ((4, 5),)


def test_datasets_join_merge_and_become_tables(dataset):
    more = sweep(SMALL, alpha=(1e-2, 1e-1), seeds=(2, 3), **ASKED)
    joined = xr.concat([dataset, more], "seed", data_vars="minimal", coords="minimal", compat="override", join="outer")
    assert joined["loss"].sizes["seed"] == 4
    np.testing.assert_array_equal(joined["loss"].isel(seed=3), more["loss"].isel(seed=1))
    merged = xr.merge([dataset[["loss"]], dataset[["norm_z1", "status"]]], compat="no_conflicts", join="outer")
    xr.testing.assert_equal(merged["status"], dataset["status"])
    frame = dataset.to_dataframe()
    assert frame["loss"].size == dataset["loss"].size
    assert frame.loc[("gaussian", 1e-2, 1, 1, 0.5), "loss"] == dataset["loss"].sel(alpha=1e-2, seed=1, time=0.5).item()


@pytest.mark.parametrize("labels", [("a", "b"), (1, 0.25), (np.str_("x"), "y"), (True, False), (np.float32(0.5), 2)])
def test_problems_are_labelled_by_text_or_numbers(labels, tmp_path):
    swept = sweep(dict(zip(labels, (SMALL, OTHER), strict=True)), alpha=1e-2, **ASKED)
    swept.to_netcdf(tmp_path / "run.nc", engine="scipy")
    again = xr.load_dataset(tmp_path / "run.nc", engine="scipy")
    for label, problem in zip(labels, (SMALL, OTHER), strict=True):
        gain = problem.spectrum()["sigma_w1"]
        assert float(swept["sigma_w1"].sel(problem=label)) == float(again["sigma_w1"].sel(problem=label)) == gain


@pytest.mark.parametrize(
    "labels",
    [(None, "a"), ("a", 1), ((1, 2), (3, 4)), (float("nan"), 1.0), (None, 0.1), (pd.Timestamp(0), "a"), (1j, 2)],
)
def test_other_labels_are_refused_in_one_line(labels):
    with pytest.raises(InputError, match=r"^problem must be labelled by [^\n]+, got [^\n]+$"):
        sweep(dict(zip(labels, (SMALL, OTHER), strict=True)), alpha=1e-2, **ASKED)


def test_one_layer_goes_through_netcdf(tmp_path):
    planned(PROBLEMS["one layer"]).to_netcdf(tmp_path / "run.nc", engine="scipy")
    assert layers_of(xr.load_dataset(tmp_path / "run.nc", engine="scipy")) == ((4, 5),)


class Watched:
    """A problem of one's own, that says what it records."""

    layers = ((3, 4),)

    def loss(self, adapters):
        ((a, b),) = adapters
        return 0.5 * jnp.sum((jnp.eye(3, 4) - b @ a) ** 2)

    def observe(self, adapters):
        return {"trace": jnp.trace(adapters[0].b @ adapters[0].a)}

    def details(self, adapters):
        return {"spectrum": np.linalg.svd(adapters[0].b @ adapters[0].a, compute_uv=False)}

    def characteristics(self):
        return {"size": 12}

    def meanings(self):
        return {"trace": "trace of B A", "spectrum": "singular values of B A", "size": "entries of the weight"}


RNG = np.random.default_rng(0)
PROBLEMS = {
    "two layers": SMALL,
    "several": {"one": SMALL, "other": OTHER},
    "three layers": DeepLinear([RNG.normal(size=shape) for shape in ((5, 4), (3, 5), (6, 3))], shift=np.eye(6, 4)),
    "one layer": SingleLayer(np.eye(4, 5)),
    "data": Regression(RNG.normal(size=(9, 5)), shift=np.eye(4, 5)),
    "classes": SoftmaxRegression(RNG.normal(size=(9, 5)), labels=np.arange(9) % 4, weight=np.zeros((4, 5))),
    "network": LinearNetwork(np.eye(4, 5)),
    "own": Watched(),
}
FAMILIES = {
    "aligned": {"delta_w": (0.9, 0.25), "problem_seed": (0, 1), "angle": (0.0, 15.0), "noise": (0.0, 0.1), "h": 6},
    "regression": {"kappa": (1.0, 4.0)},
    "pretrained": {"pretraining": ("gaussian-both", "spectral-both"), "h": 6},
}


def planned(problem, **asked):
    given = {"init": "gaussian", "side": ("A", "B"), "alpha": 1e-2, "rank": 2, "seeds": 1, "t1": 0.5, "saves": 3}
    how = {"solver": "auto", "rtol": 5e-4, "max_steps": 100, "batch_size": 64, "details": True}
    return plan_sweep(problem, **given | how | asked).empty()


def unexplained(dataset):
    """The variables without a short `long_name`, and the numbers without `units`."""
    named = {name for name, one in dataset.variables.items() if 0 < len(one.attrs.get("long_name", "")) <= SHORT}
    told = {name for name, one in dataset.variables.items() if not np.issubdtype(one.dtype, np.number)}
    told |= {name for name, one in dataset.variables.items() if one.attrs.get("units")}
    return sorted(set(map(str, dataset.variables)) - named & told)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_variable_says_what_it_is(name):
    assert unexplained(planned(PROBLEMS[name])) == []


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_axis_of_the_command_line_says_what_it_is(kind):
    small = {"m": 4, "n": 5, "rank": (1,), "alpha": (1e-2,), "t1": 0.5, "saves": 3}
    assert unexplained(build_plan(Settings(problem=kind, **small, **FAMILIES[kind])).empty()) == []


def test_what_needs_more_words_has_them_as_a_comment_and_angles_are_in_degrees():
    angle = build_plan(Settings(angle=(0.0, 15.0), m=4, n=5, h=6, rank=(1,), alpha=(1e-2,), t1=0.5, saves=3)).empty()
    assert (angle["loss"].long_name, angle["loss"].units) == ("loss", "1")
    assert angle["loss"].comment == "1/2 ||shift - update||_F^2 of a factorisation, L - L* of a network"
    assert {name for name, one in angle.variables.items() if one.attrs.get("units") == "degree"} == {"angle"}
    assert "units" not in angle["init"].attrs


def test_what_a_layer_is_called_is_told_of_layers_of_any_number():
    deep = planned(PROBLEMS["three layers"])
    assert deep["norm_b3a3"].long_name == "spectral norm of B_3 A_3"
    assert deep["alignment_error_3"].long_name == "1 - |cos(gamma_3, top left singular vector of Z_3)|"
    assert deep["growth_rate_1"].long_name == "d/dt log ||gamma_1^T Z_1||^2"
    assert "norm_z4" not in deep


def test_names_are_those_of_the_runs_that_are_stored():
    of_layers = {"norm_z1", "norm_b1a1", "norm_along1", "norm_across1", "overlap_1", "growth_rate_1"}
    of_layers |= {name.replace("1", "2") for name in of_layers} | {"alignment_error", "alignment_error_2"}
    of_lanes = {"status", "steps", "initial_loss", "rounding_floor", "dead_directions", "loss_floor"}
    of_the_update = {"update_singular_values", "update_alignment_error", "term_1", "term_2", "term_12"}
    own = of_the_update | {"loss_signal", "loss_rest"}
    dataset = planned(SMALL, side="A")
    assert set(dataset.data_vars) == of_layers | of_lanes | own | {"loss", "drift", "gradient_norm"}
    assert dataset["update_singular_values"].sizes["mode"] == 4
    assert {dataset[name].dims for name in of_lanes} == {("init", "alpha", "rank", "seed")}
    assert {dataset[name].dims for name in (*of_layers, "loss")} == {("init", "alpha", "rank", "seed", "time")}
    assert set(planned(SMALL, details=False).data_vars) == set(dataset.data_vars) - own - {
        "growth_rate_1",
        "growth_rate_2",
        "gradient_norm",
    }

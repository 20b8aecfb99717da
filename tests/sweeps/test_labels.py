"""Results in xarray's hands: other formats, joins, and labels of every kind."""

import jax
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from lora_flow import InputError, SingleLayer, aligned_problem, load_run, sweep
from lora_flow.cli import main
from lora_flow.results.report import about
from lora_flow.sweeps.labels import layers_of, portable_attrs

SMALL = aligned_problem(jax.random.key(0), m=4, n=5, h=6)
OTHER = aligned_problem(jax.random.key(1), m=4, n=5, h=6, delta_w=0.25)
ASKED = {"rank": 1, "t1": 0.5, "saves": 3, "progress": False}


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


def test_attributes_of_every_kind_are_made_portable():
    given = {"a": [[6, 5], [4, 6]], "b": True, "c": ["x", "y"], "d": (True, 2.5), "e": np.float32(0.5), "f": 2**40}
    told = portable_attrs(given | {"g": None, "h": np.array([[1.0, 2.0]]), "j": ("top",)})
    expected = {"a": [6, 5, 4, 6], "b": 1, "c": "x, y", "d": [1, 2.5], "e": 0.5, "f": 2.0**40, "h": [1.0, 2.0]}
    assert told == expected | {"j": "top"}
    assert type(told["b"]) is int


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
    swept = sweep(SingleLayer(np.eye(4, 5)), alpha=1e-2, **ASKED)
    swept.to_netcdf(tmp_path / "run.nc", engine="scipy")
    assert layers_of(xr.load_dataset(tmp_path / "run.nc", engine="scipy")) == ((4, 5),)

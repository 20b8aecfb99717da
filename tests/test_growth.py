"""Which settings of a run may change and how, and `extend`."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from lora_flow import InputError, extend, load_run
from lora_flow.growth import united
from lora_flow.settings import Settings, build_plan, to_table
from lora_flow.sweeps.run import open_runs, run

THEN = Settings(m=4, n=5, h=6, alpha=(1e-1, 1e-2), rank=(1,), seeds=3, t1=0.5, saves=3, batch_size=2)


@pytest.mark.parametrize(
    ("then", "asked", "now"),
    [
        ({"seeds": 30}, {"seeds": 60}, {"seeds": 60}),
        ({"seeds": 30}, {"seeds": (30, 31)}, {"seeds": 32}),
        ({"seeds": 3}, {"seeds": (7, 5)}, {"seeds": (0, 1, 2, 7, 5)}),
        ({"seeds": (3, 1)}, {"seeds": 4}, {"seeds": (3, 1, 0, 2)}),
        ({"seeds": (0, 1)}, {"seeds": 3}, {"seeds": 3}),
        ({"seeds": 30}, {"seeds": 30}, {"seeds": 30}),
        ({"seeds": 30}, {"seeds": (3, 4)}, {"seeds": 30}),
        ({"alpha": (1e-3, 1e-4)}, {"alpha": (1e-3, 1e-4, 1e-5)}, {"alpha": (1e-3, 1e-4, 1e-5)}),
        ({"alpha": (1e-3, 1e-4)}, {"alpha": (1e-5,)}, {"alpha": (1e-3, 1e-4, 1e-5)}),
        ({"alpha": (1e-3, 1e-4)}, {"alpha": (1e-5, 1e-3)}, {"alpha": (1e-3, 1e-4, 1e-5)}),
        ({}, {"rank": (2,), "init": ("spectral",)}, {"rank": (1, 2), "init": ("gaussian", "spectral")}),
        ({}, {"devices": 1}, {"devices": 1}),
    ],
)
def test_what_there_is_comes_first(then, asked, now):
    then = dataclasses.replace(THEN, **then)
    assert united(Path("runs/x"), then, dataclasses.replace(then, **asked)) == dataclasses.replace(then, **now)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"t1": 6.0}, r"t1 must be 0.5, as 'runs/x' was started, to extend it, got 6.0"),
        ({"side": ("A", "B")}, r"side must be \('A',\), as 'runs/x' was started, to extend it, got \('A', 'B'\)"),
        ({"problem_seed": (0, 1)}, r"problem_seed must be \(0,\), as 'runs/x' was started, to extend it, got \(0, 1\)"),
        ({"seeds": 2}, r"seeds must be at least 3, as many as 'runs/x' has, or further seeds, got 2"),
    ],
)
def test_what_may_not_change(asked, told):
    with pytest.raises(InputError, match=told):
        united(Path("runs/x"), THEN, dataclasses.replace(THEN, **asked))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out, plan = tmp_path_factory.mktemp("small") / "run", build_plan(THEN)
    with open_runs(out, {"": (to_table(THEN), plan)}) as folders:
        run(folders[""], plan, progress=False)
    return out


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"seeds": 2}, "seeds must be at least 3"),
        ({"seeds": 2.5}, "seeds must be an integer, got 2.5"),
        ({"seeds": "many"}, "seeds must be an integer, got 'many'"),
        ({"alpha": 0.0}, "alpha must be positive and finite"),
        ({"alpha": np.ones((2, 2))}, "alpha must be a number"),
        ({"alpha": [1e-3, 1e-3]}, "alpha must name each value once"),
        ({"rank": 9}, "rank must"),
        ({"init": "hot"}, "init must be"),
    ],
)
def test_wrong_arguments_are_named(out, given, told):
    with pytest.raises(InputError, match=told):
        extend(out, **given)
    assert load_run(out).sizes["seed"] == 3


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match="the run folder must exist, got"):
        extend(tmp_path / "none", seeds=3)
    with pytest.raises(InputError, match=r"must be a run folder, got one without settings.toml"):
        extend(tmp_path, seeds=3)


def test_a_run_that_grew_has_the_bits_of_the_larger_run(out, tmp_path):
    old = load_run(out)
    dataset = extend(out, seeds=np.int64(5), alpha=jnp.asarray([1e-3]), progress=False)
    now = dataclasses.replace(THEN, seeds=5, alpha=(1e-1, 1e-2, 1e-3))
    plan = build_plan(now)
    with open_runs(tmp_path / "alone", {"": (to_table(now), plan)}) as folders:
        run(folders[""], plan, progress=False)
    xr.testing.assert_identical(dataset, load_run(tmp_path / "alone"))
    xr.testing.assert_equal(dataset.sel(seed=old["seed"], alpha=old["alpha"]), old)

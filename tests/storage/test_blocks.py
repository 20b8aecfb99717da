"""What is computed block by block is what is computed at once, and no more than a block is read at a time."""

import numpy as np
import pytest
import xarray as xr
from many_lanes import opened, results

from lora_flow.storage import blocks as blocks_module
from lora_flow.storage.blocks import blocks, blockwise

VALUES = results(seeds=5, saves=7, inits=("gaussian",), sides=("A",))[["loss", "norm_z1", "steps"]]
LANE = 2 * 7 * 8 + 4  # bytes


@pytest.fixture
def at_once(monkeypatch):
    return lambda nbytes: monkeypatch.setattr(blocks_module, "AT_ONCE", nbytes)


@pytest.mark.parametrize("whole", [("time",), ("seed",), ("seed", "time"), ()])
@pytest.mark.parametrize("lanes", [0.01, 1, 3, 5, 12, 10**6])
def test_blocks_are_disjoint_whole_and_no_larger_than_asked_for(at_once, whole, lanes):
    at_once(int(lanes * LANE))
    count = xr.zeros_like(VALUES["loss"], int)
    for place in blocks(VALUES, whole):
        assert not place.keys() & set(whole)
        count[place] += 1
        part = VALUES.isel(place)
        one = all(part.sizes[dim] == 1 for dim in place)
        assert one or part["loss"].nbytes + part["norm_z1"].nbytes <= lanes * LANE
    assert (count == 1).all()


def test_blocks_end_where_chunks_do(at_once):
    """Of 10 lanes at once and chunks of 4, 8 make a block; of 3 at once, 3 do; all 18 have no end between them."""
    one = VALUES.isel(init=0, side=0, alpha=0, rank=0, delta_w=0).isel(seed=[0] * 18)
    for variable in one.variables.values():
        variable.encoding["preferred_chunks"] = {"seed": 4, "time": 7}
    for lanes, ends in ((10, [8, 16, 24]), (3, [*range(3, 21, 3)]), (18, [18])):
        at_once(lanes * LANE)
        assert [place["seed"].stop for place in blocks(one, ("time",))] == ends


def told(dataset):
    """Results over lanes and a new dim, of some dims, and coordinates."""
    loss = dataset["loss"]
    last = loss.isel(time=-1)
    return xr.Dataset(
        {
            "most": loss.max("time"),
            "ends": xr.concat([loss.isel(time=0, drop=True), last.drop_vars("time")], "end").transpose(..., "end"),
            "of_problems": dataset["sigma_w1"] * 2,
        },
        attrs={"made": "here"},
    ).assign_coords(last=last["time"], steps=dataset["steps"])


@pytest.mark.parametrize("lanes", [0.01, 3, 12])
def test_results_of_lanes_are_those_at_once(at_once, lanes):
    readings = []
    expected = told(VALUES)
    at_once(int(lanes * LANE))
    found = blockwise(told, opened(VALUES, readings))
    xr.testing.assert_identical(found, expected)
    assert max(readings) <= max(lanes * LANE, 7 * 8)
    assert sum(readings) == sum(one.nbytes for one in VALUES.data_vars.values()), "everything is read once"
    xr.testing.assert_identical(blockwise(told, VALUES), expected)


@pytest.mark.parametrize("saves", [0.01, 1, 2.5, 40])
def test_quantiles_over_seeds_are_those_at_once(at_once, saves):
    def spread(dataset):
        return dataset.quantile([0.25, 0.5], "seed")

    loss, readings = VALUES[["loss"]], []
    expected = spread(loss)
    at_once(int(saves * 5 * 8))
    xr.testing.assert_identical(blockwise(spread, opened(loss, readings), ("seed",)), expected)
    assert max(readings) <= max(saves, 1) * 5 * 8


def test_what_is_read_is_not_kept(at_once):
    readings = []
    stored = opened(VALUES, readings)
    for _ in range(2):
        blockwise(told, stored)
    assert sum(readings) == 2 * sum(one.nbytes for one in VALUES.data_vars.values())


def test_nothing_is_computed_of_nothing():
    none = blockwise(lambda one: one.max("time"), VALUES[["loss"]].isel(seed=slice(0)))
    assert none["loss"].sizes["seed"] == 0
    assert np.isnan(none["loss"]).all()

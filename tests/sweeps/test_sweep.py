import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import InputError, LinearNetwork, aligned_problem, analyse, solve, sweep
from lora_flow.adapter import Adapter, pad
from lora_flow.initialization import initialize
from lora_flow.sweeps.grid import LANE_DIMS, Problems
from lora_flow.sweeps.plan import digest, plan_sweep

AXES = {"init": ("gaussian", "spectral"), "side": ("A", "B"), "alpha": (1e-3, 1e-1), "rank": (2, 1), "seeds": (5, 0, 3)}
RNG = np.random.default_rng(0)
SMALL = aligned_problem(jax.random.key(0), m=4, n=5, h=6)


@pytest.fixture(scope="module")
def dataset():
    return sweep(SMALL, **AXES, t1=1.0, saves=5, batch_size=7, progress=False)


def test_dimensions_and_labels_are_as_documented(dataset):
    assert dataset["loss"].dims == (*LANE_DIMS, "time")
    assert dataset["status"].dims == LANE_DIMS
    for name, values in AXES.items():
        np.testing.assert_array_equal(dataset["seed" if name == "seeds" else name], values)
    np.testing.assert_allclose(dataset["time"], np.linspace(0, 1, 5))
    assert {"loss", "alignment_error", "norm_z1", "norm_z2", "drift", "status", "steps"} <= set(dataset.data_vars)
    assert dataset["status"].attrs["flag_meanings"].split()[1] == "success"
    assert dataset.attrs["delta_w"] == pytest.approx(1 / 1.05**2)
    assert not np.any(np.isnan(dataset["loss"]))


def test_one_side_is_an_attribute_and_single_values_stay_dimensions():
    one = sweep(SMALL, side="B", alpha=1e-2, rank=1, t1=0.5, saves=3, progress=False)
    assert one["loss"].dims == ("init", "alpha", "rank", "seed", "time")
    assert one["loss"].shape == (1, 1, 1, 1, 3)
    assert np.all(np.isfinite(one["loss"]))
    assert one.attrs["side"] == "B"


def test_every_lane_is_the_solve_of_its_labels(dataset):
    """Padded to the largest rank, sorted, batched and spread over two devices, a lane is what `solve` gives alone."""
    assert jax.local_device_count() == 2
    for init in AXES["init"]:
        for side, alpha, rank, seed in (("A", 1e-3, 1, 3), ("B", 1e-1, 2, 0), ("B", 1e-3, 1, 5)):
            start = initialize(init, jax.random.key(seed), SMALL, rank=rank, alpha=alpha, side=side)
            alone = solve(SMALL, start, t1=1.0, saves=5)
            lane = dataset.sel(init=init, side=side, alpha=alpha, rank=rank, seed=seed)
            assert abs(int(lane["steps"]) - alone.stats["num_steps"]) <= 1  # rounding may decide on a step
            for name, values in alone.observables.items():
                # in other coordinates, so to rounding, which the step-size control amplifies
                np.testing.assert_allclose(lane[name], values, rtol=1e-5, atol=1e-11, err_msg=name)


def test_batch_size_changes_nothing_but_rounding(dataset):
    again = sweep(SMALL, **AXES, t1=1.0, saves=5, batch_size=64, progress=False)
    np.testing.assert_allclose(again["steps"], dataset["steps"], rtol=0, atol=1)  # rounding may decide on a step
    floor = np.sqrt(dataset["rounding_floor"].values[..., None])  # of the norm, which is what rounding moves
    difference = np.abs(np.sqrt(again["loss"]) - np.sqrt(dataset["loss"]))
    assert np.all(difference <= floor + 1e-9 * np.sqrt(dataset["loss"]))


def test_a_batch_holds_like_with_like():
    axes = {"init": ("gaussian", "spectral"), "side": "A", "alpha": (1e-1, 1e-5, 1e-3), "rank": (1, 2), "seeds": 4}
    plan = plan_sweep(SMALL, **axes, t1=1.0, saves=2, solver="auto", rtol=5e-4, max_steps=100, batch_size=8)
    batches = [lanes for box in range(plan.layout.boxes.count) for lanes in plan.layout.batches(box)]
    assert sorted(np.concatenate(batches)) == list(range(48))
    for lanes in batches:
        coordinates = [plan.grid.lane(number) for number in lanes]
        assert len({(lane["init"], lane["alpha"]) for lane in coordinates}) == 1


def test_problems_of_unequal_rates_do_not_wait_for_each_other():
    def largest(scales):
        problems = {scale: aligned_problem(jax.random.key(0), m=4, n=4, h=4, shift_scale=scale) for scale in scales}
        axes = {"init": "gaussian", "side": "B", "alpha": 1e-3, "rank": 1, "seeds": 16}
        how = {"solver": "auto", "rtol": 5e-4, "max_steps": 100, "batch_size": 64}
        return plan_sweep(problems, **axes, t1=5.0, saves=2, **how).layout.width

    assert largest((1.0, 1.1, 1.2, 1.3)) >= 32
    assert largest((0.1, 1.0, 10.0, 1000.0)) <= 16


@pytest.mark.parametrize(("platform", "width"), [("cpu", 64), ("gpu", 2048), ("tpu", 2048)])
def test_a_batch_is_as_large_as_suits_the_device(monkeypatch, platform, width):
    (device,) = jax.local_devices()[:1]
    like = types.SimpleNamespace(platform=platform, device_kind=device.device_kind)
    monkeypatch.setattr(jax, "local_devices", lambda *_: [like])
    axes = {"init": "gaussian", "side": "B", "alpha": 1e-3, "rank": 1, "seeds": 2**15}
    how = {"solver": "auto", "rtol": 5e-4, "max_steps": 100, "batch_size": 0}
    assert plan_sweep(SMALL, **axes, t1=5.0, saves=2, **how).layout.width == width


@pytest.mark.parametrize(
    ("changed", "small"),
    [
        ({}, True),
        ({"seeds": 2000}, False),
        ({"t1": 1e6}, False),
        ({"layout": {"width": 2, "box": {"seed": 1}}}, True),
    ],
)
def test_code_is_optimised_for_many_lanes_and_for_long_runs(changed, small):
    """Whatever part of the run is solved here, and in boxes of any size."""
    axes = {"init": "gaussian", "side": "B", "alpha": 1e-3, "rank": 2, "seeds": 3, "t1": 5.0} | changed
    plan = plan_sweep(SMALL, **axes, saves=2, solver="auto", rtol=5e-4, max_steps=100, batch_size=8)
    assert plan.is_small is small


def test_a_lane_that_fails_does_not_harm_the_others_and_is_told_of_where_progress_is_shown(capsys):
    start = sweep(SMALL, side="B", alpha=(1e-1, 1e-6), rank=1, seeds=2, t1=3.0, saves=3, max_steps=60, batch_size=2)
    assert capsys.readouterr().err.splitlines()[-1] == "2 of 4 runs ended with status max_steps"
    status = start["status"].squeeze()
    assert np.all(status.sel(alpha=1e-1) == 0)
    assert np.all(status.sel(alpha=1e-6) == 1)
    assert not np.any(np.isnan(start["loss"].sel(alpha=1e-1)))
    assert np.all(np.isnan(start["loss"].sel(alpha=1e-6, time=3.0)))
    assert np.all(start["steps"].sel(alpha=1e-6) == 60)


class Lowered(eqx.Module):
    """A loss whose least value lies below 0."""

    by: jax.Array
    layers: tuple = eqx.field(static=True, default=((3, 3),))

    def loss(self, adapters):
        ((a, b),) = adapters
        return jnp.sum((1 - b @ a) ** 2) - self.by


def test_a_loss_that_is_negative_at_the_start_is_refused():
    low, rounded = (Lowered(jnp.asarray(by)) for by in (20.0, 9.0 + 1e-13))
    start = initialize("gaussian", jax.random.key(0), low, rank=1, alpha=0.1, side="A")
    for attempt in (
        lambda: sweep(low, alpha=0.1, rank=1, t1=1.0, saves=3, progress=False),
        lambda: solve(low, start, t1=1.0, saves=3),
    ):
        with pytest.raises(InputError, match=r"^problem must have a loss that is at least 0, got -11$"):
            attempt()
    assert int(solve(rounded, start, t1=1.0, saves=3).status) == 0, "rounding may be"


def test_a_problem_with_nothing_but_a_loss_can_be_swept():
    target = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))

    class SingleLayer:
        layers = ((4, 3),)

        def loss(self, adapters):
            ((a, b),) = adapters
            return 0.5 * jnp.sum((target - b @ a) ** 2)

    result = sweep(SingleLayer(), alpha=(1e-1, 1e-3), rank=(1, 3), seeds=2, t1=100.0, saves=3, progress=False)
    # rank 3 learns everything, rank 1 all but the two smaller singular values (Eckart and Young)
    floor = 0.5 * np.sum(np.linalg.svd(target, compute_uv=False)[1:] ** 2)
    last = result["loss"].isel(time=-1)
    np.testing.assert_allclose(last.sel(rank=1), floor, rtol=1e-3)
    assert np.all(last.sel(rank=3) < 1e-3)
    assert "norm_z2" not in result


@pytest.mark.long
def test_problems_share_one_program_and_each_lane_keeps_its_own():
    problems = {d: aligned_problem(jax.random.key(0), m=4, n=5, h=6, delta_w=d) for d in (4.0, 0.25)}
    axes = {"init": ("gaussian", "spectral"), "alpha": 1e-2, "rank": (1, 2), "seeds": 2}
    swept = sweep(problems, **axes, t1=0.6, saves=4, batch_size=5, details=True, progress=False)
    assert swept["loss"].dims == ("problem", "init", "alpha", "rank", "seed", "time")
    np.testing.assert_allclose(swept["sigma_w1"] / swept["sigma_w2"], swept["problem"], rtol=1e-12)
    for d, problem in problems.items():
        alone = sweep(problem, **axes, t1=0.6, saves=4, details=True, progress=False)
        for name, values in swept.sel(problem=d).data_vars.items():
            rounding = 1e-12 * max(1.0, float(abs(alone[name]).max()))
            np.testing.assert_allclose(values, alone[name], rtol=1e-6, atol=rounding, err_msg=str(name))


def test_problems_of_different_shapes_are_refused():
    with pytest.raises(InputError, match="problem must hold PyTrees of one class, with arrays of the same shapes"):
        sweep({"a": SMALL, "b": aligned_problem(jax.random.key(0), m=4, n=5, h=7)}, rank=1, t1=1.0)


def test_problems_may_hold_what_is_no_array():
    class Scaled(eqx.Module):
        target: jax.Array
        scale: float
        layers: tuple = eqx.field(static=True, default=((4, 3),))

        def loss(self, adapters):
            ((a, b),) = adapters
            return 0.5 * self.scale * jnp.sum((self.target - b @ a) ** 2)

    problems = {k: Scaled(jnp.eye(4)[:, :3] * k, 2.0) for k in (1.0, 3.0)}
    swept = sweep(problems, alpha=1e-1, rank=3, t1=20.0, saves=2, progress=False)
    np.testing.assert_allclose(swept["loss"].isel(time=0).squeeze(), [3.0, 27.0], rtol=1e-6)
    assert np.all(swept["loss"].isel(time=-1) < 1e-6)
    with pytest.raises(InputError, match="2 kinds"):
        sweep({**problems, 5.0: Scaled(jnp.eye(4)[:, :3], 7.0)}, rank=3, t1=1.0)


@pytest.mark.long
def test_details_are_what_analyse_says_of_the_saved_adapters(dataset):
    swept = sweep(SMALL, side="B", alpha=1e-2, rank=(1, 2), seeds=2, t1=1.0, saves=5, details=True, progress=False)
    start = initialize("gaussian", jax.random.key(1), SMALL, rank=2, alpha=1e-2, side="B")
    details = analyse(SMALL, solve(SMALL, start, t1=1.0, saves=5, save_adapters=True).history)
    lane = swept.sel(init="gaussian", alpha=1e-2, rank=2, seed=1)
    assert swept["update_singular_values"].dims[-2:] == ("time", "mode")
    assert not set(details) <= set(dataset.data_vars)
    for name, values in details.items():
        np.testing.assert_allclose(lane[name], values, rtol=1e-6, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("details", [False, True])
def test_memory_is_asked_for_before_coordinates_are_sought(details, monkeypatch):
    def sought(problems, *, rank):
        raise AssertionError("coordinates are sought")

    monkeypatch.setattr("lora_flow.dynamics.ways.coordinates_of", sought)
    monkeypatch.setattr("lora_flow.runtime.memory.free", lambda: 0.0)
    with pytest.raises(InputError, match="the sweep must be small enough for the 0 bytes of memory that are free"):
        sweep(SMALL, t1=1.0, details=details)


class Watched(LinearNetwork):
    """A network, of which `details` sees the hidden units one by one."""

    def details(self, adapters):
        return {"unit": np.linalg.norm(adapters[0].a, axis=-1)}


@pytest.mark.parametrize("at_once", [1, 1000, 2**27])
def test_details_of_wide_networks_see_their_true_units(at_once, monkeypatch):
    """A sweep solves networks wider than out + in in fewer directions, and leaves these for the details."""
    monkeypatch.setattr("lora_flow.dynamics.analysis.AT_ONCE", at_once)
    network = Watched(RNG.normal(size=(2, 3)))
    how = {"t1": 0.5, "saves": 4, "solver": "Tsit5", "rtol": 1e-9, "flow": "lora-plus:2"}
    swept = sweep(
        network, init="gaussian-both", alpha=0.3, rank=(7, 3, 9), seeds=2, details=True, progress=False, **how
    )
    for rank in (7, 3, 9):
        start = initialize("gaussian-both", jax.random.key(1), network, rank=rank, alpha=0.3, side="A")
        ((a, b),) = solve(network, pad(start, 9), **how, save_adapters=True).history  # one program for all ranks
        details = analyse(network, (Adapter(a[:, :rank], b[..., :rank]),), how["flow"])
        lane = swept.sel(rank=rank, seed=1).squeeze()
        np.testing.assert_allclose(lane["unit"].isel(mode=slice(rank)), details.pop("unit"), rtol=1e-6)
        assert np.all(lane["unit"].isel(mode=slice(rank, None)) == 0)
        for name, values in details.items():
            np.testing.assert_allclose(lane[name], values, rtol=1e-6, atol=1e-12, err_msg=name)


@pytest.mark.long
def test_axes_may_be_arrays(dataset):
    again = sweep(
        SMALL,
        init=["gaussian"],
        side="A",
        alpha=jnp.array([1e-3]),
        rank=dataset["rank"].values,
        seeds=np.array([5]),
        t1=1.0,
        saves=5,
        progress=False,
    )
    one = dataset.sel(init="gaussian", side="A", alpha=1e-3, seed=5)
    np.testing.assert_allclose(again["loss"].squeeze(), one["loss"], rtol=1e-9)


def test_the_digest_tells_problems_apart():
    same, other = (Problems.of(aligned_problem(jax.random.key(seed), m=4, n=5, h=6)) for seed in (0, 1))
    assert digest(Problems.of(SMALL)) == digest(same)
    assert digest(Problems.of(SMALL)) != digest(other)
    assert digest(Problems.of({0: SMALL, 1: other.members[0]})) != digest(Problems.of({1: other.members[0], 0: SMALL}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": ()}, "alpha must hold at least one value, got none"),
        ({"alpha": (1e-3, 1e-3)}, "alpha must name each value once"),
        ({"alpha": (1e-3, -1.0)}, "alpha must be positive and finite, got -1.0"),
        ({"rank": (1, 5)}, "rank must lie between 1 and 4, the smallest layer dimension, got 5"),
        (
            {"init": "gausian"},
            r"init must be 'gaussian', .* or learned:FOLDER, got 'gausian' \(did you mean 'gaussian'\?\)",
        ),
        ({"side": "C"}, "side must be 'A' or 'B', got 'C'"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"seeds": (0, -1)}, "seeds must be integers from 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, or 0 for what suits the device, got -1"),
        ({"t1": -1.0}, "t1 must be positive and finite, got -1.0"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(arguments, message):
    with pytest.raises(InputError, match=message):
        sweep(SMALL, **({"t1": 1.0, "rank": 1} | arguments))


def test_spectral_needs_every_rank_to_reach_the_shifts():
    problem = aligned_problem(jax.random.key(0), m=4, n=5, h=6, component=[0, 1])
    with pytest.raises(InputError, match="rank must be at least 2, the rank of the shift, for init spectral, got 1"):
        sweep(problem, init=("gaussian", "spectral"), rank=(2, 1), t1=1.0)

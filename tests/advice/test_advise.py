"""An advice is the simulator's: reduced layers flow as whole ones, and no start that was looked at is faster."""

import itertools

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_flow import InputError, Offset, Regression, SingleLayer, advise, solve, sweep, time_to
from lora_flow.advice.closed import closed_shares
from lora_flow.advice.grid import floors_of, ranks_of
from lora_flow.advice.practice import Practice, kaiming, translation
from lora_flow.advice.starts import _draw, draw
from lora_flow.advice.tasks import KEPT, Task, shares
from lora_flow.algebra.low_rank import LowRank
from lora_flow.bridge.schemes import offsets
from lora_flow.bridge.truncated import Truncated

INITS = ("gaussian", "orthogonal", "spectral", "lora-one", "lora-ga", "gora", "pissa", "milora")


def matrix(rng, shape, sigma):
    u, v = (np.linalg.qr(rng.standard_normal((n, len(sigma))))[0] for n in shape)
    return (u * sigma) @ v.T


def layer(seed, shape=(8, 10), rank=3, **how):
    """A layer with a task of low rank, whose sizes differ from seed to seed."""
    rng = np.random.default_rng(seed)
    sigma = np.sort(rng.uniform(0.3, 1.0, rank))[::-1] * rng.uniform(0.5, 2)
    return SingleLayer(matrix(rng, shape, sigma), weight=rng.standard_normal(shape) / 3, **how)


@pytest.mark.parametrize("init", INITS)
def test_a_reduced_layer_flows_as_the_whole_one(init):
    """Exactly so for a gradient of the rank that is kept, from any start, taken off the weights or not."""
    rng = np.random.default_rng(0)
    shape, times = (56, 70), np.array([0.0, 0.5, 2.0, 8.0])
    problem = SingleLayer(matrix(rng, shape, np.array([2.0, 1.0, 0.5])), 0.7, rng.standard_normal(shape) / 10)
    task = Task.of("layer", problem, 4)
    assert task.is_reduced
    assert len(task.sigma) == KEPT
    start = _draw(task, init, 4, seed=0)
    whole = Offset(problem, (start,)) if offsets(init) else problem
    loss = solve(whole, (start,), t1=8.0, saves=times, rtol=1e-6).observables["loss"] / task.loss
    np.testing.assert_allclose(
        shares(task, [task.enter(start)], [offsets(init)], times)[0], loss, rtol=1e-3, atol=1e-15
    )


@pytest.mark.parametrize(("init", "within"), [("spectral", 2e-3), ("lora-one", 2e-3), ("gaussian", 0.15)])
def test_closed_forms_are_the_simulator_s(init, within):
    """Exact along the singular pairs; from a small random start the pairs are taken apart, which is a guide."""
    task, times = Task.of("layer", layer(0, (20, 30)), 5), np.append(0.0, np.geomspace(0.1, 60, 100))
    (start,) = draw(task, init, 5, 1).scaled(1e-3)
    loss = xr.DataArray(
        [closed_shares(task, start, False, times), shares(task, [start], [False], times)[0]],
        dims=("how", "time"),
        coords={"time": times},
    )
    closed, simulated = time_to(loss, 0.1).values
    assert np.isfinite(simulated)
    np.testing.assert_allclose(closed, simulated, rtol=within)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_ranks_of_several_layers_leave_the_least_loss(seed):
    """No other ranks with the same sum hold more of all gradients together (Eckart and Young, block by block)."""
    rng = np.random.default_rng(seed)
    spectra = [np.sort(rng.uniform(0, 1, 5))[::-1] * rng.uniform(0.1, 2) for _ in range(3)]
    eye = np.eye(5)
    tasks = [
        Task(str(i), (5, 5), 1.0, 4, Truncated(LowRank(eye, s, eye), 0.0, float(np.sum(s**2))))
        for i, s in enumerate(spectra)
    ]
    for rank in (1, 2, 3):
        chosen = ranks_of(tasks, rank, 4)
        others = [one for one in itertools.product(range(1, 5), repeat=3) if sum(one) == 3 * rank]
        assert sum(chosen) == 3 * rank
        assert floors_of(tasks, chosen) <= min(floors_of(tasks, one) for one in others) + 1e-12


FEW, ALL = ("gaussian", "lora-one", "lora-ga"), ("gaussian", "orthogonal", "lora-one", "lora-ga", "pissa")
RANKS = (2, 4)
LEVEL = 0.2


def least_times(layers, init):
    """The least time to the level of all starts of a finer grid that may be recommended, by layer and rank."""
    runs = sweep(
        layers, init=init, alpha=np.geomspace(3e-3, 3.0, 10), rank=RANKS, seeds=2, t1=60.0, progress=False,
        saves=np.append(0.0, np.geomspace(0.01, 60.0, 100)),
    )  # fmt: skip
    whole = xr.DataArray([0.5 * float(np.sum(np.square(one.shift))) for one in layers.values()], dims="problem")
    top = xr.DataArray([np.linalg.norm(one.shift, 2) for one in layers.values()], dims="problem")
    time = time_to(runs["loss"], LEVEL * whole.broadcast_like(runs["loss"].isel(time=0, drop=True))).median("seed")
    gentle = (runs["loss"].isel(time=0) >= 0.9 * whole) & (runs["norm_z1"].isel(time=0) ** 2 <= 2 * top)
    return time.where(gentle.all("seed"), np.inf).min(["init", "alpha"])


@pytest.mark.parametrize(
    ("count", "others", "how"),
    [(3, FEW, {"init": FEW, "size": (0.1, 0.3, 1.0)}), pytest.param(30, ALL, {}, marks=pytest.mark.long)],
    ids=["three layers", "thirty layers"],
)
def test_no_other_start_or_rank_is_much_faster(count, others, how):
    """The alternatives are simulated on the whole layers, over a finer grid of alphas: within 20 % of the best."""
    layers = {seed: layer(seed) for seed in range(count)}
    best = least_times(layers, others)
    for seed, problem in layers.items():
        found = advise(problem, rank=RANKS, level=LEVEL, seeds=2, progress=False, **how)
        time = float(found.recommended.of(found.dataset)["time_level"])
        assert time <= 1.2 * float(best.sel(problem=seed).min()), seed


def test_more_of_a_learning_rate_allows_larger_starts_and_too_much_is_told():
    problem = layer(0)
    slow, fast = (
        advise(problem, rank=4, init="spectral", seeds=1, lr=lr, steps=50, progress=False) for lr in (5e-3, 0.2)
    )
    sizes = [float(one.recommended.of(one.dataset)["relative_size"]) for one in (slow, fast)]
    top = float(np.linalg.norm(problem.shift, 2))
    for lr, size in zip((5e-3, 0.2), sizes, strict=True):
        np.testing.assert_allclose(2 * top * size**2 * lr, 0.98, atol=0.02)  # half of what gradient descent bears
    assert float(slow.dataset["loss_end"].min()) < 1
    wild = advise(problem, rank=4, init=("gaussian", "lora-one"), seeds=1, lr=50.0, progress=False)
    assert wild.recommended is None
    assert wild.reason.startswith("No gentle start")
    assert wild.confidence.level == "low"
    assert "## Over the rank" in wild.table()
    assert "loss after the steps" in slow.table()


def test_confidence_falls_with_what_is_assumed():
    rng = np.random.default_rng(0)
    shift, how = np.asarray(layer(0).shift), {"rank": 3, "init": "lora-one", "progress": False}
    known = advise(Regression(rng.standard_normal((30, 10)), shift), **how)
    white = advise(SingleLayer(shift), **how)
    adam = advise(SingleLayer(shift), lr=1e-3, optimizer="adam", **how)
    assert [one.confidence.level for one in (known, white, adam)] == ["high", "middle", "low"]
    assert "white" in white.confidence.reasons[0]
    assert "no flow" in adam.confidence.reasons[0]


def test_lora_alpha_times_c_is_a_size_times_the_root_and_a_time_times_c():
    """The translation's row, tried: from A of PEFT's size with s = c in place of another size and clock."""
    times = np.append(0.0, np.geomspace(1e-2, 30, 40))
    shift = np.asarray(layer(0).shift)
    one, c = Task.of("layer", SingleLayer(shift), 4), 5.0
    more = Task.of("layer", SingleLayer(shift, c), 4)
    (start,) = draw(one, "gaussian", 4, 1).scaled(kaiming(one.shape))
    (larger,) = draw(one, "gaussian", 4, 1).scaled(np.sqrt(c) * kaiming(one.shape))
    np.testing.assert_allclose(more.size_of(start), one.size_of(larger))
    with_alpha, by_size = shares(more, [start], [False], times / c)[0], shares(one, [larger], [False], times)[0]
    np.testing.assert_allclose(with_alpha, by_size, rtol=1e-2)
    told = {row[0]: row[2] for row in translation(more, 4, Practice(1e-3, 100, "adam"))}
    assert told["learning rate"] == f"a = {np.sqrt(c) * kaiming(one.shape):.4g}, e = {np.sqrt(c) * 1e-3:.4g}"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"level": 0.01, "rank": 2},
            "level must be above 0.12, the share of the loss that rank 2 leaves in problem, got 0.01",
        ),
        ({"rank": 9}, "rank must lie between 1 and 8, the layer's smaller dimension, got 9"),
        ({"optimizer": "adamw"}, "optimizer must be 'gd', 'sign' or 'adam', got 'adamw'"),
        ({"init": "lora-on"}, "did you mean 'lora-one'?"),
        ({"level": 1.5}, "level must lie between 0 and 1, got 1.5"),
    ],
)
def test_what_cannot_be_is_refused(how, message):
    with pytest.raises(InputError, match=message):
        advise(layer(0), progress=False, **how)

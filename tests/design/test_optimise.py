"""Learned starts against closed forms: on one layer the best start of a norm is balanced and along the task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import InputError, SingleLayer, optimise, sweep
from lora_flow.design.objectives import first_zero
from lora_flow.initialization.learned import LearnedStart, load_learned
from lora_flow.initialization.of_norm import gaussian_norm, total_norm

RNG = np.random.default_rng(0)
LEFT, RIGHT = (one / np.linalg.norm(one) for one in (RNG.standard_normal(3), RNG.standard_normal(4)))
LAYER = SingleLayer(2.0 * np.outer(LEFT, RIGHT))
HOW = {"alpha": 1e-2, "rank": 1, "t1": 2.5, "progress": False}


@pytest.fixture(scope="module")
def rule():
    return optimise(LAYER, "scheme", restarts=3, steps=60, **HOW)


def test_the_best_rule_for_one_direction_is_an_equal_mix(rule):
    """[B; A^T] grows along (u, v) alone; of norm 1, its part there is largest where both factors are equal."""
    assert float(rule.start.numbers["mix"]) == pytest.approx(np.pi / 4, abs=0.02)
    assert rule.objective < float(rule.dataset["objective"].isel(step=0).min())


def test_adapters_turn_to_the_task_and_end_as_well_as_the_best_rule(rule):
    found = optimise(LAYER, "adapters", restarts=2, steps=80, **HOW)
    assert found.objective == pytest.approx(rule.objective, abs=0.02)
    ((a, b),) = found.adapters
    assert abs(a[0] @ RIGHT) / np.linalg.norm(a) > 0.999
    assert abs(b[:, 0] @ LEFT) / np.linalg.norm(b) > 0.999
    best = found.dataset.isel(step=-1)
    assert float(best["angle"].max()) < 5
    np.testing.assert_allclose(best["share"].sum(["layer", "factor"]), 1)
    np.testing.assert_allclose(total_norm(found.adapters), gaussian_norm(1e-2, 1, LAYER.layers))


def test_a_learned_start_is_an_initialisation_of_any_scale_and_a_larger_rank(rule, tmp_path):
    rule.start.save(tmp_path)
    how = {"rank": (1, 2), "alpha": (1e-2, 1e-3), "t1": 2.5, "rtol": 2e-4, "solver": "Tsit5", "progress": False}
    run = sweep(LAYER, init=("gaussian", f"learned:{tmp_path}"), **how).isel(time=-1, seed=0)
    loss = np.log10(run["loss"].sel(init=f"learned:{tmp_path}"))
    np.testing.assert_allclose(loss.sel(alpha=1e-2, rank=1), rule.objective, atol=1e-3)
    assert (run["loss"].sel(init=f"learned:{tmp_path}") < run["loss"].sel(init="gaussian")).all()
    assert load_learned(tmp_path) == rule.start
    again = sweep(LAYER, init=rule.start, **how).isel(time=-1, seed=0)
    np.testing.assert_allclose(again["loss"].squeeze("init"), run["loss"].isel(init=1), rtol=1e-12)


def test_what_was_learned_elsewhere_is_refused(tmp_path):
    start = LearnedStart(jax.tree.map(np.asarray, optimise(LAYER, restarts=1, steps=1, **HOW).adapters), 1e-2)
    start.save(tmp_path)
    other = SingleLayer(np.ones((3, 3)))
    with pytest.raises(InputError, match=r"init must be learned on layers of the shapes .*, got adapters of"):
        sweep(other, init=f"learned:{tmp_path}", alpha=1e-2, rank=1, t1=1.0, progress=False)
    with pytest.raises(InputError, match="init must be one that lora-flow optimise has filled, got no"):
        sweep(LAYER, init=f"learned:{tmp_path}/none", alpha=1e-2, rank=1, t1=1.0, progress=False)
    (tmp_path / "learned.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match=r"learned.safetensors' must hold a learned start, got"):
        load_learned(tmp_path)


def test_a_family_is_served_by_its_mean_or_its_worst():
    tasks = {"one": LAYER, "other": SingleLayer(1.5 * np.outer(LEFT, RIGHT))}
    mean, worst = (optimise(tasks, "scheme", over=over, restarts=1, steps=1, **HOW) for over in ("mean", "worst"))
    each = [optimise(task, "scheme", restarts=1, steps=1, **HOW).objective for task in tasks.values()]
    assert mean.objective == pytest.approx(np.mean(each), abs=1e-6)
    assert worst.objective == pytest.approx(np.max(each), abs=1e-6)


def test_a_time_is_that_of_the_sweep():
    found = optimise(LAYER, "scheme", "time to 1e-3", restarts=1, steps=1, **HOW | {"t1": 10.0})
    run = sweep(LAYER, init=found.start, alpha=1e-2, rank=1, t1=10.0, saves=20001, progress=False).squeeze()
    reached = float(run["time"].where(run["loss"] <= 1e-3).min())
    assert found.objective == pytest.approx(reached, rel=1e-3)


def test_the_first_zero_is_between_times():
    times = jnp.array([0.0, 1.0, 3.0])
    assert float(first_zero(times, jnp.array([-1.0, -0.5, 0.5]))) == 2.0
    assert np.isinf(first_zero(times, jnp.array([-3.0, -2.0, -1.0])))
    assert float(first_zero(times, jnp.array([1.0, 2.0, 3.0]))) == 0.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"objective": "log10 los"}, r"objective must be .* got 'log10 los' \(did you mean 'log10 loss'\?\)"),
        (
            {"objective": "time to 1e-30"},
            "objective must be finite at the start .*, got 'time to 1e-30'",
        ),
        ({"over": "best"}, "over must be 'mean' or 'worst', got 'best'"),
        ({"at": 3.0}, "at must be a time after 0 and up to t1 = 2.5, got 3"),
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"rank": 4}, "rank must lie between 1 and 3"),
    ],
)
def test_bad_input_is_refused_by_name(changed, message):
    with pytest.raises(InputError, match=message):
        optimise(LAYER, **{"restarts": 2, "steps": 2} | HOW | changed)

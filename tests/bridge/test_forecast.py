"""A layer watched over a run has the simulator's observables; forecast, it does what the closed forms say."""

import jax
import numpy as np
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_flow import Adapter, SingleLayer, descend, gaussian_init
from lora_flow.algebra.low_rank import LowRank
from lora_flow.bridge.forecast import FALLEN, GROWN, MOST, forecast, spans, until
from lora_flow.bridge.watched import Watched, effective_rank, meanings, update_pairs, watch
from lora_flow.theory.lora_one import linear_phase

SCALING, RANK = 2.0, 3


def drawn(shape=(9, 7), seed=0):
    """-dL/dW, with its singular triplets."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((n, min(shape))))[0] for n in shape)
    s = np.arange(1, min(shape) + 1) ** -1.0
    return (u * s) @ v.T, LowRank(u[:, :2], s[:2], v.T[:2])


def watched(descent, leading, **known):
    return Watched(leading.u[:, 0], leading.vt[0], SCALING, descent, **known)


def states(history):
    return [Adapter(*(np.asarray(factor) for factor in one)) for one in zip(*history, strict=True)]


def test_a_watched_layer_has_the_simulator_s_observables():
    descent, leading = drawn()
    problem = SingleLayer(descent, scaling=SCALING)
    start = gaussian_init(jax.random.key(0), problem, rank=RANK, alpha=1e-2)
    run = descend(problem, start, steps=400, step=0.01, saves=41, save_adapters=True)
    found = watch(watched(descent, leading), states(run.history[0]))
    for name in ("alignment_error", "norm_z1", "norm_b1a1", "norm_along1", "norm_across1", "overlap_1", "drift"):
        own = name.removesuffix("_1").replace("1", "")
        np.testing.assert_allclose(found[own], run.observables[name], rtol=1e-9, atol=1e-14, err_msg=name)
    assert set(found) == {*meanings(), "singular_value"}


def test_the_update_of_an_offset_start_is_what_was_learnt_since():
    descent, leading = drawn()
    rng = np.random.default_rng(1)
    first, later = (Adapter(rng.standard_normal((RANK, 7)), rng.standard_normal((9, RANK))) for _ in range(2))
    layer = watched(descent, leading, start=first, offset=True)
    found = watch(layer, [first, later])
    update = SCALING * (later.b @ later.a - first.b @ first.a)
    u, s, vt = np.linalg.svd(update)
    np.testing.assert_allclose(found["singular_value"], [np.zeros(6), s[:6]], atol=1e-12)
    np.testing.assert_allclose(found["loss_change"], [0, -np.sum(descent * update)], atol=1e-12)
    cosine = (layer.left @ u[:, 0]) * (vt[0] @ layer.right)
    np.testing.assert_allclose(found["update_error"], [np.nan, 1 - cosine], atol=1e-12)
    np.testing.assert_allclose(found["effective_rank"], [np.nan, effective_rank(s)], rtol=1e-9)
    made = update_pairs(layer, later)
    np.testing.assert_allclose((made[0] * made[1]) @ made[2], update, atol=1e-12)


def test_the_effective_rank_counts_equal_values():
    np.testing.assert_allclose(effective_rank(np.array([[2.0, 2, 2, 0], [5, 0, 0, 0]])), [3, 1])
    assert np.isnan(effective_rank(np.zeros(3)))


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), begin=st.sampled_from([0.0, 1.0]), offset=st.booleans())
def test_a_forecast_is_the_closed_form_s_observables(seed, begin, offset):
    descent, leading = drawn((20, 16), seed)
    rng = np.random.default_rng(seed)
    start = Adapter(1e-3 * rng.standard_normal((RANK, 16)), begin * 1e-3 * rng.standard_normal((20, RANK)))
    layer = watched(descent, leading, start=start, offset=offset and begin > 0)
    times = np.linspace(0, 6, 5)
    found = forecast(layer, start, leading, times)
    whole = watch(layer, map(Adapter, *linear_phase(descent, start.a, SCALING * times, start.b)))
    for name, values in whole.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-7, atol=1e-12 * np.nanmax(np.abs(values)), err_msg=name)


def test_a_forecast_ends_where_no_run_can_go():
    descent, leading = drawn()
    start = Adapter(np.ones((RANK, 7)), np.zeros((9, RANK)))
    times = np.array([0.0, MOST / SCALING, 1.01 * MOST / SCALING, 1e6])
    found = forecast(watched(descent, leading), start, leading, times)
    assert np.isfinite(found["norm_b"][:2]).all()
    assert all(np.isnan(values[2:]).all() for values in found.values())


def test_phases_of_one_pair_are_those_of_its_closed_form():
    """From A = a v^T beside noise across, B = 0: the part along is a e^(s sigma t)/sqrt(2), the loss falls by sinh."""
    sigma, a, loss = 0.7, 1e-3, 1.0
    left, right = np.eye(6)[0], np.eye(5)[0]
    start = Adapter(np.stack([a * right, 20 * a * np.eye(5)[1]]), np.zeros((6, 2)))
    layer = Watched(left, right, SCALING, sigma * np.outer(left, right))
    rate, steps = SCALING * sigma, np.arange(0, 8, 0.01)
    found = forecast(layer, start, LowRank(left[:, None], np.array([sigma]), right[None]), steps)
    dataset = xr.Dataset(
        {name: (("layer", "step"), [values, values]) for name, values in found.items() if values.ndim == 1},
        {"step": steps},
    )
    told = spans(dataset, loss)
    across = np.sqrt(2) * 20 * a
    np.testing.assert_allclose(told["t_align"][0], np.log(across / a) / rate, rtol=1e-2)
    # of sigma s a^2 sinh cosh = sigma s a^2 sinh(2 s sigma t)/2
    for name, share in (("t1", GROWN), ("t_fallen", FALLEN / 2)):
        when = np.arcsinh(2 * share * loss / (rate * a**2)) / (2 * rate)
        np.testing.assert_allclose(np.ravel(told[name])[0], when, rtol=1e-3)
    assert np.isnan(spans(dataset, None)["t_fallen"])
    assert np.isnan(spans(dataset, None)["t1"]).all()
    assert np.isinf(until(dataset)).all()


def test_large_steps_and_adam_drift_and_small_steps_do_not():
    import optax

    descent, leading = drawn()
    problem = SingleLayer(descent, scaling=SCALING)
    start = gaussian_init(jax.random.key(0), problem, rank=RANK, alpha=0.3)
    for step, drifts in ((0.005, False), (optax.adam(0.02), True)):
        run = descend(problem, start, steps=200, step=step, saves=21, save_adapters=True)
        found = watch(watched(descent, leading), states(run.history[0]))
        dataset = xr.Dataset({"drift": (("layer", "step"), [found["drift"]])}, {"step": run.iterations})
        assert np.isfinite(until(dataset)[0]) == drifts, found["drift"].max()


def test_theory_tells_up_to_the_last_step_before_the_drift():
    drift = [[0, 0.05, 0.2, 0.01], [0, 0.2, 0.2, 0.2], [0, 0, 0, 0.1]]
    dataset = xr.Dataset({"drift": (("layer", "step"), drift)}, {"step": [0, 10, 20, 30]})
    np.testing.assert_array_equal(until(dataset), [10, 0, np.inf])

"""Phases, on curves whose crossings are known and on runs whose definitions can be evaluated again."""

import jax
import numpy as np
import pytest
import xarray as xr

from lora_flow import InputError, aligned_problem, gaussian_init, phases, solve, sweep
from lora_flow.results.phases import at_times, time_to


def curves(s1=0.5, s2=1.0, loss=None):
    """One lane with overlap_1 = 1e-6 e^(2t), ||gamma^T Z|| = 1e-3 e^t beside a rest of 1e-2, saved coarsely."""
    time = np.linspace(0, 20, 81)
    fast, slow = np.exp(time), np.exp(0.5 * time)
    lane = {
        "loss": np.exp(-0.0 * time) if loss is None else loss(time),
        "overlap_1": 1e-6 * fast**2,
        "norm_along1": 1e-3 * fast,
        "norm_across1": np.full_like(time, 1e-2),
        "overlap_2": 1e-6 * slow**2,
        "norm_along2": 1e-3 * slow,
        "norm_across2": np.full_like(time, 1e-2),
    }
    return xr.Dataset(
        {name: (("alpha", "time"), values[None]) for name, values in lane.items()},
        coords={"alpha": [1e-3], "time": time, "sigma": 2.0, "sigma_w1": s1, "sigma_w2": s2},
    )


def test_crossings_are_interpolated_in_the_logarithm():
    spans = phases(curves())
    assert float(spans["t_align"].squeeze()) == pytest.approx(np.log(10), rel=1e-9)
    threshold = (1 - 0.5) * 2.0 / (4 * 1.0)
    assert float(spans["t1"].squeeze()) == pytest.approx(0.5 * np.log(threshold / 1e-6), rel=1e-9)
    assert float(spans["t1_predicted"].squeeze()) == pytest.approx(np.log(1e3) / 2.0)


def test_from_zero_t1_is_the_first_save_beyond_it():
    """Between the two the overlap grows by an unknown law: linearly, T1 would be at half of the step here."""
    dataset = curves().isel(time=[0, 40, 80])
    assert float(phases(dataset)["t1"].squeeze()) == pytest.approx(0.5 * np.log(0.25 / 1e-6), rel=1e-9)
    at_rest = dataset.assign(overlap_1=dataset["overlap_1"].where(dataset["time"] > 0, 0.0))
    assert float(phases(at_rest)["t1"].squeeze()) == 10.0


def test_where_no_layer_is_selected_there_is_no_t1_and_none_is_predicted():
    spans = phases(curves(s1=1.0, s2=1.0))
    assert np.isnan(spans["t1"]).all()
    assert np.isnan(spans["t1_predicted"]).all()


def test_above_one_the_layers_exchange_roles():
    spans = phases(curves(s1=1.0, s2=0.5))
    assert float(spans["t_align"].squeeze()) == pytest.approx(2 * np.log(10), rel=1e-9)
    assert float(spans["t1"].squeeze()) == pytest.approx(np.log(0.25 / 1e-6), rel=1e-9)


def test_with_equal_gains_there_is_no_t1():
    assert np.isnan(phases(curves(s1=1.0, s2=1.0))["t1"]).all()


@pytest.mark.parametrize(
    ("loss", "start"),
    [
        (lambda t: np.exp(-2 * t) + 1e-10, 12.6),  # stops: the rate is a tenth where e^-2t is 1.1e-11
        (lambda t: np.maximum(np.exp(-2 * t), 1e-8 * np.exp(-0.1 * t)), 9.7),  # falls on, slowly
        (lambda t: np.exp(-2 * t), np.inf),  # still falls at the end
        (lambda t: np.maximum(np.exp(-6 * t), 1e-30), np.inf),  # falls to rounding
        (lambda t: np.maximum(np.exp(-6 * t), 1e-33 * np.exp(np.sin(t))), np.inf),  # and wanders there
        (lambda t: np.maximum(np.exp(-4 * t), 1e-22 * np.exp(-0.35 * t)), 13.9),  # slow before it comes to rounding
    ],
)
def test_the_slow_tail_begins_where_the_loss_slows_down(loss, start):
    found = float(phases(curves(loss=lambda t: 10 * loss(t)))["t_plateau"].squeeze())
    assert found == pytest.approx(start, abs=0.3)


def two_drops(time):
    """1 until t = 3, 1e-2 from t = 5 to 12, 1e-8 from t = 14 on, with straight lines of log L between."""
    return 10 ** np.interp(time, [0, 3, 5, 12, 14, 20], [0, 0, -2, -2.1, -8, -8.1])


def test_a_saddle_lies_between_two_drops_and_the_slow_tail_after_the_last():
    spans = phases(curves(loss=two_drops)).squeeze()
    assert [float(spans[name]) for name in ("saddles", "t_saddle", "t_saddle_end")] == [1, 5.0, 12.0]
    assert float(spans["t_plateau"]) == 14.0
    assert "slow tail" in spans["t_plateau"].attrs["long_name"]


@pytest.mark.parametrize(
    "loss",
    [
        lambda t: 1 / (1 + np.exp(2 * t - 10)),  # one drop from the start's plateau
        lambda t: np.exp(-4 * t) + 1e-6 * np.exp(-0.1 * t),  # a drop and a slow tail
        lambda t: 10 ** np.interp(t, [0, 5, 12, 14, 20], [-2, -2, -2.1, -8, -8.1]) * (1 + 1e-9 * np.exp(-t)),
    ],
)
def test_there_is_no_saddle_without_a_drop_on_either_side(loss):
    spans = phases(curves(loss=loss)).squeeze()
    assert float(spans["saddles"]) == 0
    assert np.isinf(spans["t_saddle"])
    assert np.isinf(spans["t_saddle_end"])


def test_a_mean_over_seeds_of_which_some_do_not_come_to_a_phase_is_no_time():
    one = curves().squeeze("alpha")
    late = one.assign(overlap_1=1e-30 * one["overlap_1"], norm_along1=1e-30 * one["norm_along1"])
    spans = phases(xr.concat([one, one, late], "seed").assign_coords(alpha=1e-3))
    for name in ("t_align", "t1"):
        assert np.isfinite(spans[name]).values.tolist() == [True, True, False]
        assert np.isinf(spans[name].mean("seed"))
        np.testing.assert_allclose(spans[name].median("seed"), spans[name][0])


def test_what_was_over_before_the_first_save_has_no_time():
    spans = phases(curves().isel(time=slice(60, None))).squeeze()
    assert np.isnan(spans["t_align"])
    assert np.isnan(spans["t1"])
    assert np.isnan(spans["t_plateau"])
    assert float(phases(curves().assign(norm_across1=curves()["norm_across1"] * 1e-9))["t_align"].squeeze()) == 0.0


def exponential(times):
    """L = e^(-2 t) of two seeds, of which the second fails at t = 3."""
    loss = np.exp(-2 * np.asarray(times, float))
    return xr.DataArray([loss, np.where(np.asarray(times) < 3, loss, np.nan)], dims=("seed", "time")).assign_coords(
        time=times
    )


@pytest.mark.parametrize(
    ("level", "time"), [(1.0, 0.0), (np.exp(-1.0), 0.5), (1e-3, 0.5 * np.log(1e3)), (1e-9, np.inf), (0.0, np.inf)]
)
def test_the_time_to_a_level_of_an_exponential(level, time):
    """t = log(1/level)/2, exactly between saves; infinite where the run ends before it, at t = 5."""
    found = time_to(exponential([0.0, 1.7, 2.0, 5.0]), level)
    assert float(found[0]) == pytest.approx(time)
    assert np.isnan(found[1]) if time > 3 else float(found[1]) == pytest.approx(float(found[0]))
    assert time < 3 or not np.isfinite(found.mean("seed", skipna=False))


def test_the_time_to_a_level_that_the_first_save_is_below_already_cannot_be_told():
    late = exponential([2.0, 4.0])
    assert np.isnan(time_to(late, 0.5)).all()
    assert float(time_to(late, np.exp(-6.0))[0]) == pytest.approx(3.0)
    levels = xr.DataArray([np.exp(-5.0), np.nan], dims="seed")
    np.testing.assert_allclose(time_to(late, levels), [2.5, np.nan])
    with pytest.raises(ValueError, match="cannot align objects"):
        time_to(late.assign_coords(seed=[0, 1]), levels.assign_coords(seed=[1, 2]))


@pytest.mark.long
def test_t1_of_a_run_is_the_first_time_at_which_its_definition_holds():
    """With NumPy, on densely saved adapters: g^T B1 A1 v >= (1 - delta_w) sigma / (4 sigma_W2)."""
    problem = aligned_problem(jax.random.key(0), delta_w=0.25, m=6, n=5, h=8)
    swept = sweep(problem, side="B", alpha=1e-4, rank=2, t1=1.0, saves=41, progress=False)
    start = gaussian_init(jax.random.key(0), problem, rank=2, alpha=1e-4, side="B")
    dense = solve(problem, start, t1=1.0, saves=4001, save_adapters=True)
    u, sigma, vt = np.linalg.svd(problem.shift)
    g = np.asarray(problem.w2).T @ u[:, 0]
    s2 = np.linalg.norm(g)
    a, b = map(np.asarray, dense.history[0])
    overlap = np.einsum("h,thr,trn,n->t", g / s2, b, a, vt[0])
    first = dense.times[np.argmax(overlap >= (1 - 0.25) * sigma[0] / (4 * s2))]
    assert float(phases(swept)["t1"].squeeze()) == pytest.approx(float(first), abs=1e-3)


def test_a_lane_that_failed_has_no_phases_after_its_end():
    """At t = 5, between alignment at 2.3 and T1 = 6.2."""
    run = curves()
    spans = phases(run.where(run["time"] < 5.0)).squeeze()
    assert np.isfinite(spans["t_align"])
    assert np.isnan(spans["t1"])


def test_values_at_a_time_are_interpolated_in_the_logarithm():
    run = curves()
    times = xr.DataArray([3.1], dims="alpha", coords={"alpha": [1e-3]})
    assert at_times(run["norm_along1"], times).item() == pytest.approx(1e-3 * np.exp(3.1), rel=1e-9)
    assert np.isnan(at_times(run["norm_along1"], times * np.nan))


def test_values_outside_the_saved_times_are_not_told():
    run = curves().isel(time=slice(4, None))  # from t = 1 to 20
    for time, known in ((1.0, True), (20.0, True), (0.9, False), (20.1, False), (np.inf, False)):
        times = xr.DataArray([time], dims="alpha", coords={"alpha": [1e-3]})
        assert np.isfinite(at_times(run["norm_along1"], times)).item() == known
    ended = run.assign(norm_along1=run["norm_along1"].where(run["time"] < 10))
    assert np.isnan(at_times(ended["norm_along1"], xr.DataArray([12.0], dims="alpha", coords={"alpha": [1e-3]})))


def test_offset_starts_have_no_t1_and_their_own_gains():
    """Their B A is no update: T1 and what is counted from it are NaN; what Z does can be told."""
    spans = phases(curves().expand_dims(init=["gaussian", "pissa"]))
    for name in ("t1", "t_plateau"):
        assert np.isnan(spans[name].sel(init="pissa")).all()
    assert np.isfinite(spans["t1"].sel(init="gaussian")).all()
    assert np.isfinite(spans["t_align"]).all()


def test_growth_rates_are_those_of_the_flow_that_was_followed():
    """d/dt log ||gamma^T Z||^2 of the stored norms, by central differences; LoRA+ grows B sixteen times as fast."""
    problem = aligned_problem(jax.random.key(0), delta_w=0.25, m=4, n=5, h=6)
    times = np.linspace(0.0, 0.05, 401)
    how = {"rank": 2, "alpha": 1e-2, "t1": 0.05, "saves": times, "rtol": 1e-9, "progress": False}
    run = sweep(problem, init="gaussian", flow="lora-plus:16", details=True, **how).squeeze()
    measured = 2 * np.gradient(np.log(run["norm_along1"].values), times)
    np.testing.assert_allclose(run["growth_rate_1"].values[5:-5], measured[5:-5], rtol=1e-3)
    assert np.isnan(phases(run)["t1_predicted"])


@pytest.mark.parametrize(("flow", "told"), [("plain", True), ("scaled:0.001", False), ("lora-plus:16", False)])
def test_t1_is_predicted_of_the_plain_flow_alone(flow, told):
    spans = phases(curves().assign_attrs(flow=flow))
    assert np.isfinite(spans["t1_predicted"]).all() == told
    assert np.isfinite(spans["t1"]).all()


def test_other_problems_have_no_phases():
    with pytest.raises(InputError, match="dataset must be of a factorisation, for phases, got another problem's"):
        phases(curves().drop_vars(["sigma", "sigma_w1", "sigma_w2"]))

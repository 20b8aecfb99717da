"""How imbalance speeds up linear networks, at sizes at which the flow takes seconds."""

import jax
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from lora_flow import LinearNetwork
from lora_flow.experiments import imbalance
from lora_flow.initialization import balanced_init
from lora_flow.theory import linear_flow as flow

pytestmark = pytest.mark.long

KEY = jax.random.key(0)
SIZES = imbalance.Sizes(samples=6, inputs=15, width=30, rows=5, columns=3, widths=(10, 40))


@pytest.fixture(scope="module")
def imbalanced():
    return imbalance.run(2, lambda items: items, SIZES)


def test_the_results_have_the_dims_that_are_promised(imbalanced):
    assert dict(imbalanced.sizes) == {"seed": 2, "start": 5, "save": imbalance.SAVES, "width": 2}
    for prefix, dim in (("", "start"), ("width_", "width")):
        for name in ("time", "loss", "rate", "proposition1"):
            assert imbalanced[prefix + name].dims == ("seed", dim, "save")
        for name in ("theorem1", "theorem3", "drift"):
            assert imbalanced[prefix + name].dims == ("seed", dim)
    assert list(imbalanced["start"].values)[-2:] == ["balanced", "balanced, near"]


@pytest.mark.parametrize("prefix", ["", "width_"])
def test_every_bound_holds_at_every_recorded_time(imbalanced, prefix):
    loss = imbalanced[f"{prefix}loss"]
    assert np.all(loss.isel(save=-1) < 1e-14 * loss.isel(save=0)), "and the flow has come to its end"
    broken, recorded = imbalance.violations(imbalanced, prefix)
    assert (broken, recorded > 0.8 * loss.size) == (0, True)
    weaker = imbalanced.assign({f"{prefix}theorem1": 1.3 * imbalanced[f"{prefix}rate"].max("save")})
    assert imbalance.violations(weaker, prefix)[0] > 0, "a rate that is not kept to is noticed"


@pytest.mark.parametrize("prefix", ["", "width_"])
def test_bounds_for_all_times_are_below_those_of_the_moment(imbalanced, prefix):
    one, three, moment, rate = (
        imbalanced[f"{prefix}{name}"] for name in ("theorem1", "theorem3", "proposition1", "rate")
    )
    assert bool((one <= three * (1 + 1e-9) + 1e-12).all())
    assert bool((three <= moment.min("save") * (1 + 1e-6)).all())
    assert bool((moment <= rate * (1 + 1e-6)).where(rate.notnull(), True).all())
    assert float(imbalanced[f"{prefix}drift"].max()) < 1e-6, "Lam, which they are made of, is conserved"


@pytest.mark.parametrize("prefix", ["", "width_"])
def test_the_rate_is_that_of_the_loss(imbalanced, prefix):
    """Its integral from the start is log(L(0)/L); trapezoids between saves are right to a few parts in 1000."""
    time, loss, rate = (imbalanced[f"{prefix}{name}"].values for name in ("time", "loss", "rate"))
    area = np.cumsum(0.5 * (rate[..., 1:] + rate[..., :-1]) * np.diff(time), axis=-1)
    fallen = np.log(loss[..., :1] / loss[..., 1:])
    seen = ~np.isnan(area)
    np.testing.assert_allclose(area[seen], fallen[seen], rtol=1e-2)


def test_the_bounds_are_those_of_the_whole_network(imbalanced):
    """Narrowed to the hidden directions that move, and by the spectrum of Lam at the start."""
    for name, network in imbalance._starts(0, SIZES).items():
        whole, one = flow.reduce(*network), imbalanced.sel(start=name).isel(seed=0)
        np.testing.assert_allclose(one["theorem1"], flow.imbalance_rate(whole), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(one["theorem3"], flow.global_rate(whole), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(one["proposition1"][0], flow.instantaneous_rate(whole), rtol=1e-9)
        np.testing.assert_allclose(one["loss"][0], 0.5 * np.sum(whole.error**2), rtol=1e-9)


def test_starts_have_the_published_sizes():
    for name, (_, _, w1, w2) in imbalance._starts(0, SIZES._replace(inputs=200, width=2000)).items():
        if name in imbalance.STARTS:
            sigma_u, sigma_v = map(float, name.split(","))
            np.testing.assert_allclose([np.std(w1), np.std(w2)], [sigma_u, sigma_v], rtol=0.05)


def test_balanced_is_what_the_loss_depends_on(imbalanced):
    """Lam = 0: Theorem 1 says nothing, and Theorem 3 twice the margin, for X X^T = I and one output."""
    for name in (imbalance.BALANCED, imbalance.NEAR):
        _, y, u1, w2 = network = imbalance._starts(0, SIZES)[name]
        assert float(abs(flow.reduce(*network).imbalance).max()) < 1e-14
        margin = np.linalg.norm(y) - np.linalg.norm(np.asarray(flow.reduce(*network).error))
        found = imbalanced.sel(start=name).isel(seed=0)
        np.testing.assert_allclose(found["theorem1"], 0, atol=1e-12)
        np.testing.assert_allclose(found["theorem3"], 2 * max(margin, 0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found["proposition1"][0], 2 * np.linalg.norm(u1 @ w2), rtol=1e-9)
    assert float(found["theorem3"]) > 0.05, "near the solution"


def test_the_initialisation_balanced_leaves_an_imbalance_where_inputs_depend_on_each_other():
    x, y, _, _ = imbalance._starts(0, SIZES)["0.1, 0.1"]
    ((a, b),) = balanced_init(KEY, LinearNetwork(y, x), rank=30, alpha=0.1)
    seen = flow.reduce(x, y, a.T, b.T)
    np.testing.assert_allclose(seen.imbalance, -np.asarray(seen.outside).T @ seen.outside, atol=1e-14)
    assert float(flow.imbalance_rate(seen)) > 0.1


def test_time_over_widths_is_that_of_the_weights_as_published():
    """`1/2 ||Y - U V^T/sqrt(m h)||^2` itself, by SciPy, with U and V from N(0, 1)."""
    h, (n, m) = 12, (SIZES.rows, SIZES.columns)
    network, unit = imbalance._wide(3, h, SIZES)
    _, y, w1, w2 = map(np.asarray, network)
    u, v = w1 * (m * h) ** 0.25, w2.T * (m * h) ** 0.25
    assert 0.7 < np.std(u) < 1.3

    def error(u, v):
        return y - u @ v.T / np.sqrt(m * h)

    def field(_, state):
        u, v = state[: n * h].reshape(n, h), state[n * h :].reshape(m, h)
        e = error(u, v) / np.sqrt(m * h)
        return np.concatenate([(e @ v).ravel(), (e.T @ u).ravel()])

    found = imbalance._follow(network, unit)
    late = np.searchsorted(-found["loss"], -1e-4 * found["loss"][0])
    times = found["time"][:late:5]
    start = np.concatenate([u.ravel(), v.ravel()])
    states = solve_ivp(field, (0, times[-1]), start, method="DOP853", t_eval=times, rtol=1e-10, atol=1e-12).y.T
    losses = [0.5 * np.sum(error(s[: n * h].reshape(n, h), s[n * h :].reshape(m, h)) ** 2) for s in states]
    np.testing.assert_allclose(found["loss"][:late:5], losses, rtol=1e-4)


def test_infinite_width_has_the_rate_4_over_m():
    found = imbalance._follow(*imbalance._wide(0, 100_000, SIZES))
    np.testing.assert_allclose(found["theorem1"], 4 / SIZES.columns, rtol=0.03)
    np.testing.assert_allclose(found["rate"][~np.isnan(found["rate"])], 4 / SIZES.columns, rtol=0.03)


def test_the_report_counts_the_bounds_that_fail(imbalanced, reported):
    report = reported("imbalance", imbalanced)
    assert report.count("\n| --- |") == 2
    assert "nan" not in report
    assert "a bound fails at 0." in report

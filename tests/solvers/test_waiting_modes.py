"""Modes that wait at 1e-12 beside stiff ones are learned when they should be, by steps that do not see them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from lora_flow import Adapter, Factorization, SingleLayer, gaussian_init, misaligned, noisy, solve

PROMISE = 0.05  # decades of loss


def turned(sigma, n=8):
    """One layer with these singular values along random directions (u, v)."""
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.normal(size=(n, n)))[0][:, : len(sigma)] for _ in range(2))
    return SingleLayer((u * sigma) @ v.T), u, v


def logistic(sigma, times):
    """The loss where each x follows x' = 2 x (sigma - x) from 1e-24."""
    s = np.array(sigma)[:, None]
    return 0.5 * np.sum((s * expit(np.log(s / 1e-24) - 2 * s * times)) ** 2, axis=0)


def apart(loss, reference, down_to):
    """The largest distance in decades where the reference is above `down_to` of its start."""
    seen = reference > down_to * reference[0]
    return np.max(np.abs(np.log10(np.asarray(loss) / reference))[seen])


@pytest.mark.parametrize("solver", ["auto", "RKC"])
@pytest.mark.parametrize(
    ("sigma", "t1"),
    [
        ((300.0, 1.0), 40.0),  # one waits: the bound on its growth is tight
        ((300.0, 2.0, 1.5, 0.7), 55.0),  # at unlike rates
        ((300.0, 1.05, 1.0, 0.95), 40.0),  # at similar ones
    ],
)
def test_each_is_learned_as_in_closed_form(sigma, t1, solver):
    """From B = 1e-12 u_k, A = 1e-12 v_k^T each b_k a_k = x follows x' = 2 x (sigma_k - x), a logistic curve."""
    layer, u, v = turned(np.array(sigma))
    start = (Adapter(1e-12 * v.T, 1e-12 * u),)
    times = np.linspace(0.0, t1, 301)
    run = solve(layer, start, t1=t1, saves=times, solver=solver)
    assert run.status == 0
    assert apart(run.observables["loss"], logistic(sigma, times), 1e-20) < PROMISE


@pytest.fixture(scope="module")
def awry():
    """Not aligned by far, and noisy, so that the shift has full rank beyond what rank 5 of 8 can learn."""
    rng = np.random.default_rng(5)
    w1, w2 = rng.normal(size=(12, 10)), rng.normal(size=(8, 12))
    problem = Factorization(w1, w2, rng.normal(size=(8, 2)) @ rng.normal(size=(2, 10)))
    keys = jax.random.split(jax.random.key(0))
    return noisy(misaligned(problem, keys[0], angle=30.0), keys[1], noise=1e-3)


@pytest.mark.parametrize("solver", ["auto", "RKC"])
def test_of_misaligned_and_noisy_tasks_too(awry, solver):
    start = gaussian_init(jax.random.key(0), awry, rank=5, alpha=1e-8, side="B")
    times = np.concatenate([[0.0], np.geomspace(0.01, 100.0, 60)])
    loss, reference = (
        solve(awry, start, t1=100.0, saves=times, **how).observables["loss"]
        for how in ({"solver": solver}, {"solver": "Dopri8", "rtol": 1e-8})
    )
    assert float(reference[-1]) < 1e-3 * float(reference[0])
    assert apart(loss, np.asarray(reference), 1e-20) < PROMISE


def test_in_single_precision_too():
    """At a tighter tolerance: at the default rtol programs that round otherwise are wrong by 0.01 to 0.1 decades."""
    with jax.enable_x64(False):
        layer, u, v = turned(np.array([300.0, 2.0, 1.5, 0.7]))
        start = (Adapter(jnp.asarray(1e-12 * v.T, jnp.float32), jnp.asarray(1e-12 * u, jnp.float32)),)
        times = np.linspace(0.0, 55.0, 301)
        run = solve(layer, start, t1=55.0, saves=times, rtol=1e-4)
        assert run.observables["loss"].dtype == jnp.float32
    assert apart(run.observables["loss"], logistic((300.0, 2.0, 1.5, 0.7), times), 1e-7) < PROMISE

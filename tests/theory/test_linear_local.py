"""The local Polyak-Łojasiewicz inequality and descent lemma (Xu et al. 2025), and the schedule of Theorem E.1."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_networks import (
    FLOOR,
    STARTS,
    WIDE,
    Problem,
    along,
    below,
    each,
    full_rank,
    numpy_results,
    problems,
    sigma,
    tau_ends,
)

from lora_flow.theory import linear_local as local
from lora_flow.theory import linear_networks as nets


class General(NamedTuple):
    """l(W) = sum of phi(W - W*): phi'' falls from K at zero to mu, so that l is mu-strongly convex and K-smooth."""

    mu: float
    K: float
    optimum: np.ndarray

    def __call__(self, w):
        off = w - self.optimum
        return jnp.sum(self.mu * off**2 / 2 + (self.K - self.mu) * (jnp.sqrt(1 + off**2) - 1))


def local_at(mu, K, optimum, w1, w2, eta):
    convex = General(mu, K, optimum)
    of_weights = lambda w: convex(w[0] @ w[1])  # noqa: E731
    now, slopes = jax.value_and_grad(of_weights)((w1, w2))
    smooth, pl = local.smoothness(K, now, w1, w2), local.pl_constant(mu, w1, w2)
    eta = eta / smooth.k0
    return {
        "loss": now,
        "next": of_weights((w1 - eta * slopes[0], w2 - eta * slopes[1])),
        "square": jnp.sum(slopes[0] ** 2) + jnp.sum(slopes[1] ** 2),
        "pl": pl,
        "smooth": smooth.at(eta),
        "eta": eta,
        "step": smooth.step(),
        "at step": smooth.at(smooth.step()),
        "rate": local.rate(pl, smooth.at(eta), eta),
        "parts": smooth,
    }


local_step = numpy_results(local_at)


@each(400)
@given(problems(starts=STARTS[:4]), st.floats(-2, 0.5).map(lambda e: 10**e), st.floats(0, 2).map(lambda e: 10**e))
def test_the_descent_lemma_and_the_pl_inequality_hold_for_a_general_loss(drawn, eta, kappa):
    """L+ <= L - (eta - K_t eta^2/2) ||grad L||^2 and 1/2 ||grad L||^2 >= mu_t L; L+ <= rho L for eta K_t < 2."""
    p, shape = drawn
    optimum = (p.w1 @ p.w2)[::-1] if shape.n > 1 else 2 * p.w1 @ p.w2 - 1
    at = local_step(0.7, 0.7 * kappa, optimum, p.w1, p.w2, eta)
    now, slope = at["loss"], at["square"]
    assert below(at["next"], now - (at["eta"] - at["smooth"] * at["eta"] ** 2 / 2) * slope, now)
    assert below(at["pl"] * now, slope / 2, at["parts"].k0 * now)
    assert at["step"] * at["at step"] == pytest.approx(1, rel=1e-12)
    if at["eta"] * at["smooth"] < 2:
        assert below(at["next"], at["rate"] * now, now)


def test_local_constants_by_hand():
    """sigma(W1) = (3, 1), sigma(W2) = (2, 0.5): smax2 = 13, smin2 = 1.25, sigma_1(W) = 6; K = 2, L = 0.25."""
    w1, w2 = np.diag([3.0, 1.0]), np.diag([2.0, 0.5])
    np.testing.assert_allclose(local.smoothness(2.0, 0.25, w1, w2), (27.0, 3 * 26.0, 6 * 4 * 6 * 0.25), rtol=1e-13)
    assert local.pl_constant(2.0, w1, w2) == pytest.approx(2.5, rel=1e-13)
    assert local.rate(2.5, 30.0, 0.1) == pytest.approx(1 - 0.5 + 0.75, rel=1e-13)


def local_constants(x, y, w1, w2, optimum, c, d):
    start = local.constants(nets.curvature(x), nets.loss(x, y, w1, w2), optimum, w1, w2)
    steps = local.largest_step(start, c, d)
    return {"constants": start, "b1": start.b1, "steps": steps, "step": steps.step}


def scheduled_step(t, x, y, w1, w2, schedule, by_bound):
    smooth = local.smoothness(schedule.start.K, nets.loss(x, y, w1, w2), w1, w2)
    bound = schedule.smoothness(t)
    eta = schedule.step(t, jnp.where(by_bound, 1 / bound, smooth.step()))
    pl = local.pl_constant(schedule.start.mu, w1, w2)
    return eta, {"smooth": smooth.at(eta), "bound": bound, "pl": pl}


def schedule_promises(schedule):
    return {
        "mubar": schedule.mubar,
        "rhobar": schedule.rhobar,
        "growth": schedule.growth,
        "drift": schedule.imbalance_drift_bound(),
    }


promises = numpy_results(schedule_promises)
theorem_e1 = numpy_results(local_constants)
scheduled_run = along(40, scheduled_step)
EXPONENTS = ((0.5, 2.0), (0.5, 1.01), (0.8, 1.5))


@pytest.mark.long
@each()
@given(problems(WIDE), st.sampled_from(EXPONENTS), st.floats(0.05, 0.999), st.booleans())
def test_the_schedule_keeps_every_promise_of_theorem_e_1(drawn, exponents, fraction, by_bound):
    """mubar <= mu_t, K_t <= Kbar_t, L(t) <= L_0 rhobar_0^t and the drift, for steps by 1/K_t and by 1/Kbar_t."""
    p, shape = drawn
    p = full_rank(p, shape)
    optimum = np.linalg.solve(p.x, p.y)
    got = theorem_e1(*p, optimum, *exponents)
    start = got["constants"]
    if start.a1 < 1e-9 * start.a2:  # no step is promised to do anything
        return
    schedule = local.Schedule(start, fraction * got["step"], *exponents)
    run, promised = scheduled_run(*p, schedule, by_bound), promises(schedule)
    seen = run["loss"] > FLOOR * run["loss"][0]
    times = np.arange(len(seen))
    assert promised["mubar"] > 0
    assert promised["rhobar"] <= 1
    scale = run["loss"] + 1e-5 * np.sqrt(run["loss"]) * np.linalg.norm(p.y)
    assert below(run["loss"][seen], (start.loss * promised["rhobar"] ** times)[seen], scale[seen])
    assert below(promised["mubar"], run["pl"])
    assert below(run["smooth"], run["bound"])
    assert below(run["ends"][:, 1], start.a2 * promised["growth"])
    bound = promised["drift"]
    assert below(run["drift"], bound, scale=bound + 1e-5 * run["ends"][0, 1])


def test_constants_and_schedule_of_theorem_e_1_by_hand():
    """c = 0.8, d = 1.5, where the e^{sqrt(eta0)} that is printed in Kbar_t would differ."""
    start = local.Constants(0.5, 2.0, 0.3, 0.0, 0.0, 4.0, 3.0, 7.0)
    eta, c, d, t = 0.01, 0.8, 1.5, 3
    schedule = local.Schedule(start, eta, c, d)
    growth = np.exp(eta**c)
    mubar = 0.5 * (3 + 14 * (1 - growth))

    def kbar(rho, big):
        last = 2 * growth * 7 * (1 + 3 * np.sqrt(4 * 0.3 * big) * eta)
        return np.sqrt(4 * 0.3 * rho) + 6 * 4 * 4 * 0.3 * eta**2 * big + last

    rhobar = 1 - 2 * mubar * eta + mubar * kbar(1, 1) * eta**2
    big = (1 + eta**d) * rhobar
    assert schedule.mubar == pytest.approx(mubar, rel=1e-13)
    assert schedule.rhobar == pytest.approx(rhobar, rel=1e-13)
    assert schedule.Dbar == pytest.approx(big, rel=1e-13)
    assert schedule.smoothness(t) == pytest.approx(kbar(rhobar**t, big**t), rel=1e-13)
    assert schedule.step(t, 1.0) == pytest.approx((1 + eta**d) ** (t / 2) * eta, rel=1e-13)
    assert schedule.step(t, 0.001) == 0.001
    assert schedule.imbalance_drift_bound() == pytest.approx(
        2 * 2 * eta**2 * 7 * growth * 0.3 / (1 - float(big)), rel=1e-10
    )
    assert local.asymptotic_rate(start) == pytest.approx(1 - 0.25 * 3 / 7, rel=1e-14)
    assert local.Schedule(start, eta)[2:] == (0.5, 2.0)  # Theorem 3.2


@each()
@given(problems(WIDE), st.sampled_from(EXPONENTS))
def test_the_largest_step_of_theorem_e_1_is_where_a_condition_first_breaks(drawn, exponents):
    p, shape = drawn
    p = full_rank(p, shape)
    optimum, c = np.linalg.solve(p.x, p.y), exponents[0]
    got = theorem_e1(*p, optimum, *exponents)
    start, steps, w = got["constants"], got["steps"], p.w1 @ p.w2
    if start.a1 < 1e-9 * start.a2:
        return
    lowest, highest = tau_ends(p.w1, p.w2)
    assert below(start.a1, lowest, highest)
    assert below(highest, start.a2)
    assert below(got["b1"], sigma(w, min(w.shape)), np.linalg.norm(w))
    assert below(sigma(w, 1), start.b2)
    assert [b > 0 for b in (start.b_m, start.b_n)] == [got["b1"] > 0 and k == min(w.shape) for k in w.shape[::-1]]

    def conditions(eta):
        """Positive where they hold, as the paper writes them."""
        schedule = local.Schedule(start, eta, *exponents)
        drift = (1 - np.exp(-(eta**c))) * (1 - schedule.Dbar) - 4 * start.K * start.loss * eta**2
        return 1 - eta * schedule.smoothness(0), drift, np.log(1 + start.a1 / (2 * start.a2)) ** (1 / c) - eta

    for index, step in enumerate(steps):
        if step > 1e-4:  # below, the conditions as written are rounding
            grid = step * np.append(np.logspace(-2, 0, 300)[:-1] ** 0.5, [1 - 1e-4, 1 + 1e-4])
            assert np.array_equal(np.array(conditions(grid)[index]) > 0, np.arange(len(grid)) < len(grid) - 1)
    assert got["step"] == min(steps)


@pytest.mark.parametrize(("n", "h"), [(4, 100), pytest.param(5, 400, marks=pytest.mark.long)])
def test_the_schedule_solves_the_authors_problem_in_tens_of_steps(n, h):
    """The experiment of Xu et al. 2025, smaller, with c = 0.5, d = 1.01: twenty decades of loss."""
    rng = np.random.default_rng(h)
    x, w1, w2 = np.linalg.qr(rng.standard_normal((n, n)))[0], rng.standard_normal((n, h)), rng.standard_normal((h, n))
    p = Problem(x, x @ w1 @ w2 + 0.1 * rng.standard_normal((n, n)), w1, w2)
    got = theorem_e1(*p, x.T @ p.y, 0.5, 1.01)
    losses = scheduled_run(*p, local.Schedule(got["constants"], 0.9 * got["step"], 0.5, 1.01), False)["loss"]
    needed = np.argmax(losses < 1e-20 * losses[0])
    assert 10 < needed <= 40, needed


def test_backtracking_takes_the_first_step_that_falls_far_enough():
    """On K/2 ||p||^2 the condition is eta <= 2 (1 - constant)/K."""
    p = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}

    def convex(p):
        return 2.0 * (jnp.sum(p["a"] ** 2) + p["b"] ** 2)

    step = partial(local.backtracking_step, convex, p, jax.grad(convex)(p))
    assert step() == pytest.approx(0.01, rel=1e-12)
    assert step(0.051) == pytest.approx(0.0051, rel=1e-12)
    assert step(0.049) == pytest.approx(0.049, rel=1e-12)
    assert step(1.0, 0.5, 0.5) == pytest.approx(0.25, rel=1e-12)
    assert step(tries=2) == 0
    assert jax.jit(step)() == step()

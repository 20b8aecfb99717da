"""Gradient descent of linear networks (Xu et al. 2023): bounds on random problems, constants by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_networks import (
    C1,
    C2,
    FLOOR,
    SHAPES,
    along,
    below,
    descend,
    each,
    fractions,
    full_rank,
    imbalance,
    loss,
    numpy_results,
    problems,
    sigma,
    tau_ends,
)

from lora_flow.theory import linear_descent as descent
from lora_flow.theory import linear_networks as nets


def descent_constants(x, y, w1, w2):
    start = descent.constants(x, y, w1, w2)
    steps = descent.largest_step(start, C1, C2)
    fixed, at_end = (descent.rate_bound(start, now, C1, C2) for now in (start.loss, 0.0))
    return {
        "constants": start,
        "p1": start.p1,
        "kappa": start.kappa,
        "steps": steps,
        "step": steps.step,
        "f": fixed,
        "best": fixed.best_step(),
        "adaptive": descent.adaptive_step(fixed, steps.step),
        "asymptotic": descent.asymptotic_rate(start, C1, C2),
        "at the end": at_end.at(at_end.best_step()),
        "rhohat": descent.current_rate_bound(x, y, w1, w2),
        "rho": descent.rate(x, y, w1, w2),
    }


def descent_at(x, y, w1, w2, eta):
    rho = descent.rate(x, y, w1, w2)
    return {
        "rate": rho.at(eta),
        "margin": descent.rate_margin(x, y, w1, w2, eta),
        "change": descent.imbalance_change(x, y, w1, w2, eta),
        "bound": descent.imbalance_change_bound(x, y, w1, w2, eta),
    }


constants = numpy_results(descent_constants)
descent_step = numpy_results(descent_at)


@each(400)
@given(problems(), fractions)
def test_a_step_changes_the_imbalance_by_the_exact_term(drawn, fraction):
    """And by no more than the bound; rounding is relative to what D+ is made of."""
    p, _ = drawn
    eta = fraction / (sigma(p.x, 1) ** 2 * tau_ends(p.w1, p.w2)[1])
    at, new = descent_step(*p, eta), descend(p, eta)
    size = sum(np.sum(w**2) for w in (p.w1, p.w2, new.w1, new.w2))
    np.testing.assert_allclose(at["change"], imbalance(new) - imbalance(p), atol=1e-12 * size)
    assert below(np.linalg.norm(at["change"]), at["bound"])


@each(400)
@given(problems(), fractions)
def test_the_loss_falls_at_the_rate_of_lemma_3_1(drawn, fraction):
    """L+ <= rho L where the condition holds, which it does for small steps."""
    p, shape = drawn
    p = full_rank(p, shape)
    lowest, highest = tau_ends(p.w1, p.w2)
    eta = fraction * lowest / (sigma(p.x, 1) ** 2 * highest**2)
    at, now = descent_step(*p, eta), loss(p)
    if at["margin"] >= 0:
        assert below(loss(descend(p, eta)), at["rate"] * now, now)
    assert descent_step(*p, 0.0)["margin"] == pytest.approx(lowest, abs=1e-10 * highest)


def fixed_step(t, x, y, w1, w2, eta, start):
    now = nets.loss(x, y, w1, w2)
    f = descent.rate_bound(start, now, C1, C2).at(eta)
    return eta, {"rho": descent.rate(x, y, w1, w2).at(eta), "f": f}


def best_step(t, x, y, w1, w2, largest, start, which):
    """Adaptive steps by rho, rhohat, f(., t) and f(., 0)."""
    now = nets.loss(x, y, w1, w2)
    bounds = (
        descent.rate(x, y, w1, w2),
        descent.current_rate_bound(x, y, w1, w2),
        descent.rate_bound(start, now, C1, C2),
        descent.rate_bound(start, start.loss, C1, C2),
    )
    bound = jax.tree.map(lambda *a: jnp.stack(a)[which], *bounds)
    eta = descent.adaptive_step(bound, largest)
    return eta, {
        "rho": bounds[0].at(eta),
        "rhohat": bounds[1].at(eta),
        "f": bounds[2].at(eta),
        "margin": descent.rate_margin(x, y, w1, w2, eta),
    }


def falls(run, rate, p):
    """L+ <= rate L; a residual is rounded relative to Y."""
    now, after = run["loss"][:-1], run["loss"][1:]
    seen = after > FLOOR * run["loss"][0]
    return below(after[seen], (rate[:-1] * now)[seen], (now + 1e-5 * np.sqrt(now) * np.linalg.norm(p.y))[seen])


fixed_run, adaptive_run = along(25, fixed_step), along(25, best_step)


@pytest.mark.long
@each()
@given(problems(), st.floats(0.05, 1.0))
def test_fixed_steps_up_to_the_largest_keep_every_promise_of_b(drawn, fraction):
    """rho <= f, L+ <= f L, c1 alpha_0 <= lmin <= lmax <= c2 beta_0 and the drift of the imbalance; n != m included."""
    p, shape = drawn
    p = full_rank(p, shape)
    start = constants(*p)
    if not start["step"] > 0:
        assert start["constants"].alpha == 0
        return
    eta = fraction * start["step"]
    run = fixed_run(*p, eta, start["constants"])
    assert below(run["rho"], run["f"])
    assert falls(run, run["f"], p)
    assert below(C1 * start["constants"].alpha, run["ends"][:, 0])
    assert below(run["ends"][:, 1], C2 * start["constants"].beta)
    bound = descent.imbalance_drift_bound(start["constants"], eta, C1, C2)
    assert below(run["drift"], bound, scale=bound + 1e-5 * run["ends"][0, 1])


@each()
@given(problems(SHAPES[:4]), st.integers(0, 3))
def test_adaptive_steps_fall_at_their_rates(drawn, which):
    """rho <= rhohat, rho <= f and L+ <= rho L at each step, whichever of the four rates chooses it."""
    p, shape = drawn
    p = full_rank(p, shape)
    start = constants(*p)
    run = adaptive_run(*p, start["step"], start["constants"], which)
    assert below(run["rho"], run["f"])
    assert below(run["rho"], run["rhohat"])
    assert falls(run, run["rho"], p)
    assert np.all(run["margin"] >= -1e-9 * run["ends"][:, 1])
    assert np.all(run["eta"] <= start["step"] * (1 + 1e-12))


@each()
@given(problems())
def test_constants_and_steps_solve_their_equations(drawn):
    """p1 and p2 bound the product, alpha_0 and beta_0 tau; the steps are roots; f never beats 1 - 1/kappa."""
    p, shape = drawn
    p = full_rank(p, shape)
    got = constants(*p)
    c, f, w = got["constants"], got["f"], p.w1 @ p.w2
    lowest, highest = tau_ends(p.w1, p.w2)
    assert below(c.alpha, lowest, highest)
    assert below(highest, c.beta)
    assert below(got["p1"], sigma(w, min(w.shape)), np.linalg.norm(w))
    assert below(np.linalg.norm(w), c.p2)
    assert [p > 0 for p in (c.p_m, c.p_n)] == [got["p1"] > 0 and k == min(w.shape) for k in w.shape[::-1]]
    grid = np.logspace(-3, 3, 2001) * max(got["best"], 1e-300)
    assert below(f.at(got["best"]), f.at(grid))
    assert below(1 - 1 / got["kappa"], f.at(grid))
    assert got["asymptotic"] == pytest.approx(got["at the end"], rel=1e-10)
    assert got["adaptive"] == min(got["best"], got["step"])
    if c.alpha > 0:
        extra = 4 * C2 * c.loss * c.K / (C2 - 1), 8 * C2 * c.beta * c.loss * c.K / ((1 - C1) * c.alpha)
        for eta, q in zip(got["steps"], extra, strict=True):
            assert f.a4 * eta**3 + f.a3 * eta**2 + (f.a2 + q) * eta == pytest.approx(f.a1, rel=1e-10)


def test_rates_and_steps_of_b_by_hand():
    """mu = 2, K = 3, p2 = 0.7, alpha_0 = 0.6, beta_0 = 5, L_0 = 0.04, at L = 0.01, c1 = 0.5, c2 = 1.5."""
    start = descent.Constants(2.0, 3.0, 0.1, 0.1, 0.7, 0.6, 5.0, 0.04)
    a1 = 2 * 0.5 * 0.6 * 2
    a2 = 2 * 0.7 * np.sqrt(2 * 1.5 * 0.01 * 8) + 1.5 * 4 * 7.5**2
    a3 = 2 * 7.5 * 0.7 * np.sqrt(2 * 1.5**3 * 0.01 * 32)
    a4 = 2 * 1.5**2 * 8 * 0.49 * 0.01
    np.testing.assert_allclose(descent.rate_bound(start, 0.01, 0.5, 1.5), (a1, a2, a3, a4), rtol=1e-13)
    assert descent.asymptotic_rate(start, 0.5, 1.5) == pytest.approx(1 - (0.3 / 7.5) ** 2 / 1.5, rel=1e-14)
    y = np.diag([3.0, 4.0])
    assert descent.arora_step(0.5, y) == pytest.approx(0.125 / (6144 * 8 * 625), rel=1e-14)
    assert descent.du_step(3, 0.02, 2, y) == pytest.approx(0.1 / (400 * 5**1.5), rel=1e-14)
    bound = descent.imbalance_drift_bound(start, 1e-3, 0.5, 1.5)
    fall = 1 - descent.rate_bound(start, 0.04, 0.5, 1.5).at(1e-3)
    assert bound == pytest.approx(2 * 1.5 * 5 * 3 * 0.04 * 1e-6 / float(fall), rel=1e-12)


@pytest.mark.parametrize(("spread", "published"), [(1, 0.505), (5, 0.555), (100, 0.600)])
def test_alpha_over_beta_of_the_published_experiment(spread, published):
    """The titles of Figure 2 of Xu et al. 2023, by the authors' code: at seeds 1 to 3, and the mean over 50."""
    side, h = 20, 1000

    def ratio(seed):
        rng = np.random.RandomState(seed)
        x, theta = np.linalg.qr(rng.normal(size=(side, side)))[0], rng.normal(0, side**-0.5, (side, side))
        scale = np.sqrt((spread + np.sqrt(spread**2 + 4)) / 2)
        w1, w2 = scale * rng.normal(size=(side, h)), rng.normal(size=(h, side)) / scale
        start = jitted(x, x @ theta, w1, w2)
        return start.alpha / start.beta

    jitted = jax.jit(descent.constants)
    ratios = np.array([ratio(seed) for seed in range(50)])
    assert np.mean(ratios[1:4]) == pytest.approx(published, abs=0.0015)
    assert np.mean(ratios) == pytest.approx(published, abs=0.01)

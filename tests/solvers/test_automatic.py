"""`solver="auto"` is Tsit5 where that is best, and stays right and cheap where stability would bind Tsit5."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import Factorization, InputError, aligned_problem, gaussian_init, solve, sweep
from lora_flow.solvers.automatic import MIDDLE, STABLE, TABLEAU, Automatic, QuarticInterpolation
from lora_flow.solvers.control import ResidualController, StepError

TIMES = np.concatenate([[0.0], np.geomspace(0.1, 300.0, 30)])


@pytest.fixture(scope="module")
def stiff():
    """Not aligned, with a shift of rank 2: most is learned by t = 10, and the rest slowly."""
    keys = jax.random.split(jax.random.key(3), 4)
    w1, w2 = jax.random.normal(keys[0], (12, 10)), jax.random.normal(keys[1], (8, 12))
    shift = jax.random.normal(keys[2], (8, 2)) @ jax.random.normal(keys[3], (2, 10))
    return Factorization(w1, w2, shift)


def start_of(problem, seed=0, alpha=1e-2):
    return gaussian_init(jax.random.key(seed), problem, rank=2, alpha=alpha, side="B")


def test_the_weights_half_way_are_those_of_the_methods_own_interpolation():
    own = diffrax.Tsit5.interpolation_cls(t0=0.0, t1=1.0, y0=jnp.zeros(7), y1=jnp.zeros(7), k=jnp.eye(7))
    np.testing.assert_allclose(MIDDLE, own.evaluate(0.5), rtol=1e-12)
    np.testing.assert_allclose(np.sum(MIDDLE), 0.5, rtol=1e-12)  # order 1 of the value half way
    np.testing.assert_allclose(np.dot(MIDDLE, [0.0, *TABLEAU.c]), 0.125, rtol=1e-12)  # order 2


def test_the_interpolation_is_exact_for_quartics():
    quartic = np.polynomial.Polynomial([0.3, -1.0, 2.0, 0.7, -0.4])
    slope, t0, t1 = quartic.deriv(), 0.5, 2.0
    k0, k1 = ((t1 - t0) * jnp.array([slope(t)]) for t in (t0, t1))
    ends = {"y0": jnp.array([quartic(t0)]), "y1": jnp.array([quartic(t1)])}
    between = QuarticInterpolation(t0, t1, **ends, k0=k0, k1=k1, middle=jnp.array([quartic(1.25) - quartic(t0)]))
    for t in (0.5, 0.9, 1.7, 2.0):
        np.testing.assert_allclose(between.evaluate(t), [quartic(t)], rtol=1e-13)
    np.testing.assert_allclose(between.evaluate(0.9, 1.7), [quartic(1.7) - quartic(0.9)], rtol=1e-12)


def test_where_stability_does_not_bind_it_takes_the_steps_of_tsit5(figure1_problem):
    """Until t = 0.7, by when the loss has fallen by five decades: in the slow tail, from t = 2 on, stability binds."""
    start = gaussian_init(jax.random.key(0), figure1_problem, rank=4, alpha=1e-3, side="B")
    auto, tsit5 = (solve(figure1_problem, start, t1=0.7, solver=name) for name in ("auto", "Tsit5"))
    steps = int(auto.stats["num_steps"]), int(tsit5.stats["num_steps"])
    assert steps[0] == pytest.approx(steps[1], abs=1)  # rounding may decide on a step
    np.testing.assert_allclose(
        np.log10(auto.observables["loss"]), np.log10(tsit5.observables["loss"]), atol=2e-3, rtol=0
    )


def test_tsit5_is_stable_up_to_the_limit_and_no_further():
    stages = np.zeros((7, 7))
    for row, weights in enumerate(TABLEAU.a_lower, start=1):
        stages[row, : len(weights)] = weights

    def growth(reach):  # of a mode of rate -rho in a step with dt rho = reach
        return abs(1 - reach * TABLEAU.b_sol @ np.linalg.solve(np.eye(7) + reach * stages, np.ones(7)))

    assert max(map(growth, np.linspace(0.01, STABLE, 100))) < 1 < growth(1.01 * STABLE)


def test_where_an_error_comes_with_its_order_alone_neither_rounding_nor_stability_binds():
    control, y = ResidualController(1e-3, relative_residual=jnp.linalg.norm), jnp.ones(2)

    @jax.jit
    def keeps(told):
        _, state = control.init(None, 0.0, 1.0, y, 0.1, None, lambda *_: -y, 5)
        return control.adapt_step_size(jnp.zeros(()), jnp.asarray(0.1), y, 0.9 * y, None, told, 5, state)[0]

    error = StepError(1e-5 * y, jnp.array(5))
    assert keeps(error)
    assert not keeps(error._replace(stable=0.08))
    assert not keeps(error._replace(rounding=1.0))


@pytest.mark.parametrize(("order", "limited"), [(3, True), (5, False)])
def test_small_modes_grow_by_about_a_tenth_in_a_step_of_low_order(order, limited):
    rate, y = 2.0, jnp.ones(2)
    control = ResidualController(1e-3, relative_residual=jnp.linalg.norm, growth_bound=lambda y: jnp.asarray(rate))

    @jax.jit
    def step(start, end, state):
        return control.adapt_step_size(start, end, y, y, None, 1e-12 * y, order, state)[:5]

    def follow(dt):
        _, state = control.init(None, 0.0, 1.0, y, 0.1, None, lambda *_: -y, order)
        start, end, kept = jnp.zeros(()), jnp.asarray(dt), []
        for _ in range(20):
            keep, start, end, _, state = step(start, end, state)
            kept.append(bool(keep))
        return kept, float(end - start)

    kept, length = follow(0.01 / rate)
    assert all(kept)
    assert (length == pytest.approx(0.1 / rate, rel=0.05)) == limited
    assert follow(0.139 / rate)[0][0]
    assert follow(0.141 / rate)[0][0] != limited


@pytest.mark.parametrize(("solver", "grows"), [(Automatic(), False), (diffrax.Tsit5(), True)])
def test_a_stiff_mode_too_small_to_be_seen_decays_all_the_same(solver, grows):
    """The steps of y' = -y are too long for a second mode of rate 30, of which the error sees nothing at 1e-30."""
    rates = jnp.array([1.0, 30.0])
    control = ResidualController(1e-3, relative_residual=jnp.linalg.norm)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -rates * y),
        solver,
        t0=0.0,
        t1=20.0,
        dt0=None,
        y0=jnp.array([1.0, 1e-30]),
        stepsize_controller=control,
        saveat=diffrax.SaveAt(steps=True),
        max_steps=400,
    )
    seen, unseen = solution.ys[: int(solution.stats["num_accepted_steps"])].T
    np.testing.assert_allclose(seen, np.exp(-solution.ts[: seen.size]), rtol=0.05)
    assert bool(jnp.max(jnp.abs(unseen)) > 1e-29) == grows


def test_where_stability_binds_it_is_right_and_takes_a_tenth_of_the_steps(stiff):
    auto = solve(stiff, start_of(stiff), t1=300.0, saves=TIMES)
    true = solve(stiff, start_of(stiff), t1=300.0, saves=TIMES, solver="Dopri8", rtol=1e-9)
    tsit5 = solve(stiff, start_of(stiff), t1=300.0, saves=TIMES, solver="Tsit5")
    assert np.max(np.abs(np.log10(auto.observables["loss"] / true.observables["loss"]))) < 0.05
    assert auto.stats["num_steps"] < 0.1 * tsit5.stats["num_steps"]


@pytest.mark.long
def test_rounding_neither_spoils_a_stiff_plateau_nor_holds_the_step():
    """Relative losses down to 1e-27, where the slope is rounding and dt rho would like to be 10^4."""
    problem = aligned_problem(jax.random.key(0), shift_scale=100.0)
    axes = {"side": "B", "alpha": np.geomspace(1e-6, 1e-2, 5), "rank": 1, "seeds": 1, "t1": 3.0, "saves": 31}
    auto, true = (sweep(problem, **axes, **how, progress=False) for how in ({}, {"solver": "Dopri8", "rtol": 1e-6}))
    error = np.abs(np.log10(auto["loss"] / true["loss"])).where(true["loss"] > 5e-22, 0)
    assert float(true["loss"].isel(time=-1).min()) < 1e-22
    assert float(error.max()) < 0.05
    assert np.all(auto["steps"].isel(alpha=slice(1, None)) < 0.3 * true["steps"].isel(alpha=slice(1, None)))


@pytest.mark.parametrize("solver", ["auto", "RKC"])
def test_a_small_mode_that_grows_beside_a_large_stiff_one_is_not_missed(solver):
    """A shift of 100 along a weak pair is learned first; the rest of it still hides that the other mode grows."""
    problem = aligned_problem(
        jax.random.key(0), m=10, n=10, h=20, component=["bottom", "top"], shift_scale=[100.0, 1.0], delta_w=1.0
    )
    start = gaussian_init(jax.random.key(0), problem, rank=2, alpha=1e-6, side="B")
    loss, reference = (
        solve(problem, start, t1=12.0, saves=121, solver=how).observables["loss"] for how in (solver, "Tsit5")
    )
    assert float(jnp.max(jnp.abs(jnp.log10(loss / reference)))) < 0.05


@pytest.mark.long
def test_lanes_that_differ_are_what_they_are_alone(stiff):
    alphas = jnp.array([1e-1, 1e-3, 1e-5])

    def losses(alpha):
        trajectory = solve(stiff, start_of(stiff, alpha=alpha), t1=300.0, saves=TIMES, derivatives="forward")
        return trajectory.observables["loss"], trajectory.stats["num_steps"]

    together, steps = jax.vmap(losses)(alphas)
    for alpha, loss, count in zip(alphas, together, steps, strict=True):
        alone, steps_alone = losses(alpha)
        np.testing.assert_allclose(loss, alone, rtol=1e-4)
        assert abs(int(count) - int(steps_alone)) <= 2


@pytest.mark.long
def test_derivatives_in_both_modes_through_the_change(stiff):
    def final(scale, derivatives="reverse"):
        start = jax.tree.map(lambda leaf: scale * leaf, start_of(stiff))
        run = solve(stiff, start, t1=300.0, saves=3, rtol=1e-4, derivatives=derivatives)
        return jnp.log10(run.observables["loss"][-1])

    _, forward = jax.jvp(lambda s: final(s, "forward"), (1.0,), (1.0,))
    reverse = jax.grad(final)(1.0)
    np.testing.assert_allclose(reverse, forward, rtol=1e-8)
    central = (final(1.01) - final(0.99)) / 0.02
    np.testing.assert_allclose(reverse, central, rtol=0.02)


def test_a_controller_of_ones_own_goes_with_tsit5(stiff):
    usual = diffrax.PIDController(rtol=1e-6, atol=1e-9)
    named, auto = (
        solve(stiff, start_of(stiff), t1=5.0, saves=3, stepsize_controller=usual, solver=s) for s in ("Tsit5", "auto")
    )
    assert named.stats["num_steps"] == auto.stats["num_steps"]


def test_an_unknown_name_is_refused(stiff):
    with pytest.raises(InputError, match="solver must be 'auto', 'RKC', 'Tsit5'"):
        solve(stiff, start_of(stiff), t1=1.0, solver="Tsit6")
    assert Automatic().chebyshev.scan_kind == "checkpointed"

"""The Runge-Kutta-Chebyshev solver against its polynomial, closed forms and known spectra."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpy.polynomial import chebyshev

from lora_flow.solvers.chebyshev import RungeKuttaChebyshev, spectral_radius, stages_needed

EPS = 2 / 13
ZERO = jnp.zeros(())


def stability_polynomial(s):
    """(P, beta): a_s + b_s T_s(w0 + w1 z), and where the argument reaches -1; by numpy's Chebyshev series."""
    t = [0.0] * s + [1.0]
    w0 = 1 + EPS / s**2
    value, first, second = (chebyshev.chebval(w0, chebyshev.chebder(t, k)) for k in range(3))
    w1, b = first / second, second / first**2
    return lambda z: 1 - b * value + b * chebyshev.chebval(w0 + w1 * z, t), (1 + w0) / w1


def heat(n):
    """n interior points of u_t = u_xx on the unit interval: the spectrum, and u(t) for the first two modes."""
    x = np.arange(1, n + 1) / (n + 1)

    def rate(k):
        return 4 * (n + 1) ** 2 * np.sin(k * np.pi / 2 / (n + 1)) ** 2

    def exact(t):
        return sum(jnp.exp(-rate(k) * t) * np.sin(k * np.pi * x) for k in (1, 2))

    def laplacian(u):
        return (n + 1) ** 2 * (jnp.pad(u, 1)[2:] - 2 * u + jnp.pad(u, 1)[:-2])

    return laplacian, exact, rate(n)


def integrate(field, y0, t1, *, solver=None, rtol=1e-6, args=None, **kwargs):
    kwargs = {"dt0": None, "stepsize_controller": diffrax.PIDController(rtol=rtol, atol=1e-3 * rtol)} | kwargs
    solver = RungeKuttaChebyshev() if solver is None else solver
    return diffrax.diffeqsolve(diffrax.ODETerm(field), solver, 0.0, t1, y0=y0, args=args, max_steps=4096, **kwargs)


@pytest.mark.parametrize("stages", [2, 3, 30, 201])
def test_one_step_is_the_stability_polynomial(stages):
    polynomial, beta = stability_polynomial(stages)
    rate = -jnp.linspace(0.998 * beta / 1.05, 0.01, 40)  # with the margin, too much for one stage less
    term, solver, y0 = diffrax.ODETerm(lambda t, y, args: rate * y), RungeKuttaChebyshev(), jnp.ones(40)
    state = solver.init(term, ZERO, ZERO + 1, y0, None)
    state = state._replace(vector=jnp.eye(40)[0], radius=-rate[0])
    y1 = solver.step(term, ZERO, ZERO + 1, y0, None, state, False)[0]
    # T_s' reaches s^2: the tolerance is what the rounding of its argument may make of it
    np.testing.assert_allclose(y1, polynomial(np.asarray(rate)), rtol=0, atol=max(1e-12, 20 * stages**2 * 2.2e-16))


@pytest.mark.parametrize("stages", [2, 3, 7, 30, 201])
def test_the_least_number_of_stages_is_stable_and_one_less_is_not_enough(stages):
    polynomial, beta = stability_polynomial(stages)
    z = np.linspace(-beta, 0, 20_001)
    assert np.max(np.abs(polynomial(z))) <= 1 + 1e-12
    even = stages % 2 == 0  # an odd number is stable for a little longer
    assert np.abs(polynomial(-(1.03 if even else 1.1 + 4 / stages**2) * beta)) > 1
    assert stages_needed(jnp.array(beta * (1 - 1e-9))) == stages
    assert stages_needed(jnp.array(beta * (1 + 1e-9))) == stages + 1


def test_second_order_on_a_nonlinear_problem_that_depends_on_time():
    y0 = jnp.array([1.0, 0.5])
    error = []
    for n in (40, 80):
        solution = integrate(
            lambda t, y, args: -2 * t * y**2, y0, 2.0, dt0=2 / n, stepsize_controller=diffrax.ConstantStepSize()
        )
        error.append(jnp.max(jnp.abs(solution.ys[0] - 1 / (1 / y0 + 4))))
    assert np.log2(error[0] / error[1]) == pytest.approx(2, abs=0.1)


def test_the_error_estimate_is_that_of_the_paper():
    """Est = 0.8 (y0 - y1) + 0.4 dt (f0 + f1)."""
    y0, dt = {"a": jnp.array([1.0, 0.3]), "b": jnp.array(0.7)}, 0.1
    term, solver = diffrax.ODETerm(lambda t, y, args: jax.tree.map(lambda x: -(x**3), y)), RungeKuttaChebyshev()
    state = solver.init(term, ZERO, ZERO + dt, y0, None)
    y1, error, _, after, _ = solver.step(term, ZERO, ZERO + dt, y0, None, state, False)
    expected = jax.tree.map(lambda a, b: 0.8 * (a - b) - 0.4 * dt * (a**3 + b**3), y0, y1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), error, expected)
    np.testing.assert_allclose(after.field, ravel_pytree(term.vf(0.0, y1, None))[0], rtol=1e-14)


@pytest.mark.parametrize("dominant", [-50.0, 50.0])
def test_spectral_radius_of_a_symmetric_matrix(dominant):
    rng = np.random.default_rng(3)
    q, _ = np.linalg.qr(rng.standard_normal((30, 30)))
    matrix = q @ np.diag(np.append(np.linspace(-35, 20, 29), dominant)) @ q.T
    _, radius = spectral_radius(
        lambda t, y: matrix @ y, 0.0, jnp.zeros(30), jnp.asarray(rng.standard_normal(30)), jnp.zeros(())
    )
    assert float(radius) == pytest.approx(50, rel=0.05)


def test_an_eigenvector_that_is_no_longer_dominant_is_left():
    """From one step to the next: the carried vector is exactly orthogonal to the new dominant one."""
    rate = jnp.array([-1.0, -3.0, -1000.0])
    solver, term = RungeKuttaChebyshev(), diffrax.ODETerm(lambda t, y, args: rate * y)
    y0 = jnp.ones(3)
    state = solver.init(term, ZERO, ZERO + 1, y0, None)
    state = state._replace(vector=jnp.array([1.0, 0.0, 0.0]), radius=jnp.array(1.0))
    *_, after, _ = solver.step(term, ZERO, ZERO + 1, y0, None, state, False)
    assert float(after.radius) == pytest.approx(1000, rel=0.05)


def test_stiffness_that_appears_during_a_step_is_rejected_rather_than_followed():

    def field(t, y, args):
        rate = 1 + 5e3 * (1 + jnp.tanh(50 * (t - 1)))  # from 1 to 10,001
        return -rate * (y - jnp.array([1.0, 2.0]))

    solution = integrate(field, jnp.array([1.5, 2.5]), 3.0, rtol=1e-4)
    assert int(solution.stats["num_rejected_steps"]) > 0
    np.testing.assert_allclose(solution.ys[0], jnp.array([1.0, 2.0]), atol=1e-5)


def test_lanes_of_different_stiffness_equal_lanes_alone():
    laplacian, exact, _ = heat(40)
    diffusivity = jnp.array([0.1, 1.0, 10.0])

    @jax.jit
    def solve(k):
        solution = integrate(lambda t, u, k: k * laplacian(u), exact(0.0), 0.1, args=k, rtol=1e-5)
        return solution.ys[0], solution.stats["num_steps"]

    together, steps = jax.vmap(solve)(diffusivity)
    for k, lane, n in zip(diffusivity, together, steps, strict=True):
        alone, n_alone = solve(k)
        assert int(n) == int(n_alone)
        np.testing.assert_allclose(lane, alone, rtol=0, atol=1e-13)
        np.testing.assert_allclose(lane, exact(0.1 * k), atol=5e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_step_with_too_many_stages_is_refused_and_recovered_from(dtype):
    laplacian, exact, radius = heat(60)
    term = diffrax.ODETerm(lambda t, u, args: {"u": laplacian(u["u"])})
    solver, u0 = RungeKuttaChebyshev(max_stages=12), {"u": exact(0.0).astype(dtype)}
    state = solver.init(term, ZERO, ZERO + 0.1, u0, None)
    reach = stability_polynomial(12)[1] / radius
    refused = solver.step(term, ZERO, ZERO + 2 * reach, u0, None, state, False)
    taken = solver.step(term, ZERO, ZERO + 0.8 * reach, u0, None, state, False)
    assert taken[0]["u"].dtype == dtype
    assert bool(jnp.all(jnp.isinf(refused[1]["u"])))
    assert bool(jnp.all(jnp.isfinite(taken[1]["u"])))
    solution = integrate(term.vector_field, u0, 0.2, solver=solver, rtol=1e-3)
    assert int(solution.stats["num_rejected_steps"]) > 0
    np.testing.assert_allclose(solution.ys["u"][0], exact(0.2), atol=1e-3)


def test_dense_output_is_of_third_order():
    """Cubic Hermite: halving the step divides the error between steps by 2^4, the step's own error left out."""
    term, solver, y0 = diffrax.ODETerm(lambda t, y, args: -y), RungeKuttaChebyshev(), jnp.array([1.0])
    error = []
    for dt in (0.2, 0.1):
        state = solver.init(term, ZERO, ZERO + dt, y0, None)
        y1, _, dense, _, _ = solver.step(term, ZERO, ZERO + dt, y0, None, state, False)
        between = solver.interpolation_cls(t0=ZERO, t1=ZERO + dt, **dense)
        np.testing.assert_allclose(between.evaluate(ZERO + dt), y1, rtol=1e-14)
        exact_ends = dense | {"y1": jnp.exp(-dt) * y0, "k1": -dt * jnp.exp(-dt) * y0}
        between = solver.interpolation_cls(t0=ZERO, t1=ZERO + dt, **exact_ends)
        error.append(float(jnp.abs(between.evaluate(ZERO + dt / 2) - jnp.exp(-dt / 2))[0]))
    assert np.log2(error[0] / error[1]) == pytest.approx(4, abs=0.1)


def test_saved_times_lie_on_the_solution():
    ts = jnp.geomspace(1e-2, 1e2, 25)
    y0 = jnp.array([1.0, 2.0])
    solution = integrate(lambda t, y, args: -(y**2), y0, 1e2, saveat=diffrax.SaveAt(ts=ts))
    np.testing.assert_allclose(solution.ys, 1 / (1 / y0[None, :] + ts[:, None]), rtol=1e-4)


def test_reverse_mode_equals_forward_mode_and_differences():
    """Of the final state of a stiff nonlinear field with respect to the field and to the start."""

    def final(x, scan_kind, adjoint):
        rate = x * jnp.array([1.0, 10.0, 300.0])
        solver = RungeKuttaChebyshev(max_stages=64, scan_kind=scan_kind)
        # the field closes over what is differentiated, as that of `solve` does
        return jnp.sum(
            integrate(
                lambda t, y, args: -rate * y - y**3, x * jnp.ones(3), 1.0, solver=solver, rtol=1e-5, adjoint=adjoint
            ).ys
        )

    x = jnp.array(1.1)
    reverse = jax.grad(final)(x, "checkpointed", diffrax.RecursiveCheckpointAdjoint())
    forward = jax.jacfwd(final)(x, "lax", diffrax.ForwardMode())
    value = jax.jit(lambda x: final(x, "lax", diffrax.ForwardMode()))
    difference = (value(x + 1e-3) - value(x - 1e-3)) / 2e-3
    assert float(reverse) == pytest.approx(float(forward), rel=1e-12)
    assert float(reverse) == pytest.approx(float(difference), rel=1e-3)


def test_bad_arguments_say_so():
    with pytest.raises(ValueError, match="max_stages must be at least 2, got 1"):
        RungeKuttaChebyshev(max_stages=1)
    noise = diffrax.ControlTerm(lambda t, y, args: y, lambda t0, t1: t1 - t0)
    with pytest.raises(ValueError, match="not compatible"):
        diffrax.diffeqsolve(noise, RungeKuttaChebyshev(), 0.0, 1.0, 0.1, jnp.ones(2))

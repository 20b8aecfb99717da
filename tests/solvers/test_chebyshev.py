"""The Runge-Kutta-Chebyshev solver against its polynomial, closed forms and known spectra."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial import chebyshev

from lora_flow.solvers.chebyshev import RungeKuttaChebyshev, spectral_radius, stages_needed

EPS = 2 / 13


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
        return sum(np.exp(-rate(k) * t) * np.sin(k * np.pi * x) for k in (1, 2))

    def laplacian(u):
        return (n + 1) ** 2 * (jnp.pad(u, 1)[2:] - 2 * u + jnp.pad(u, 1)[:-2])

    return laplacian, exact, rate(n)


@eqx.filter_jit
def integrate(field, y0, t1, *, solver=None, rtol=1e-6, args=None, **kwargs):
    kwargs = {"dt0": None, "stepsize_controller": diffrax.PIDController(rtol=rtol, atol=1e-3 * rtol)} | kwargs
    solver = RungeKuttaChebyshev() if solver is None else solver
    return diffrax.diffeqsolve(diffrax.ODETerm(field), solver, 0.0, t1, y0=y0, args=args, max_steps=4096, **kwargs)


@eqx.filter_jit
def begin(solver, field, y0, dt, args=None):
    return solver.init(diffrax.ODETerm(field), 0 * dt, dt, y0, args)


@eqx.filter_jit
def step(solver, field, y0, dt, state, args=None):
    """From t = 0 to dt."""
    return solver.step(diffrax.ODETerm(field), 0 * dt, dt, y0, args, state, False)[:-1]


def decay(t, y, rate):
    return rate * y


@pytest.mark.parametrize("stages", [2, 3, 30, 201])
def test_one_step_is_the_stability_polynomial(stages):
    polynomial, beta = stability_polynomial(stages)
    rate = -np.linspace(0.998 * beta / 1.05, 0.01, 40)  # with the margin, too much for one stage less
    solver, y0, dt = RungeKuttaChebyshev(), np.ones(40), np.array(1.0)
    state = begin(solver, decay, y0, dt, rate)._replace(vector=np.eye(40)[0], radius=-rate[:1].reshape(()))
    y1 = step(solver, decay, y0, dt, state, rate)[0]
    # T_s' reaches s^2: the tolerance is what the rounding of its argument may make of it
    np.testing.assert_allclose(y1, polynomial(rate), rtol=0, atol=max(1e-12, 20 * stages**2 * 2.2e-16))


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
    y0, fixed, error = np.array([1.0, 0.5]), diffrax.ConstantStepSize(), []

    def field(t, y, args):
        return -2 * t * y**2

    for n in (40, 80):
        solution = integrate(field, y0, 2.0, dt0=np.array(2 / n), stepsize_controller=fixed)
        error.append(np.max(np.abs(solution.ys[0] - 1 / (1 / y0 + 4))))
    assert np.log2(error[0] / error[1]) == pytest.approx(2, abs=0.1)


def test_the_error_estimate_is_that_of_the_paper():
    """Est = 0.8 (y0 - y1) + 0.4 dt (f0 + f1)."""
    y0, dt, solver = {"a": np.array([1.0, 0.3]), "b": np.array(0.7)}, np.array(0.1), RungeKuttaChebyshev()

    def field(t, y, args):
        return jax.tree.map(lambda x: -(x**3), y)

    y1, error, _, after = step(solver, field, y0, dt, begin(solver, field, y0, dt))
    y1 = jax.tree.map(np.asarray, y1)
    expected = jax.tree.map(lambda a, b: 0.8 * (a - b) - 0.4 * dt * (a**3 + b**3), y0, y1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), error, expected)
    np.testing.assert_allclose(after.field, [*-(y1["a"] ** 3), -(y1["b"] ** 3)], rtol=1e-14)


@pytest.mark.parametrize("stages", [8, 13, 57, 201])
def test_with_many_stages_the_estimate_is_the_error_of_slow_modes_and_blind_to_what_the_stages_damp(stages):
    """Of a mode with dt lambda = z the paper's estimate is 0.4 |z| (1 + P(z)), and grows with the stages squared."""
    polynomial, beta = stability_polynomial(stages)
    slow, stiff = np.array([-0.2, -0.1, 0.1, 0.2]), np.linspace(-0.998 * beta / 1.05, -6.0, 60)
    rate = np.concatenate([stiff, slow])
    solver, y0, dt = RungeKuttaChebyshev(), np.ones(64), np.array(1.0)
    state = begin(solver, decay, y0, dt, rate)._replace(vector=np.eye(64)[0], radius=-rate[:1].reshape(()))
    y1, error, *_ = step(solver, decay, y0, dt, state, rate)
    np.testing.assert_allclose(np.abs(error[-4:]), np.abs(y1[-4:] - np.exp(slow)), rtol=0.4)
    assert np.max(np.abs(error[:-4])) < 10.0
    assert np.max(0.4 * np.abs(stiff * (1 + polynomial(stiff)))) > 0.2 * beta


def test_a_stiff_component_off_its_slow_path_does_not_count_as_an_error_of_the_slow_one():
    """y' = -y^3 and z' = -3000 (z - y), with z off its path by 5e-5."""

    def field(t, y, args):
        return jnp.array([-(y[0] ** 3), -3e3 * (y[1] - y[0])])

    solver, y0, dt = RungeKuttaChebyshev(), np.array([1.0, 1 + 1 / 3e3 + 5e-5]), np.array(0.1)
    y1, error, dense, _ = step(solver, field, y0, dt, begin(solver, field, y0, dt))
    true = np.abs(y1[0] - 1 / np.sqrt(1 + 2 * 0.1))
    paper = 0.4 * (dense["k0"] + dense["k1"]) - 0.8 * (y1 - y0)
    assert 0.5 * true < np.linalg.norm(error) < 3 * true
    assert np.linalg.norm(paper) > 5 * np.linalg.norm(error)


@pytest.mark.parametrize("dominant", [-50.0, 50.0])
def test_spectral_radius_of_a_symmetric_matrix(dominant):
    rng = np.random.default_rng(3)
    q, _ = np.linalg.qr(rng.standard_normal((30, 30)))
    matrix = q @ np.diag(np.append(np.linspace(-35, 20, 29), dominant)) @ q.T
    _, radius = jax.jit(
        lambda vector: spectral_radius(lambda t, y: matrix @ y, 0.0, jnp.zeros(30), vector, 0.0 * vector[0])
    )(rng.standard_normal(30))
    assert float(radius) == pytest.approx(50, rel=0.05)


def test_an_eigenvector_that_is_no_longer_dominant_is_left():
    """From one step to the next: the carried vector is exactly orthogonal to the new dominant one."""
    rate, solver, y0, dt = np.array([-1.0, -3.0, -1000.0]), RungeKuttaChebyshev(), np.ones(3), np.array(1.0)
    state = begin(solver, decay, y0, dt, rate)._replace(vector=np.array([1.0, 0.0, 0.0]), radius=np.array(1.0))
    *_, after = step(solver, decay, y0, dt, state, rate)
    assert float(after.radius) == pytest.approx(1000, rel=0.05)


def test_stiffness_that_appears_during_a_step_is_rejected_rather_than_followed():

    def field(t, y, args):
        rate = 1 + 5e3 * (1 + jnp.tanh(50 * (t - 1)))  # from 1 to 10,001
        return -rate * (y - jnp.array([1.0, 2.0]))

    solution = integrate(field, np.array([1.5, 2.5]), 3.0, rtol=1e-4)
    assert int(solution.stats["num_rejected_steps"]) > 0
    np.testing.assert_allclose(solution.ys[0], [1.0, 2.0], atol=1e-5)


def test_lanes_of_different_stiffness_equal_lanes_alone():
    laplacian, exact, _ = heat(40)
    diffusivity = np.array([0.1, 1.0, 10.0])

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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_step_with_too_many_stages_is_refused_and_recovered_from(dtype):
    laplacian, exact, radius = heat(60)
    solver, u0 = RungeKuttaChebyshev(max_stages=12), {"u": exact(0.0).astype(dtype)}

    def field(t, u, args):
        return {"u": laplacian(u["u"])}

    state = begin(solver, field, u0, np.array(0.1))
    reach = stability_polynomial(12)[1] / radius
    refused, taken = (step(solver, field, u0, np.array(share * reach), state) for share in (2, 0.8))
    assert taken[0]["u"].dtype == dtype
    assert np.all(np.isinf(refused[1]["u"]))
    assert np.all(np.isfinite(taken[1]["u"]))
    solution = integrate(field, u0, 0.2, solver=solver, rtol=1e-3)
    assert int(solution.stats["num_rejected_steps"]) > 0
    np.testing.assert_allclose(solution.ys["u"][0], exact(0.2), atol=1e-3)


def test_dense_output_is_of_third_order():
    """Cubic Hermite: halving the step divides the error between steps by 2^4, the step's own error left out."""
    solver, y0, rate, error = RungeKuttaChebyshev(), np.array([1.0]), np.array([-1.0]), []
    at = jax.jit(lambda between, t: between.evaluate(t))
    for dt in map(np.array, (0.2, 0.1)):
        y1, _, dense, _ = step(solver, decay, y0, dt, begin(solver, decay, y0, dt, rate), rate)
        between = solver.interpolation_cls(t0=0 * dt, t1=dt, **dense)
        np.testing.assert_allclose(at(between, dt), y1, rtol=1e-14)
        exact_ends = dense | {"y1": np.exp(-dt) * y0, "k1": -dt * np.exp(-dt) * y0}
        between = solver.interpolation_cls(t0=0 * dt, t1=dt, **exact_ends)
        error.append(float(np.abs(at(between, dt / 2) - np.exp(-dt / 2))[0]))
    assert np.log2(error[0] / error[1]) == pytest.approx(4, abs=0.1)


def test_saved_times_lie_on_the_solution():
    ts = np.geomspace(1e-2, 1e2, 25)
    y0 = np.array([1.0, 2.0])
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

    x = 1.1
    reverse = jax.jit(jax.grad(lambda x: final(x, "checkpointed", diffrax.RecursiveCheckpointAdjoint())))(x)
    both = jax.jit(lambda x: jax.jvp(lambda x: final(x, "lax", diffrax.ForwardMode()), (x,), (1.0,)))
    difference = (both(x + 1e-3)[0] - both(x - 1e-3)[0]) / 2e-3
    assert float(reverse) == pytest.approx(float(both(x)[1]), rel=1e-12)
    assert float(reverse) == pytest.approx(float(difference), rel=1e-3)


def test_bad_arguments_say_so():
    with pytest.raises(ValueError, match="max_stages must be at least 2, got 1"):
        RungeKuttaChebyshev(max_stages=1)
    noise = diffrax.ControlTerm(lambda t, y, args: y, lambda t0, t1: t1 - t0)
    with pytest.raises(ValueError, match="not compatible"):
        diffrax.diffeqsolve(noise, RungeKuttaChebyshev(), 0.0, 1.0, 0.1, jnp.ones(2))

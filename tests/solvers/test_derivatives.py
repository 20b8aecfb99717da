"""Derivatives of whole runs: which choice has which, what is said where it has not, and how right they are."""

import functools
from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.derivatives import AT, errors, log_losses
from lora_flow import Adapter, InputError, SingleLayer, aligned_problem, descend, gaussian_init, oracles, solve
from lora_flow.dynamics.integrator import RTOL
from lora_flow.dynamics.looks import KEPT_STATE
from lora_flow.problems.base import AbstractProblem
from lora_flow.solvers.chebyshev import RungeKuttaChebyshev

SHIFT = np.array([[1.5, 0.3], [-0.2, 0.8]])
ROW = np.array([[0.3, -0.1]])
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # for programs that run once


def start_of(scale):
    return (Adapter(scale * ROW, np.zeros((2, 1))),)


def flowed(point, **how):
    """log L at t = 1 on one layer of 2 x 2, from a row of the size point[0], for a shift of the size point[1]."""
    how = {"saves": np.array([0.5, 1.0]), "max_steps": 256} | how
    return jnp.log(solve(SingleLayer(point[1] * SHIFT), start_of(point[0]), t1=1.0, **how).observables["loss"][-1])


def stepped(point, **how):
    """The same after five steps of gradient descent."""
    seen = descend(SingleLayer(point[1] * SHIFT), start_of(point[0]), steps=5, step=0.1, saves=2, **how)
    return jnp.log(seen.observables["loss"][-1])


def closed(point):
    product = oracles.single_layer(point[1] * SHIFT, point[0] * ROW, 1.0, steps=4).product
    return jnp.log(0.5 * jnp.sum((point[1] * SHIFT - product) ** 2))


def by_hand(point):
    (a, b), shift = start_of(point[0])[0], point[1] * SHIFT
    for _ in range(5):
        a, b = a + 0.1 * b.T @ (shift - b @ a), b + 0.1 * (shift - b @ a) @ a.T
    return jnp.log(0.5 * jnp.sum((shift - b @ a) ** 2))


POINT = np.array([1.2, 0.9])


def second_in_reverse(function):
    return jax.grad(lambda x: jax.grad(function)(x)[0])


REVERSE_ONLY = r'^derivatives must be "forward" for forward mode \(jvp, jacfwd\), or "both"'
FORWARD_ONLY = r'^derivatives must be "reverse", the default, for reverse mode \(grad, jacrev\)'


@pytest.mark.parametrize(("run", "jitted"), [(flowed, False), (stepped, True)], ids=["solve", "jitted descend"])
@pytest.mark.parametrize(
    ("transform", "derivatives", "message"),
    [
        (jax.jacfwd, "reverse", REVERSE_ONLY),
        (second_in_reverse, "reverse", REVERSE_ONLY),
        (jax.grad, "forward", FORWARD_ONLY),
        (jax.hessian, "forward", FORWARD_ONLY),
    ],
    ids=["jacfwd", "grad of grad", "grad of forward", "hessian of forward"],
)
def test_a_derivative_that_is_not_chosen_is_refused_by_its_name(run, jitted, transform, derivatives, message):
    how = {"solver": "Tsit5"} if run is flowed else {}  # quicker to trace

    def function(x):
        return run(x, derivatives=derivatives, **how)

    derivative = transform(jax.jit(function) if jitted else function)
    with pytest.raises(InputError, match=message) as raised:
        jax.jit(derivative)(POINT)  # nothing is compiled
    assert "\n" not in str(raised.value)


def test_in_eager_code_it_is_refused_before_anything_is_compiled():
    with pytest.raises(InputError, match=REVERSE_ONLY):
        jax.jvp(flowed, (POINT,), (POINT,))


def test_a_gradient_that_is_held_fixed_is_no_second_derivative():
    """As of first-order meta-learning: what the loops cannot do is asked for only where it is used."""
    first = jax.grad(stepped)

    def with_its_gradient(x):
        return stepped(x) + jax.lax.stop_gradient(first(x)[0])

    ours, expected = jit(lambda x: (jax.grad(with_its_gradient)(x), first(x)))(POINT)
    np.testing.assert_allclose(ours, expected, rtol=1e-14)


def test_gradients_of_many_runs_together_are_those_of_each():
    points = np.stack([POINT, POINT + 0.1])
    each = jit(jax.vmap(jax.grad(stepped)))(points)
    together = jit(jax.grad(lambda x: jnp.sum(jax.vmap(stepped)(x))))(points)
    np.testing.assert_allclose(together, each, rtol=1e-12)


@pytest.mark.parametrize(
    "solver",
    ["auto", RungeKuttaChebyshev(), pytest.param("RKC", marks=pytest.mark.long)],
    ids=["auto", "own RKC", "RKC"],
)
def test_second_derivatives_of_a_flow_are_those_of_the_closed_form(solver):
    second = jit(jax.hessian(lambda x: flowed(x, solver=solver, rtol=1e-6)))(POINT)
    np.testing.assert_allclose(second, jit(jax.hessian(closed))(POINT), rtol=1e-3)


@pytest.mark.parametrize("solver", ["auto", "Tsit5"])
@pytest.mark.long
def test_reverse_mode_twice_is_that_of_the_closed_form(solver):
    second = jit(second_in_reverse(lambda x: flowed(x, solver=solver, rtol=1e-6, derivatives="both")))(POINT)
    np.testing.assert_allclose(second, jit(second_in_reverse(closed))(POINT), rtol=1e-3)


def test_first_derivatives_of_a_flow_in_reverse_are_those_of_the_closed_form():
    """In forward mode they are tried below, along the way."""
    np.testing.assert_allclose(jit(jax.grad(flowed))(POINT), jit(jax.grad(closed))(POINT), rtol=1e-4)


@pytest.mark.parametrize("saves", [np.array([0.5, 3.0]), 9], ids=["two times", "nine times"])
def test_steps_beyond_those_whose_states_are_kept_are_made_again(saves):
    """Of at most 60 steps the last four states are kept, of every fourth the last four, and every sixteenth."""

    def gradient(**how):
        def seen(point):
            run = solve(SingleLayer(point[1] * SHIFT), start_of(point[0]), t1=3.0, saves=saves, rtol=1e-8, **how)
            return jnp.sum(jnp.log(run.observables["loss"])), run.stats["num_accepted_steps"]

        return jit(jax.grad(seen, has_aux=True))(POINT)

    few, steps = gradient(solver="Tsit5", max_steps=60)
    all_kept, _ = gradient(solver="Tsit5", max_steps=1_000_000)
    assert 32 < int(steps) < 60
    np.testing.assert_allclose(few, all_kept, rtol=1e-12)


class PlainTask(AbstractProblem):
    """A single layer that knows its task by a function of the user's alone."""

    task: Callable[[], jax.Array] = eqx.field(static=True)

    @property
    def layers(self):
        return ((2, 2),)

    def loss(self, adapters):
        return 0.5 * jnp.sum((self.task() - adapters[0].b @ adapters[0].a) ** 2)


def test_what_functions_of_the_user_close_over_is_differentiated():
    def closing_over(point):
        run = solve(PlainTask(lambda: point[1] * SHIFT), start_of(point[0]), t1=1.0, saves=2, solver="Tsit5")
        return jnp.log(run.observables["loss"][-1])

    ours, expected = jit(lambda x: (jax.grad(closing_over)(x), jax.grad(closed)(x)))(POINT)
    np.testing.assert_allclose(ours, expected, rtol=2e-3)


class OwnHeun(diffrax.Heun):
    """A solver of the user's: half of a step of Heun's, twice."""

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        half, _, _, state, _ = super().step(terms, t0, (t0 + t1) / 2, y0, args, solver_state, made_jump)
        return super().step(terms, (t0 + t1) / 2, t1, half, args, state, made_jump)


OWN = {
    "solver": {"solver": OwnHeun()},
    "controller": {"solver": "Tsit5", "stepsize_controller": diffrax.PIDController(rtol=1e-6, atol=1e-9)},
    "flow": {"solver": "Tsit5", "flow": "stable-lora:0.1"},
}


@pytest.mark.parametrize("own", ["solver", "controller"])
def test_solvers_and_controllers_of_the_user_have_gradients_by_diffrax(own):
    found = jit(jax.grad(lambda x: flowed(x, **OWN[own])))(POINT)
    np.testing.assert_allclose(found, jit(jax.grad(closed))(POINT), rtol=1e-2)


@pytest.mark.parametrize("own", OWN)
def test_their_second_derivatives_are_refused_by_name(own):
    with pytest.raises(InputError, match=r'^derivatives must be "both" for second derivatives .* of your own; got'):
        jax.jit(jax.hessian(lambda x: flowed(x, **OWN[own])))(POINT)  # nothing is compiled


def test_derivatives_of_gradient_descent_are_those_of_the_loop_written_out():
    for transform, derivatives in ((jax.grad, "reverse"), (jax.jacfwd, "forward"), (second_in_reverse, "both")):
        ours = jit(transform(lambda x, derivatives=derivatives: stepped(x, derivatives=derivatives)))(POINT)
        np.testing.assert_allclose(ours, jit(transform(by_hand))(POINT), rtol=1e-9)


@pytest.mark.parametrize(
    ("solver", "tolerances", "worst"),
    [
        # of log L by log alpha, and by the log of the shift's size, which the time that learning takes goes with
        ("auto", (RTOL, 2e-4), ([5e-4, 1.5e-3], [2e-4, 5e-4])),
        ("RKC", (RTOL, 5e-6), ([8e-3, 1.5e-2], [4e-4, 8e-4])),
    ],
)
def test_how_right_gradients_are_at_losses_of_1e_2_1e_8_and_1e_16(solver, tolerances, worst):
    np.testing.assert_allclose(log_losses(AT) / np.log(10), [-2, -8, -16], atol=1e-3)
    of = errors(solver)
    for rtol, bounds in zip(tolerances, worst, strict=True):
        assert np.all(of(rtol) < np.array(bounds)), of(rtol)


def test_derivatives_of_observables_are_those_of_their_values():
    """Of two layers, by the scale of the start and of the shift together: every one but drift, which is an error."""
    problem = aligned_problem(jax.random.key(1), m=4, n=3, h=5, delta_w=0.5, component=[0, 1], shift_scale=[3.0, 2.0])
    start = gaussian_init(jax.random.key(2), problem, rank=2, alpha=0.3, side="B")

    def seen(scale):
        task = problem.__class__(problem.w1, problem.w2, scale * problem.shift)
        begin = jax.tree.map(lambda leaf: scale * leaf, start)
        how = {"t1": 0.6, "saves": np.array([0.2, 0.6]), "solver": "Tsit5", "rtol": 1e-9, "derivatives": "forward"}
        return solve(task, begin, **how).observables

    both = jit(lambda scale: jax.jvp(seen, (scale,), (1.0,)))
    values, slopes = both(1.0)
    above, below = (both(1.0 + step)[0] for step in (1e-4, -1e-4))
    assert {"alignment_error_2", "norm_b1a1", "norm_across2", "overlap_1", "norm_z1", "norm_along2"} < set(slopes)
    for name in set(slopes) - {"drift"}:
        assert np.all(np.asarray(slopes[name]) != 0), name
        difference = (above[name] - below[name]) / 2e-4
        np.testing.assert_allclose(slopes[name], difference, rtol=1e-4, atol=1e-6 * np.max(values[name]), err_msg=name)


def test_derivatives_of_a_state_so_large_that_it_is_looked_at_along_the_way():
    rng = np.random.default_rng(0)
    shift, row = rng.standard_normal((40, 30)) / 8, rng.standard_normal((30, 30)) / 20
    assert KEPT_STATE < 30 * (40 + 30)

    def seen(scale, keep):
        start = (Adapter(scale * row, np.zeros((40, 30))),)
        how = {"t1": 1.0, "saves": np.array([0.4, 1.0]), "solver": "Tsit5", "derivatives": "forward"}
        return solve(SingleLayer(shift), start, **how, save_adapters=keep).observables

    along, kept = (
        jit(lambda x, keep=keep: jax.jvp(lambda y: seen(y, keep), (x,), (1.0,))[1])(1.0) for keep in (False, True)
    )
    for name in set(kept) - {"drift"}:
        np.testing.assert_allclose(along[name], kept[name], rtol=1e-7, atol=1e-10, err_msg=name)

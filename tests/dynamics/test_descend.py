"""Gradient descent beside loops written out, and beside the flow that it converges to."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from descents import (
    RANK,
    SINGLE,
    STEPS,
    STOPS,
    adapters_for,
    assert_same,
    at,
    by_hand,
    by_optax,
    descended,
    flat,
    gradient,
    random,
)
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp

from lora_flow import Adapter, InputError, MuKlabjan, ScaledGD, ShrinkA, SingleLayer, aligned_problem, descend
from lora_flow.dynamics.descend import ORDERS, save_iterations

DOUBLE = aligned_problem(jax.random.key(1), m=4, n=3, h=5, delta_w=0.5, component=[0, 1], shift_scale=[3.0, 2.0])
PROBLEMS = {"SingleLayer": SINGLE, "Factorization": DOUBLE}
ENDS = {"SingleLayer": 1.0, "Factorization": 0.1}


@functools.cache
def flowed(name):
    """Where the flow has come at the end, by SciPy's DOP853."""
    start = adapters_for(PROBLEMS[name], 2)
    unflatten = jax.jit(ravel_pytree(start)[1])
    options = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-14}

    def field(t, y):
        return -flat(gradient(PROBLEMS[name], unflatten(y)))

    return solve_ivp(field, (0, ENDS[name]), flat(start), **options).y[:, -1]


class TestTheFlowIsTheLimit:
    @pytest.mark.parametrize(
        ("name", "order"),
        [*(("SingleLayer", order) for order in ORDERS), *(("Factorization", order) for order in ORDERS[:2])],
    )
    def test_with_order_one_and_steps_as_written(self, name, order):
        """n steps of size T/n end at the flow's A(T), B(T) up to O(1/n), and the first five are those of a loop."""
        problem, end = PROBLEMS[name], ENDS[name]
        start = adapters_for(problem, 2)
        flow, errors = flowed(name), []
        for stop in (-3, -2, -1):
            seen = descended(problem, start, end / STOPS[stop], order)
            np.testing.assert_allclose(seen.times[stop], end, rtol=1e-12)
            errors.append(np.linalg.norm(flat(at(seen.history, stop)) - flow))
        np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 1.0, atol=0.02)
        assert errors[-1] > 1e-6 * np.linalg.norm(flow), "the start is the end: the test sees nothing"
        for steps in (1, 5):
            assert_same(at(seen.history, steps), by_hand(problem, start, end / STOPS[-1], steps, order))


class TestSteps:
    start = adapters_for(SINGLE, 3)

    def test_observables_are_those_of_the_iterations(self):
        seen = descended(SINGLE, self.start, 0.02)
        np.testing.assert_array_equal(seen.iterations, STOPS)
        np.testing.assert_allclose(seen.times, 0.02 * np.array(STOPS), rtol=1e-12)
        np.testing.assert_allclose(seen.observables["step_size"], 0.02)
        assert seen.status == 0
        assert seen.stats["num_steps"] == STEPS
        u, _, vt = np.linalg.svd(SINGLE.shift)
        for i, steps in enumerate(STOPS[:7]):
            ((a, b),) = now = by_hand(SINGLE, self.start, 0.02, steps)
            assert seen.observables["loss"][i] == pytest.approx(float(SINGLE.loss(now)), rel=1e-11)
            assert seen.observables["norm_b1a1"][i] == pytest.approx(np.linalg.norm(b @ a, 2), rel=1e-9)
            assert seen.observables["overlap_1"][i] == pytest.approx(float(u[:, 0] @ b @ a @ vt[0]), rel=1e-9)
        assert_same(seen.adapters, by_hand(SINGLE, at(seen.history, -1), 0.02, STEPS - STOPS[-1]))  # it goes on
        assert "Descent of 400 iterations to t = 8: success, rank 2; loss" in str(seen)

    def test_saves(self):
        np.testing.assert_array_equal(save_iterations(10, 6), [0, 2, 4, 6, 8, 10])
        np.testing.assert_array_equal(save_iterations(3, 101), [0, 1, 2, 3])
        np.testing.assert_array_equal(save_iterations(10, np.array([2, 3, 9])), [2, 3, 9])

    def test_divergence_is_a_status(self):
        seen = descended(SINGLE, self.start, 10.0)
        assert seen.status == 2
        loss = seen.observables["loss"]
        assert loss[0] == pytest.approx(float(SINGLE.loss(self.start)))
        late = np.array(STOPS) >= 100
        for name, values in seen.observables.items():
            assert np.isnan(values[late]).all(), name
        assert np.isnan(seen.history[0].a[-1]).all()
        assert "failed" in str(seen)

    def test_a_constant_step_is_optax_sgd(self):
        ours = descended(SINGLE, self.start, 0.02)
        theirs = descended(SINGLE, self.start, optax.sgd(0.02))
        assert "Descent of 400 iterations: success" in str(theirs)  # no time: nobody knows the optimiser's steps
        assert_same(ours.history, theirs.history)
        np.testing.assert_allclose(ours.observables["loss"], theirs.observables["loss"], rtol=1e-9)
        np.testing.assert_array_equal(theirs.times, STOPS)
        assert np.isnan(theirs.observables["step_size"]).all()

    def test_a_flow_is_a_transformation_of_optax(self):
        flow = ScaledGD(0.1)
        ours = descended(SINGLE, self.start, 0.02, flow=flow)
        theirs = descended(SINGLE, self.start, optax.chain(optax.stateless(flow), optax.sgd(0.02)))
        assert_same(ours.history, theirs.history)
        assert_same(at(ours.history, 1)[0].b, self.start[0].b + 0.02 * self.scaled_b(*self.start[0]))

    def scaled_b(self, a, b):
        return np.linalg.solve(a @ a.T + 0.1 * np.eye(RANK), a @ (SINGLE.shift - b @ a).T).T

    def test_in_turns_each_factor_has_an_optimiser_of_its_own(self):
        """Adam's moments of B see the gradients at the A before, those of A the gradients at the new B."""
        seen = descended(SINGLE, self.start, optax.adam(0.02), "B first")
        optimiser = optax.adam(0.02)
        ((a, b),) = self.start
        moments = {"a": optimiser.init(a), "b": optimiser.init(b)}

        @jax.jit
        def turn(a, b, moments):
            updates, of_b = optimiser.update(gradient(SINGLE, (Adapter(a, b),))[0].b, moments["b"])
            b = b + updates
            updates, of_a = optimiser.update(gradient(SINGLE, (Adapter(a, b),))[0].a, moments["a"])
            return a + updates, b, {"a": of_a, "b": of_b}

        for _ in range(5):
            a, b, moments = turn(a, b, moments)
        assert_same(at(seen.history, 5), (Adapter(a, b),))

    def test_shrinking_a_is_stable_lora(self):
        """Stable-LoRA's step, A <- (1 - rate eta) A, then A <- A - eta dL/dA with the gradient of before: just that.
        With the gradient at the shrunken A it is the same up to O(eta^2) a step."""
        rate, eta = 0.3, 0.02
        seen = descended(SINGLE, self.start, eta, flow=ShrinkA(rate))

        def stable(steps, eta, gradient_after):
            ((a, b),) = self.start
            for _ in range(steps):
                shrunken = np.asarray((1 - rate * eta) * a)
                ((da, db),) = gradient(SINGLE, (Adapter(shrunken if gradient_after else a, b),))
                a, b = shrunken - eta * np.asarray(da), np.asarray(b) - eta * np.asarray(db)
            return (Adapter(a, b),)

        assert_same(at(seen.history, 5), stable(5, eta, gradient_after=False))
        chain = optax.chain(
            optax.scale(-1.0), optax.stateless(ShrinkA(rate)), optax.scale(eta)
        )  # flows take velocities
        assert_same(at(seen.history, 5), by_optax(SINGLE, self.start, chain, 5))

        def difference(eta, stop):
            ours = at(descended(SINGLE, self.start, eta, flow=ShrinkA(rate)).history, stop)
            return np.linalg.norm(flat(ours) - flat(stable(STOPS[stop], eta, True)))

        coarse, fine = difference(0.01, 6), difference(0.005, 7)
        assert 0 < fine < 1e-2
        assert coarse / fine == pytest.approx(2.0, rel=0.05)


class TestScalingFactor:
    """The loss 1/2 ||shift - s B A||^2 from (A, B) is that with s = 1 from sqrt(s) (A, B)."""

    s = 3.0
    start = (adapters_for(SINGLE, 4)[0]._replace(b=np.zeros((4, RANK))),)

    def losses(self, step, step_for_one):
        scaled = SingleLayer(SINGLE.shift, scaling=self.s)
        bigger = jax.tree.map(lambda leaf: np.sqrt(self.s) * leaf, self.start)
        runs = descended(scaled, self.start, step), descended(SINGLE, bigger, step_for_one)
        return [np.asarray(run.observables["loss"]) for run in runs]

    def test_gradient_descent_takes_s_times_the_step(self):
        ours, theirs = self.losses(0.01, self.s * 0.01)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
        assert ours[-1] < 0.9 * ours[0]

    def test_adam_takes_the_root_of_s_times_the_step(self):
        """With epsilon 0, but for the first gradient of A, which is 0 over 0 where B is."""
        adam = [optax.adam(0.01 * factor, eps=1e-300) for factor in (1.0, np.sqrt(self.s))]
        ours, theirs = self.losses(*adam)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
        assert ours[-1] < 0.9 * ours[0]
        loop = by_optax(SingleLayer(SINGLE.shift, scaling=self.s), self.start, adam[0], STOPS[6])
        assert ours[6] == pytest.approx(float(SingleLayer(SINGLE.shift, scaling=self.s).loss(loop)), rel=1e-9)


def test_reverse_mode_with_respect_to_step_adapters_and_problem():
    """One program gives the loss and its gradient at a point and around it: against central differences."""

    def log_loss(point):
        problem = SingleLayer(SINGLE.shift + point[2] * random(11, 4, 3), scaling=point[3])
        start = jax.tree.map(lambda leaf: point[1] * leaf, TestSteps.start)
        seen = descend(problem, start, steps=12, step=point[0], saves=[0, 5, 12], order="A first")
        return jnp.log(seen.observables["loss"][-1])

    here, step = np.array([[0.02, 1.1, 0.2, 1.3]]), 1e-5
    points = here + step * np.concatenate([np.zeros((1, 4)), np.eye(4), -np.eye(4)])
    values, gradients = map(np.asarray, jax.jit(jax.vmap(jax.value_and_grad(log_loss)))(points))
    np.testing.assert_allclose(gradients[0], (values[1:5] - values[5:]) / (2 * step), rtol=1e-6)
    assert np.all(gradients[0] != 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, "steps must be an integer, got 2.5"),
        ({"step": -0.1}, "step must be a positive number, a schedule, a StepRule or an optimiser of optax, got -0.1"),
        ({"step": np.nan}, "step must be a positive number, .*, got nan"),
        ({"step": "fast"}, "step must be a positive number, .*, got 'fast'"),
        ({"step": MuKlabjan}, "step must be a positive number, .*, got the class MuKlabjan"),
        ({"step": jnp.ones(2)}, r"step must be a positive number, .*, got shape \(2,\) of float64"),
        (
            {"order": "b first"},
            r"order must be 'simultaneous', 'A first' or 'B first', got 'b first' \(did you mean 'B",
        ),
        ({"saves": 1}, "saves must be at least 2, or an array of iterations, got 1"),
        ({"saves": [0.0, 5.0]}, "saves must be a whole number, or an array of at least two iterations, got"),
        ({"saves": [0, 11]}, "saves must be at most steps = 10, got 11"),
        ({"saves": [3, 3]}, "saves must increase, got 3 after 3"),
        ({"saves": np.array([-1, 3])}, "saves must be at least 0, got -1"),
        ({"saves": np.array([5, 3], np.uint8)}, "saves must increase, got 3 after 5"),
        ({"saves": [[0], [3]]}, r"saves must be a whole number, or an array of at least two iterations, got \[\[0"),
        ({"saves": "all"}, "saves must be a whole number, or an array of at least two iterations, got 'all'"),
        ({"saves": True}, "saves must be a whole number, or an array of at least two iterations, got True"),
        ({"steps": True}, "steps must be an integer, got True"),
        ({"flow": ScaledGD}, "flow must be a Flow, or the name of one, .*, got .*"),
        (
            {"step": optax.chain(optax.stateless(ScaledGD(0.1)), optax.sgd(0.1)), "order": "A first"},
            "step must be an optimiser that is content with the gradient and the factors of its group, and the",
        ),
        ({"flow": "sacled"}, "flow must be 'plain', .*, got 'sacled'"),
        ({"flow": "scaled"}, "damping must be positive where a factor's rank is below 2, .*, got 0 with A_1 of rank 0"),
        ({"adapters": ()}, "adapters must be a tuple and hold one Adapter for each of 1 layers, got"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    half = (Adapter(np.zeros((RANK, 3)), random(12, 4, RANK)),)
    good = {"problem": SINGLE, "adapters": half, "steps": 10, "step": 0.1}
    with pytest.raises(InputError, match=f"^{message}") as caught:
        descend(**(good | arguments))
    assert "\n" not in str(caught.value)


def test_bad_rules_get_one_line():
    with pytest.raises(InputError, match=r"^smoothness must be a positive number, got -1\.0$"):
        MuKlabjan(-1.0)
    must = r"^problem must adapt one layer \(SingleLayer, Regression or SoftmaxRegression\) for the step rule MuKlabjan"
    with pytest.raises(InputError, match=f"{must}, got Factorization$"):
        descend(DOUBLE, adapters_for(DOUBLE, 2), steps=3, step=MuKlabjan())
    with pytest.raises(InputError, match=r"^flow must be 'plain' for the step rule MuKlabjan, got 'balora'$"):
        descend(SINGLE, adapters_for(SINGLE, 2), steps=3, step=MuKlabjan(), flow="balora")  # which also projects

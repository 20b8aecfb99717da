"""Gradient descent beside loops written out, the flow it converges to, and what is proved of Mu and Klabjan's steps."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp

from lora_flow import (
    Adapter,
    Chain,
    InputError,
    LoRAPlus,
    MuKlabjan,
    Plain,
    Regression,
    ScaledGD,
    ShrinkA,
    SingleLayer,
    SoftmaxRegression,
    aligned_problem,
    descend,
)
from lora_flow.dynamics.descend import ORDERS, _iterations

RANK = 2
STOPS = (0, 1, 2, 3, 4, 5, 100, 200, 400)
STEPS = 402  # two beyond the last iteration that is saved


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def adapters_for(problem, seed, scale=0.5, rank=RANK):
    shapes = (((rank, n_in), (n_out, rank)) for n_out, n_in in problem.layers)
    return tuple(Adapter(*(scale * random(seed + shape[0], *shape) for shape in pair)) for pair in shapes)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


SINGLE = SingleLayer(0.6 * random(1, 4, 3))
DOUBLE = aligned_problem(jax.random.key(1), m=4, n=3, h=5, delta_w=0.5, component=[0, 1], shift_scale=[3.0, 2.0])
PROBLEMS = {"SingleLayer": SINGLE, "Factorization": DOUBLE}
ENDS = {"SingleLayer": 1.0, "Factorization": 0.1}


def descended(problem, start, step, order="simultaneous", **options):
    """One program for each kind of problem, step and order."""
    return descend(problem, start, steps=STEPS, step=step, saves=STOPS, order=order, save_adapters=True, **options)


@eqx.filter_jit
def gradient(problem, adapters):
    return jax.grad(problem.loss)(adapters)


def at(history, index):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], history)


def by_hand(problem, start, eta, steps, order="simultaneous"):
    """A and B less eta times their gradients; in the other orders all A move, then all B by the gradient there."""
    turns, now = {"A first": "ab", "B first": "ba"}.get(order, ["ab"]), start
    for _ in range(steps):
        for factors in turns:
            slope = gradient(problem, now)
            now = tuple(
                x._replace(**{f: np.asarray(getattr(x, f)) - eta * np.asarray(getattr(dx, f)) for f in factors})
                for x, dx in zip(now, slope, strict=True)
            )
    return now


def by_optax(problem, start, optimiser, steps):
    @jax.jit
    def advance(adapters, state):
        updates, state = optimiser.update(jax.grad(problem.loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    adapters, state = start, optimiser.init(jax.tree.map(jnp.asarray, start))
    for _ in range(steps):
        adapters, state = advance(adapters, state)
    return adapters


def assert_same(ours, theirs, rtol=1e-11):
    ours, theirs = flat(ours), flat(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * np.abs(theirs).max())


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
        np.testing.assert_array_equal(_iterations(10, 6), [0, 2, 4, 6, 8, 10])
        np.testing.assert_array_equal(_iterations(3, 101), [0, 1, 2, 3])
        np.testing.assert_array_equal(_iterations(10, np.array([2, 3, 9])), [2, 3, 9])

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


OPTIMISERS = {
    "lbfgs": optax.lbfgs(),
    "polyak": optax.polyak_sgd(),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15)),
    "every third": optax.MultiSteps(optax.adam(0.02), 3),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(optax.cosine_decay_schedule(0.02, 10))),
    "plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
}


class TestOptimisersOfOptax:
    start = adapters_for(SINGLE, 3)

    def loop(self, optimisers, steps, order="simultaneous"):
        """As optax's own examples have it; in turns with an optimiser and its loss for each factor."""
        optimisers = [
            optax.with_extra_args_support(one.gradient_transformation() if isinstance(one, optax.MultiSteps) else one)
            for one in optimisers
        ]
        groups = {"simultaneous": [("a", "b")], "A first": [("a",), ("b",)]}[order]

        def with_factors(now, group, factors):
            return tuple(x._replace(**dict(zip(group, new, strict=True))) for x, new in zip(now, factors, strict=True))

        def chosen(now, group):
            return now if len(group) == 2 else tuple(tuple(getattr(x, name) for name in group) for x in now)

        @jax.jit
        def advance(now, states):
            after = []
            for optimiser, group, state in zip(optimisers, groups, states, strict=True):
                factors = chosen(now, group)

                def loss(factors, now=now, group=group):
                    return SINGLE.loss(with_factors(now, group, factors))

                value, grad = jax.value_and_grad(loss)(factors)
                updates, state = optimiser.update(grad, state, factors, value=value, grad=grad, value_fn=loss)
                now = with_factors(now, group, optax.apply_updates(factors, updates))
                after.append(state)
            return now, after

        now = jax.tree.map(jnp.asarray, self.start)
        states = [one.init(chosen(now, group)) for one, group in zip(optimisers, groups, strict=True)]
        for _ in range(steps):
            now, states = advance(now, states)
        return now

    @pytest.mark.parametrize("name", OPTIMISERS)
    def test_is_its_own_loop(self, name):
        seen = descend(SINGLE, self.start, steps=7, step=OPTIMISERS[name], saves=[0, 7])
        assert_same(seen.adapters, self.loop([OPTIMISERS[name]], 7), rtol=1e-13)
        assert seen.observables["loss"][-1] < seen.observables["loss"][0]

    def test_in_turns_a_line_search_sees_the_loss_of_its_factor(self):
        seen = descend(SINGLE, self.start, steps=4, step=OPTIMISERS["lbfgs"], saves=[0, 4], order="A first")
        assert_same(seen.adapters, self.loop([OPTIMISERS["lbfgs"]] * 2, 4, "A first"), rtol=1e-13)

    def test_a_schedule_is_that_of_sgd(self):
        schedule = optax.exponential_decay(0.1, 3, 0.7)
        ours = descend(SINGLE, self.start, steps=7, step=schedule, saves=8)
        assert_same(ours.adapters, self.loop([optax.sgd(schedule)], 7), rtol=1e-13)
        sizes = 0.1 * 0.7 ** (np.arange(8) / 3)  # which optax computes of its integer count, in single precision
        np.testing.assert_allclose(ours.observables["step_size"], sizes, rtol=1e-6)
        np.testing.assert_allclose(ours.times, np.cumsum([0, *sizes[:-1]]), rtol=1e-6)

    @pytest.mark.parametrize(
        ("flow", "order"),
        [(Chain(Plain(), LoRAPlus(4.0), LoRAPlus(4.0)), "simultaneous"), (LoRAPlus(16.0), "A first")],
    )
    def test_lora_plus_is_two_learning_rates(self, flow, order):
        """As PEFT's `create_loraplus_optimizer` and the source have it: B's rate is that of A times the ratio."""
        slow, fast = optax.adam(0.01), optax.adam(0.16)
        together = optax.multi_transform({"a": slow, "b": fast}, lambda factors: (Adapter("a", "b"),))
        rates = {"simultaneous": [together], "A first": [slow, fast]}[order]
        ours = descend(SINGLE, self.start, steps=7, step=slow, saves=[0, 7], flow=flow, order=order)
        assert_same(ours.adapters, self.loop(rates, 7, order), rtol=1e-13)
        sgd = descend(SINGLE, self.start, steps=7, step=optax.sgd(0.01), saves=[0, 7], flow=flow, order=order)
        constant = descend(SINGLE, self.start, steps=7, step=0.01, saves=[0, 7], flow=flow, order=order)
        assert_same(sgd.adapters, constant.adapters, rtol=1e-13)

    def test_a_preconditioner_comes_before_the_optimiser_and_rates_after(self):
        """Scaled AdamW of arXiv 2402.02347: Adam of the preconditioned gradient."""
        adam = optax.adam(0.01)
        chain = optax.chain(optax.stateless(ScaledGD(0.1)), adam, optax.stateless(LoRAPlus(3.0)))
        flow = Chain(ScaledGD(0.1), LoRAPlus(3.0))
        ours = descend(SINGLE, self.start, steps=7, step=adam, saves=[0, 7], flow=flow)
        assert_same(ours.adapters, by_optax(SINGLE, self.start, chain, 7), rtol=1e-12)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"flow": Chain(LoRAPlus(3.0), ScaledGD(0.1))}, "flow must have its learning rates, LoRAPlus, last in the"),
            ({"step": OPTIMISERS["polyak"], "flow": "lora-plus:2"}, "step must be an optimiser .*, without a loss"),
            ({"step": OPTIMISERS["lbfgs"], "flow": ScaledGD(0.1)}, "step must be an optimiser .*, without a loss"),
            ({"step": optax.contrib.sophia(0.1)}, "step must be an optimiser .* and the loss, got one that fails with"),
            ({"step": optax.adam}, "step must be a positive number, .*: a schedule makes one number of an iteration"),
            ({"step": lambda iteration: "fast"}, "step must be a positive number, .*: a schedule makes one number"),
            ({"step": optax.adam(0.1).init}, "step must be a positive number, .*: a schedule makes one number"),
        ],
    )
    def test_what_cannot_be_is_refused_in_one_line(self, arguments, message, monkeypatch):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
        good = {"problem": SINGLE, "adapters": self.start, "steps": 3, "step": optax.adam(0.1)}
        with pytest.raises(InputError, match=f"^{message}") as caught:
            descend(**(good | arguments))
        assert "\n" not in str(caught.value)


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


LANES, ITERATIONS = 48, 150


def single(draw, scale):
    return SingleLayer(draw[:4, :3], scaling=10 ** (1.8 * scale - 1.3))


def softmax(draw, scale):
    labels = jnp.argmax(draw[:20, 4:7], axis=1)
    return SoftmaxRegression(draw[:20, :4], labels, draw[20:23, :4], scaling=10 ** (2 * scale - 1))


def drawn(make, lanes):
    """Problems side by side, and two adapters for each with norms over three decades."""
    generator = np.random.default_rng(5)
    problems = jax.jit(jax.vmap(make))(generator.normal(size=(lanes, 23, 7)), generator.uniform(size=lanes))
    ((n_out, n_in),) = jax.eval_shape(make, jnp.zeros((23, 7)), jnp.zeros(())).layers
    shapes = Adapter((lanes, RANK, n_in), (lanes, n_out, RANK))

    def one():
        sizes = 10 ** generator.uniform(-2, 0.7, size=(2, lanes, 1, 1))
        return Adapter(*(size * generator.normal(size=shape) for size, shape in zip(sizes, shapes, strict=True)))

    return problems, one(), one()


def product_gradient(problem, a, b):
    """dl/d(B A), by differentiation."""
    return problem.scaling * jax.grad(problem.loss_of)(problem.scaling * (b @ a))


@pytest.fixture(scope="module", params=[single, softmax])
def run(request):
    """J, ||grad J||, ||V||, ||grad l|| and L at all iterations of many runs, and the runs."""
    problems, starts, _ = drawn(request.param, LANES)

    def one(problem, start):
        seen = descend(problem, (start,), steps=ITERATIONS, step=MuKlabjan(), saves=ITERATIONS + 1, save_adapters=True)

        def norms(adapter):
            gradient = jax.grad(problem.loss)((adapter,))
            return [jnp.linalg.norm(ravel_pytree(x)[0]) for x in (gradient, adapter)] + [
                jnp.linalg.norm(product_gradient(problem, *adapter))
            ]

        return seen, jax.vmap(norms)(seen.history[0]), problem.smoothness()

    seen, norms, smoothness = jax.jit(jax.vmap(one))(problems, starts)
    assert f"Trajectory of {LANES} lanes ({LANES} success)" in str(seen)
    gradient, size, slope = map(np.asarray, norms)
    loss = np.asarray(seen.observables["loss"])
    return seen, loss, gradient, size, slope, np.asarray(smoothness)[:, None], (problems, starts)


class TestMuKlabjan:
    """arXiv 2512.18248 by its inequalities, with l* = 0, which bounds both losses from below."""

    def test_the_rule_is_equation_3_4(self, run):
        seen, _, _, size, slope, smoothness, _ = run
        eta = np.minimum(1 / (4 * np.sqrt(2) * smoothness * (size**2 + slope)), 1.0)
        np.testing.assert_allclose(seen.observables["step_size"], eta, rtol=1e-9)
        np.testing.assert_allclose(seen.times[:, 1:], np.cumsum(eta, axis=1)[:, :-1], rtol=1e-9)
        assert 0 < np.sum(eta == 1.0) < eta.size

    def test_each_lane_is_a_loop_by_itself(self, run):
        seen, *_, (problems, starts) = run
        for lane in (0, LANES - 1):
            problem, now = at(problems, lane), (at(starts, lane),)
            for eta in np.asarray(seen.observables["step_size"])[lane, :5]:
                now = by_hand(problem, now, eta, 1)
            assert_same(at(seen.history, (lane, 5)), now)

    def test_the_loss_falls_by_a_quarter_of_the_step_times_the_squared_gradient(self, run):
        seen, loss, gradient, *_ = run
        eta = np.asarray(seen.observables["step_size"])
        bound = loss - eta / 4 * gradient**2
        assert np.all(loss[:, 1:] <= bound[:, :-1] + 1e-14 * loss[:, :1])

    def test_the_least_gradient_is_bounded_by_theorem_3_5(self, run):
        seen, loss, gradient, *_ = run
        least = np.minimum.accumulate(gradient**2, axis=1)[:, :-1]
        assert np.all(least <= 4 * loss[:, :1] / np.asarray(seen.times)[:, 1:])

    def test_the_steps_sum_to_what_the_rate_needs(self, run):
        """With D = J_0 - l*, c1 = 32 sqrt(2) L D and c0 = 1 + 4 sqrt(2) L (2 ||V_0||^2 + sqrt(2 L D)), T steps sum to
        at least ln(1 + c1 T/c0)/c1, and (sqrt(c0^2 + 2 c1 T) - c0)/c1."""
        seen, loss, _, size, _, smoothness, _ = run
        total, count = np.asarray(seen.times)[:, 1:], np.arange(1, ITERATIONS + 1)
        gap = loss[:, :1]
        c1 = 32 * np.sqrt(2) * smoothness * gap
        c0 = 1 + 4 * np.sqrt(2) * smoothness * (2 * size[:, :1] ** 2 + np.sqrt(2 * smoothness * gap))
        logarithm, root = np.log1p(c1 * count / c0) / c1, (np.sqrt(c0**2 + 2 * c1 * count) - c0) / c1
        assert np.all(logarithm <= root * (1 + 1e-12))
        assert np.all(total >= root)

    @pytest.mark.parametrize("make", [single, softmax])
    def test_lemma_3_3(self, make):
        """J(V + D) - J(V) - <grad J, D> is at most sqrt(2) L ||D||^2 ||V||^2 + sqrt(2) L ||D||^3 ||V||
        + sqrt(2)/4 L ||D||^4 + ||grad l|| ||D||^2."""
        problems, starts, moves = drawn(make, 1000)

        @jax.jit
        @jax.vmap
        def sides(problem, start, move):
            now, then = (start,), (jax.tree.map(jnp.add, start, move),)
            (v, _), (d, _) = ravel_pytree(start), ravel_pytree(move)
            change = problem.loss(then) - problem.loss(now) - ravel_pytree(jax.grad(problem.loss)(now))[0] @ d
            v, d, slope = (jnp.linalg.norm(x) for x in (v, d, product_gradient(problem, *start)))
            quartic = d**2 * v**2 + d**3 * v + d**4 / 4
            return change, jnp.sqrt(2.0) * problem.smoothness() * quartic + slope * d**2, problem.loss(then)

        change, bound, loss = map(np.asarray, sides(problems, starts, moves))
        assert np.all(change <= bound + 1e-13 * loss)
        assert np.max(change / bound) > 0.1, "the bound is far off: the test sees nothing"

    def test_a_smoothness_may_be_given(self):
        relu = Regression(random(7, 9, 3), random(8, 4, 3), weight=random(9, 4, 3), activation="relu")
        start = adapters_for(relu, 10)
        with pytest.raises(InputError, match=r"^activation must be 'linear' for a smooth loss, got 'relu'"):
            descend(relu, start, steps=3, step=MuKlabjan())
        size, first = eqx.filter_jit(MuKlabjan.size), jnp.array(0)
        sizes = [size(MuKlabjan(given), None, SINGLE, TestSteps.start, first) for given in (None, 5.0)]
        np.testing.assert_allclose(sizes[0], 5 * sizes[1], rtol=1e-12)


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


@pytest.mark.parametrize(
    ("change", "must"),
    [
        ({"flow": "lora-plus:16"}, "flow must be 'plain' for the step rule MuKlabjan, got 'lora-plus:16'"),
        ({"flow": "scaled:1e-3"}, "flow must be 'plain' for the step rule MuKlabjan, got 'scaled:0.001'"),
        ({"order": "A first"}, "order must be 'simultaneous' for the step rule MuKlabjan, got 'A first'"),
    ],
)
def test_the_step_that_always_descends_is_for_the_gradient_itself(change, must):
    with pytest.raises(InputError, match=f"^{must}$"):
        descend(SINGLE, TestSteps.start, steps=3, step=MuKlabjan(), **change)

"""The step of Mu and Klabjan, and what is proved of it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from descents import RANK, SINGLE, adapters_for, assert_same, at, by_hand, random
from jax.flatten_util import ravel_pytree

from lora_flow import Adapter, InputError, MuKlabjan, Regression, SingleLayer, SoftmaxRegression, descend

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
        sizes = [size(MuKlabjan(given), None, SINGLE, adapters_for(SINGLE, 3), first) for given in (None, 5.0)]
        np.testing.assert_allclose(sizes[0], 5 * sizes[1], rtol=1e-12)


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
        descend(SINGLE, adapters_for(SINGLE, 3), steps=3, step=MuKlabjan(), **change)

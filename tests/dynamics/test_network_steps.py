"""Step sizes for linear networks: what is proved of them, through `descend`, against NumPy and the theory functions."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import (
    Adapter,
    AdaptiveStep,
    AdmissibleStep,
    AroraStep,
    Backtracking,
    DuStep,
    GrowingStep,
    InputError,
    LinearNetwork,
    SingleLayer,
    aligned_problem,
    descend,
    narrow,
)
from lora_flow.dynamics.descend import StepRule
from lora_flow.dynamics.network_steps import RATES
from lora_flow.theory import linear_descent as theory
from lora_flow.theory import linear_local as local
from lora_flow.theory import linear_networks as networks
from lora_flow.theory.linear_flow import reduce

STEPS, FLOOR = 60, 1e-16
SHAPES = {"square": (4, 4, 60), "n > m": (5, 3, 60), "n < m": (3, 5, 60)}
PUBLISHED, TIGHT = (0.5, 1.5), (0.95, 1.05)  # c1 and c2; with those near to 1 eta_max is not the least of all
DOUBLE = aligned_problem(jax.random.key(1), m=4, n=3, h=5, delta_w=0.5, component=[0, 1], shift_scale=[3.0, 2.0])


def drawn(shape, noise, scale=1.0, rank=None, seed=0):
    """Singular values of X from 0.9 to 1.2, `rank` of them; Y is what the start gives, and noise."""
    n, m, h = shape
    rng = np.random.default_rng([seed, n, m])
    k = n if rank is None else rank
    left, right = (np.linalg.qr(rng.normal(size=(size, k)))[0] for size in (n + 2, n))
    x = left * np.linspace(0.9, 1.2, k) @ right.T
    w1, w2 = scale * rng.normal(size=(n, h)), scale * rng.normal(size=(h, m))
    return LinearNetwork(x @ w1 @ w2 + noise * rng.normal(size=(n + 2, m)), x), adapters(w1, w2)


def adapters(w1, w2):
    return (Adapter(w1.T, w2.T),)


@eqx.filter_jit
def descended(problem, start, rule, steps=STEPS):
    """Losses, steps and adapters of every iteration."""
    done = descend(problem, start, steps=steps, step=rule, saves=steps + 1, save_adapters=True)
    return done.observables["loss"], done.observables["step_size"], done.history


def run(problem, start, rule, **options):
    return jax.tree.map(np.asarray, descended(problem, start, rule, **options))


@eqx.filter_jit
def begun(rule, problem, start):
    return rule.init(problem, start)


@eqx.filter_jit
def each(function, problem, history, *values):
    """function(network, *values) at every iteration."""
    return jax.lax.map(lambda now: function(problem.network(now[0]), *now[1:]), (history, *values))


def assert_falls(loss, rate):
    """L(t + 1) <= rate(t) L(t) while the loss is not rounding."""
    seen = loss[1:] > FLOOR * loss[0]
    assert seen.sum() > 10
    assert np.all(loss[1:][seen] <= (rate[:-1] * loss[:-1])[seen] * (1 + 1e-9))


def tau_ends(history):
    ((a, b),) = history
    first, second = (np.linalg.svd(factor, compute_uv=False) for factor in (a, b))
    return first[:, -1] ** 2 + second[:, -1] ** 2, first[:, 0] ** 2 + second[:, 0] ** 2


@eqx.filter_jit
def about(problem, start, c1, c2):
    """The constants of Xu et al. 2023 at a start, and eta_max."""
    constants = theory.constants(*problem.network(start))
    return constants, theory.largest_step(constants, c1, c2).step


@eqx.filter_jit
def schedule_of(problem, start, fraction, d):
    """The constants of Xu et al. 2025 at a start, its schedule and rhobar_0; Y lies in the range of X."""
    x, _, w1, w2 = problem.network(start)
    constants = local.constants(networks.curvature(x), problem.loss(start), problem.solution, w1, w2)
    schedule = local.Schedule(constants, fraction * local.largest_step(constants, 0.5, d).step, 0.5, d)
    return schedule, jnp.asarray(schedule.rhobar)


BOUNDS = {
    "rho": lambda network, start, now, c: theory.rate(*network),
    "current": lambda network, start, now, c: theory.current_rate_bound(*network),
    "loss": lambda network, start, now, c: theory.rate_bound(start, now, *c),
    "start": lambda network, start, now, c: theory.rate_bound(start, start.loss, *c),
}


@pytest.mark.parametrize("shape", [pytest.param("square", marks=pytest.mark.long), "n > m", "n < m"])
def test_the_admissible_step_is_eta_max_and_keeps_every_promise(shape):
    problem, start = drawn(SHAPES[shape], noise=0.3)
    loss, step, history = run(problem, start, AdmissibleStep())
    constants, largest = about(problem, start, 0.5, 1.5)
    np.testing.assert_allclose(step, largest, rtol=1e-12)
    lowest, highest = tau_ends(history)
    assert constants.alpha > 0
    assert np.all(lowest >= 0.5 * constants.alpha)
    assert np.all(highest <= 1.5 * constants.beta)
    f = each(lambda _, eta, now: theory.rate_bound(constants, now, 0.5, 1.5).at(eta), problem, history, step, loss)
    assert_falls(loss, f)
    assert loss[-1] < 1e-3 * loss[0]


@pytest.mark.parametrize(
    ("rate", "shape", "c", "capped"),
    [
        ("rho", "n > m", PUBLISHED, True),
        ("current", "n < m", TIGHT, False),
        ("loss", "n > m", PUBLISHED, False),
        ("start", "n < m", TIGHT, False),
        *(pytest.param(rate, "square", TIGHT, False, marks=pytest.mark.long) for rate in RATES),
        pytest.param("current", "square", PUBLISHED, True, marks=pytest.mark.long),
    ],
)
def test_adaptive_steps_are_best_by_their_bound_up_to_the_cap_and_fall_by_it(rate, shape, c, capped):
    problem, start = drawn(SHAPES[shape], noise=0.3)
    loss, step, history = run(problem, start, AdaptiveStep(rate, *c))
    constants, largest = about(problem, start, *c)

    def at(network, now, eta):
        bound = BOUNDS[rate](network, constants, now, c)
        return bound.best_step(), jnp.asarray(bound.at(eta))

    best, proven = each(at, problem, history, loss, step)
    np.testing.assert_allclose(step, np.minimum(best, largest), rtol=1e-12)
    assert_falls(loss, proven)
    assert np.all((step > largest * (1 - 1e-6)) == capped), "the test is to see both"


@pytest.mark.parametrize(
    ("shape", "h", "d", "by_bound"),
    [
        ("n > m", 60, 1.5, False),
        ("n < m", 60, 1.5, True),
        *(pytest.param("square", 1000, 1.01, by_bound, marks=pytest.mark.long) for by_bound in (False, True)),
    ],
)
def test_growing_steps_grow_up_to_their_limit_and_fall_as_theorem_e_1_says(shape, h, d, by_bound):
    """With d = 1.01 they come to the limit, with d = 1.5 not."""
    problem, start = drawn((*SHAPES[shape][:2], h), noise=0.02, scale=h**-0.5)
    steps = STEPS if d == 1.5 else 4 * STEPS
    loss, step, history = run(problem, start, GrowingStep(0.8, c=0.5, d=d, by_bound=by_bound), steps=steps)
    schedule, rhobar = schedule_of(problem, start, 0.8, d)
    times = np.arange(steps + 1)

    def limit(network, t, now):
        smooth = local.smoothness(schedule.start.K, now, *network[2:])
        return jnp.asarray(1 / schedule.smoothness(t)) if by_bound else smooth.step()

    limits = each(limit, problem, history, times, loss)
    grown = schedule.eta0 * (1 + schedule.eta0**d) ** (times / 2)
    assert step[0] == pytest.approx(float(schedule.eta0), rel=1e-12)
    np.testing.assert_allclose(step, np.minimum(grown, limits), rtol=1e-10)
    assert np.all(np.diff(step[grown < limits]) > 0)
    assert step[-1] > 1.02 * step[0]
    assert (step[-1] < 0.99 * grown[-1]) == (d == 1.01)
    assert np.all(loss <= loss[0] * np.maximum(rhobar**times, FLOOR) * (1 + 1e-9))


@pytest.mark.parametrize("shape", ["n > m", pytest.param("n < m", marks=pytest.mark.long)])
def test_the_steps_of_arora_and_of_du_by_hand(shape):
    problem, start = drawn(SHAPES[shape], noise=0.3)
    x, y, w1, w2 = (np.asarray(matrix) for matrix in problem.network(start))
    size = np.linalg.norm(y)
    margin = np.linalg.svd(y, compute_uv=False)[min(w1.shape[0], w2.shape[1]) - 1] - np.linalg.norm(y - x @ w1 @ w2)
    assert margin > 0
    arora = (margin / np.linalg.norm(x, 2)) ** 3 / (6144 * 8 * size**4)
    np.testing.assert_allclose(run(problem, start, AroraStep())[1], arora, rtol=1e-9)
    du = np.sqrt(0.02 / min(w1.shape[0], w2.shape[1])) / (100 * np.arange(1, STEPS + 2) * size**1.5)
    loss, step, _ = run(problem, start, DuStep(epsilon=0.02))
    np.testing.assert_allclose(step, du, rtol=1e-9)
    assert np.all(np.diff(loss) < 0)


@pytest.mark.parametrize(
    "rule",
    [AdmissibleStep(), pytest.param(AdaptiveStep("loss"), marks=pytest.mark.long), AroraStep(), GrowingStep()],
    ids=str,
)
def test_without_a_margin_there_is_no_step(rule):
    """W1 = 0 is balanced with W2 = 0, where nothing is known of tau: alpha_0 = 0."""
    problem, _ = drawn(SHAPES["square"], noise=0.3)
    loss, step, _ = run(problem, adapters(np.zeros((4, 8)), np.zeros((8, 4))), rule, steps=3)
    np.testing.assert_array_equal(step, 0.0)
    np.testing.assert_array_equal(loss, loss[0])


class TestBacktracking:
    start = tuple(
        Adapter(*(0.5 * np.random.default_rng(3 + i).normal(size=shape) for shape in ((2, n), (m, 2))))
        for i, (m, n) in enumerate(DOUBLE.layers)
    )

    @pytest.mark.parametrize(("factor", "constant"), [(0.5, 0.5), pytest.param(0.1, 0.9, marks=pytest.mark.long)])
    def test_it_takes_the_first_step_that_meets_its_condition(self, factor, constant):
        loss, step, history = run(DOUBLE, self.start, Backtracking(first=2.0, factor=factor, constant=constant))

        @jax.jit
        def slack(now, eta):
            """L - constant eta ||grad||^2 - L+, which the condition wants to be at least zero."""
            gradient = jax.grad(DOUBLE.loss)(now)
            square = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient))
            after = DOUBLE.loss(jax.tree.map(lambda p, g: p - eta * g, now, gradient))
            return DOUBLE.loss(now) - constant * eta * square - after

        assert len(np.unique(step)) > 1
        for t, (now, eta) in enumerate(zip(loss, step, strict=True)):
            at = jax.tree.map(lambda leaf, t=t: leaf[t], history)
            tries = np.log(eta / 2.0) / np.log(factor)
            assert tries == pytest.approx(round(tries), abs=1e-9)
            assert slack(at, eta) >= -1e-14 * now
            assert eta == 2.0 or slack(at, eta / factor) < 1e-14 * now
        assert np.all(np.diff(loss) < 0)

    def test_it_stops_where_the_loss_is_rounding(self):
        problem, start = drawn(SHAPES["square"], noise=0.3)
        loss, step, _ = run(problem, start, Backtracking(), steps=200)
        stopped = step == 0
        assert 10 < np.argmax(stopped) < 200
        assert np.all(stopped[np.argmax(stopped) :])
        assert np.all(loss[stopped] < 1e-25 * loss[0])
        assert np.all(np.diff(loss)[~stopped[:-1]] < 0)

    def test_it_stops_where_there_is_no_slope(self):
        problem, _ = drawn(SHAPES["square"], noise=0.3)
        np.testing.assert_array_equal(run(problem, adapters(np.zeros((4, 6)), np.zeros((6, 4))), Backtracking())[1], 0)


RULES = (AdmissibleStep(), AdaptiveStep(), AroraStep(), DuStep(), GrowingStep())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_other_problems_are_refused(rule):
    single = SingleLayer(np.eye(3))
    for problem in (DOUBLE, single):
        start = tuple(Adapter(np.ones((2, n)), np.ones((m, 2))) for m, n in problem.layers)
        must = (
            f"^problem must be a LinearNetwork, with its loss, for {type(rule).__name__}, got {type(problem).__name__}$"
        )
        with pytest.raises(InputError, match=must):
            descend(problem, start, steps=2, step=rule)


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        (AdmissibleStep, {"c1": 1.0}, "c1 must lie between 0 and 1, got 1.0"),
        (AdmissibleStep, {"c2": 1.0}, "c2 must be above 1, got 1.0"),
        (AdaptiveStep, {"c1": np.nan}, "c1 must lie between 0 and 1, got nan"),
        (AdaptiveStep, {"rate": "strat"}, "rate must be 'rho', .* or 'start', got 'strat' .did you mean 'start'..$"),
        (DuStep, {"epsilon": 0.0}, "epsilon must be positive, got 0.0"),
        (GrowingStep, {"fraction": 1.0}, "fraction must lie between 0 and 1, got 1.0"),
        (GrowingStep, {"c": 0.0}, "c must lie between 0 and 1, got 0.0"),
        (GrowingStep, {"d": 1.0}, "d must be above 1, got 1.0"),
        (Backtracking, {"first": np.inf}, "first must be positive and finite, got inf"),
        (Backtracking, {"factor": 1.0}, "factor must lie between 0 and 1, got 1.0"),
        (Backtracking, {"constant": 0.0}, "constant must lie between 0 and 1, got 0.0"),
    ],
)
def test_bad_arguments_get_one_line(rule, arguments, message):
    with pytest.raises(InputError, match=f"^{message}") as caught:
        rule(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rule", [AdmissibleStep(), GrowingStep(), Backtracking()], ids=lambda rule: type(rule).__name__
)
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"flow": "scaled:1e-3"}, "flow must be 'plain' for the step rule"),
        ({"flow": "lora-plus:16"}, "flow must be 'plain' for the step rule"),
        ({"order": "A first"}, "order must be 'simultaneous' for the step rule"),
    ],
)
def test_rules_are_for_the_gradient_of_both_factors(rule, how, message):
    problem, start = drawn(SHAPES["square"], noise=0.3)
    with pytest.raises(InputError, match=f"^{message} {type(rule).__name__}, got"):
        descend(problem, start, steps=2, step=rule, **how)


@pytest.mark.parametrize("constant", [np.float64(0.5), jnp.asarray(0.5)], ids=["numpy", "jax"])
def test_constants_may_be_arrays(constant):
    problem, start = drawn(SHAPES["square"], noise=0.3)
    rule, given = AdmissibleStep(), AdmissibleStep(c1=constant, c2=1 + constant)
    np.testing.assert_allclose(begun(rule, problem, start), begun(given, problem, start), rtol=1e-13)
    assert begun(GrowingStep(c=constant, d=1 + constant), problem, start).eta0 > 0


@pytest.mark.parametrize("rate", RATES)
def test_at_zero_weights_the_step_is_zero(rate):
    problem = LinearNetwork(np.eye(3))
    nothing = adapters(np.zeros((3, 5)), np.zeros((5, 3)))
    rule = AdaptiveStep(rate)
    size = eqx.filter_jit(lambda now: rule.size(rule.init(problem, now), problem, now, jnp.array(0)))
    assert float(size(nothing)) == 0


@eqx.filter_jit
def init_reduced(rule, network):
    x, y, w1, w2 = network
    return rule.init(LinearNetwork(y, x, rank=x.shape[1]), adapters(w1, w2))


@eqx.filter_jit
def size_reduced(rule, state, network, t):
    x, y, w1, w2 = network
    return rule.size(state, LinearNetwork(y, x, rank=x.shape[1]), adapters(w1, w2), t)


@pytest.mark.parametrize(
    "rule",
    [
        AdmissibleStep(),
        *(pytest.param(rule, marks=pytest.mark.long) for rule in (AdaptiveStep("rho"), GrowingStep())),
        AdaptiveStep("current"),
    ],
    ids=str,
)
def test_dependent_inputs_have_the_steps_of_the_reduced_problem(rule):
    """X, 8 x 6, has rank 3: beside descent of all the weights, written out, with steps of what the loss depends on."""
    problem, start = drawn((6, 4, 60), noise=0.3, rank=3)
    loss, step, history = run(problem, start, rule, steps=8)
    x, y = np.asarray(problem.inputs), np.asarray(problem.inputs @ problem.solution)
    w1, w2 = start[0].a.T, start[0].b.T
    state = init_reduced(rule, reduce(x, y, w1, w2, rank=3).network)
    for t in range(8):
        error = y - x @ w1 @ w2
        eta = float(size_reduced(rule, state, reduce(x, y, w1, w2, rank=3).network, jnp.asarray(t)))
        assert step[t] == pytest.approx(eta, rel=1e-9)
        assert loss[t] == pytest.approx(0.5 * np.sum(error**2), rel=1e-9)
        w1, w2 = w1 + eta * x.T @ error @ w2.T, w2 + eta * w1.T @ x.T @ error
    assert loss[8] < 0.9 * loss[0]
    np.testing.assert_allclose(history[0].a[8], w1.T, atol=1e-9)


@pytest.mark.parametrize(
    "rule",
    [
        *(pytest.param(rule, marks=pytest.mark.long) for rule in (AdaptiveStep("current"), GrowingStep())),
        Backtracking(),
    ],
    ids=str,
)
def test_wide_layers_have_the_steps_of_narrowed_ones(rule):
    problem, start = drawn((4, 3, 500), noise=0.3)
    assert narrow(start)[0].rank == 7
    wide, slim = (run(problem, one, rule, steps=10) for one in (start, narrow(start)))
    np.testing.assert_allclose(wide[1], slim[1], rtol=1e-9)
    np.testing.assert_allclose(wide[0], slim[0], rtol=1e-6, atol=1e-20 * wide[0][0])


@pytest.mark.parametrize("rule", [AdaptiveStep("rho"), pytest.param(GrowingStep(), marks=pytest.mark.long)], ids=str)
def test_lanes_have_steps_of_their_own(rule):
    (problem, one), (_, two) = (drawn(SHAPES["square"], noise=0.3, scale=scale) for scale in (1.0, 1.1))
    both = jax.tree.map(lambda *leaves: np.stack(leaves), one, two)
    _, steps, _ = jax.vmap(lambda start: descended(problem, start, rule, steps=5))(both)
    steps = np.asarray(steps)
    for start, step in zip((one, two), steps, strict=True):
        np.testing.assert_allclose(step, run(problem, start, rule, steps=5)[1], rtol=1e-9)
    assert np.all(steps[0] > 1.01 * steps[1])


class Own(StepRule):
    """A user's: L_0/(10^4 (1 + t)), L_0 the loss where it began, of any problem; it counts how often it begins."""

    begun: Any = eqx.field(static=True)

    def init(self, problem, adapters):
        self.begun.append(1)
        return problem.loss(adapters)

    def size(self, state, problem, adapters, iteration):
        return state / (1e4 * (1 + iteration))


class Calls(list):
    __hash__ = object.__hash__


@pytest.mark.parametrize("order", ["simultaneous", "B first"])
def test_a_rule_of_ones_own_sees_the_start_once_and_the_iteration(order):
    problem, start = drawn(SHAPES["n > m"], noise=0.3)
    calls = Calls()
    done = descend(problem, start, steps=9, step=Own(calls), saves=[0, 4, 9], order=order)
    step = float(problem.loss(start)) / 1e4 / (1 + np.arange(10))
    np.testing.assert_allclose(done.observables["step_size"], step[[0, 4, 9]], rtol=1e-12)
    np.testing.assert_allclose(done.times, np.append(0, np.cumsum(step))[[0, 4, 9]], rtol=1e-12)
    assert len(calls) == 1

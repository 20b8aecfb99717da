"""One adapted layer: a matrix, a regression, a classification, against their definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_only import LossOnly, tasks

from lora_flow import (
    Adapter,
    InputError,
    Regression,
    SingleLayer,
    SoftmaxRegression,
    gaussian_init,
    lora_ga_init,
    solve,
)

KEY = jax.random.key(7)
OUT, IN, SCALING = 4, 3, 0.6
SEEDS = st.integers(0, 2**31)
SAMPLES = st.sampled_from([2, 8])  # fewer than `IN` and more: a linear layer keeps the triangular factor then
KINDS = ("matrix", "linear", "relu", "softmax")


def draw(kind, seed, samples):
    """A problem, adapters of rank two for it, and its loss as a function of s B A, in NumPy."""
    rng = np.random.default_rng(seed)
    inputs, shift, weight = (rng.standard_normal(shape) for shape in ((samples, IN), (OUT, IN), (OUT, IN)))
    labels = rng.integers(0, OUT, samples)
    adapters = (Adapter(jnp.asarray(rng.standard_normal((2, IN))), jnp.asarray(rng.standard_normal((OUT, 2)))),)
    act = {"linear": lambda y: y, "relu": lambda y: np.maximum(y, 0)}.get(kind)

    def regression(change):
        return np.sum((act(inputs @ (weight + change).T) - act(inputs @ (weight + shift).T)) ** 2) / (2 * samples)

    def cross_entropy(change):
        logits = inputs @ (weight + change).T
        return np.mean(np.log(np.sum(np.exp(logits), axis=1)) - logits[np.arange(samples), labels])

    if kind == "matrix":
        return SingleLayer(shift, SCALING, weight), adapters, lambda change: 0.5 * np.sum((shift - change) ** 2)
    if kind == "softmax":
        return SoftmaxRegression(inputs, labels, weight, SCALING), adapters, cross_entropy
    return Regression(inputs, shift, weight, kind, SCALING), adapters, regression


@jax.jit
def loss_field_and_gradient(problem, adapters):
    return problem.loss(adapters), problem.field(adapters), jax.grad(problem.loss)(adapters)


@jax.jit
def descent(problem, product):
    """-dL/d(B A) where B A is this."""
    return problem.product_descent((Adapter(jnp.eye(product.shape[1]), product),))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, samples=SAMPLES)
def test_the_loss_is_its_definition_and_the_flow_its_negative_gradient(kind, seed, samples):
    problem, adapters, loss = draw(kind, seed, samples)
    ((a, b),) = adapters
    found, ((to_a, to_b),), ((by_a, by_b),) = loss_field_and_gradient(problem, adapters)
    np.testing.assert_allclose(found, loss(SCALING * np.asarray(b) @ np.asarray(a)), rtol=1e-12)
    np.testing.assert_allclose(to_a, -by_a, rtol=0, atol=1e-12 * (1 + np.max(np.abs(by_a))))
    np.testing.assert_allclose(to_b, -by_b, rtol=0, atol=1e-12 * (1 + np.max(np.abs(by_b))))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS, samples=SAMPLES)
def test_the_linearised_task_is_what_a_problem_without_a_formula_gets_by_differentiation(kind, seed, samples):
    problem, _, _ = draw(kind, seed, samples)
    (ours,), (generic,) = map(tasks, (problem, LossOnly(problem)))
    np.testing.assert_allclose(ours, generic, rtol=0, atol=1e-13 * (1 + np.max(np.abs(generic))))


@pytest.mark.parametrize("kind", ["matrix", "linear", "softmax"])
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, samples=SAMPLES, distance=st.sampled_from([1e-2, 1.0, 1e2]))
def test_smoothness_bounds_how_fast_the_gradient_changes(kind, seed, samples, distance):
    """||D(X) - D(Y)|| <= L ||X - Y|| for any two products B A; of a quadratic loss somewhere with equality."""
    problem, _, _ = draw(kind, seed, samples)
    bound = float(problem.smoothness())
    first = np.random.default_rng(seed + 1).standard_normal((OUT, IN))
    step = distance * np.random.default_rng(seed + 2).standard_normal((OUT, IN))
    if kind == "linear":
        step = np.outer(np.ones(OUT), np.linalg.svd(problem.features)[2][0])
    one, other = (np.asarray(descent(problem, x)) for x in (first, first + step))
    change = np.linalg.norm(one - other) / np.linalg.norm(step)
    assert change <= bound * (1 + 1e-9)
    if kind != "softmax":
        assert change >= bound * (1 - 1e-9)


def test_no_smaller_constant_than_a_half_bounds_the_softmax():
    """With two classes, equal logits and one sample the second derivative is 1/2 along (1, -1): the bound is sharp."""
    problem = SoftmaxRegression(np.array([[2.0]]), np.array([0]), np.zeros((2, 1)), scaling=3.0)
    step = 1e-4 * np.array([[1.0], [-1.0]])
    one, other = (np.asarray(descent(problem, x)) for x in (-step, step))
    assert np.linalg.norm(one - other) == pytest.approx(
        2 * float(problem.smoothness()) * np.linalg.norm(step), rel=1e-6
    )


def test_only_the_gradient_of_a_linear_layer_has_a_known_constant():
    problem, _, _ = draw("relu", 0, 8)
    with pytest.raises(InputError, match="activation must be 'linear' for a smooth loss, got 'relu'"):
        problem.smoothness()
    assert np.isnan(problem.lowest_loss(1))


def test_a_solved_regression_keeps_its_digits():
    """What the outputs lack is a difference of weights, not of outputs: next to the solution it is exact."""
    inputs, weight = np.eye(3), 1e6 * np.ones((2, 3))
    shift = jnp.asarray(1e-3 * np.arange(1.0, 7.0).reshape(2, 3))
    change = (1 - 1e-10) * shift
    for activation in ("linear", "relu"):
        problem = Regression(inputs, shift, weight, activation)
        np.testing.assert_allclose(problem.loss_of(change), np.sum((shift - change) ** 2) / 6, rtol=1e-14)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, rank=st.sampled_from([1, 2, 3]), frozen=st.booleans())
def test_no_adapters_of_a_rank_do_better_than_the_lowest_loss(seed, rank, frozen):
    """Eckart and Young: the best s B A keeps the largest singular values of what there is to learn, as X sees it."""
    rng = np.random.default_rng(seed)
    inputs, shift, taken = (rng.standard_normal(shape) for shape in ((8, IN), (OUT, IN), (OUT, IN)))
    taken = taken if frozen else None
    learned = shift + (0 if taken is None else taken)  # the weight is frozen at W - taken
    for problem, seen in ((SingleLayer(shift), np.eye(IN)), (Regression(inputs, shift), inputs / np.sqrt(8))):
        lowest = problem.lowest_loss(rank, taken)
        left, sigma, right = np.linalg.svd(learned @ seen.T)
        best = left[:, :rank] * sigma[:rank] @ right[:rank] @ np.linalg.pinv(seen).T
        np.testing.assert_allclose(lowest, 0.5 * np.sum(((learned - best) @ seen.T) ** 2), rtol=1e-10, atol=1e-24)
        near = best + 0.1 * rng.standard_normal((20, OUT, IN))
        u, s, vt = np.linalg.svd(near, full_matrices=False)
        near = (u[..., :rank] * s[:, None, :rank]) @ vt[:, :rank]
        assert np.all(lowest <= 0.5 * np.sum(((learned - near) @ seen.T) ** 2, axis=(1, 2)))
        assert problem.lowest_loss(IN, taken) == 0.0


def test_a_shift_of_lora_ga_can_be_learned_at_its_rank():
    """With one layer and white inputs Delta + s B(0) A(0) has its rows in V_{1:r}, hence rank r; s = 1 (section 7)."""
    rng = np.random.default_rng(0)
    problem = SingleLayer(rng.standard_normal((30, 2)) @ rng.standard_normal((2, 40)))
    ((a, b),) = lora_ga_init(KEY, problem, rank=4, alpha=1.0)
    assert problem.lowest_loss(4, np.asarray(b @ a)) == 0.0
    assert problem.lowest_loss(3, np.asarray(b @ a)) > 1.0
    assert problem.lowest_loss(2) == 0.0


def test_a_single_layer_with_a_scaling_is_one_with_scaled_factors():
    """B A -> s B A with the same shift is the flow of sqrt(s)-scaled factors, s times as fast."""
    shift = np.random.default_rng(0).standard_normal((4, 6))
    start = gaussian_init(KEY, SingleLayer(shift), rank=2, alpha=0.1)
    grown = tuple(adapter._replace(a=2 * adapter.a, b=2 * adapter.b) for adapter in start)
    how = {"rtol": 1e-10, "solver": "Tsit5"}
    ((a, b),) = solve(SingleLayer(shift, scaling=4.0), start, t1=0.25, **how).adapters
    ((a1, b1),) = solve(SingleLayer(shift), grown, t1=1.0, **how).adapters
    np.testing.assert_allclose(4 * b @ a, b1 @ a1, atol=1e-8)


ONES = np.ones((2, 3))
GOOD = {
    SingleLayer: {"shift": ONES},
    Regression: {"inputs": ONES, "shift": ONES, "weight": ONES},
    SoftmaxRegression: {"inputs": ONES, "labels": np.array([0, 1]), "weight": ONES},
}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (SingleLayer, {"shift": 0 * ONES}, "shift must have a non-zero entry, got nothing to learn"),
        (SingleLayer, {"shift": np.ones(3)}, "shift must be a matrix, got shape (3,)"),
        (SingleLayer, {"shift": np.nan * ONES}, "shift must be finite, got 6 entries that are NaN or infinite"),
        (SingleLayer, {"scaling": -1.0}, "scaling must be positive and finite, got -1.0"),
        (SingleLayer, {"scaling": np.inf}, "scaling must be positive and finite, got inf"),
        (SingleLayer, {"scaling": jnp.ones(2)}, "scaling must be positive and finite, got shape (2,) of float64"),
        (SingleLayer, {"weight": ONES.T}, "weight must have the shift's shape (2, 3), got (3, 2)"),
        (Regression, {"inputs": ONES.T}, "inputs must have 3 columns, as the weight has, got shape (3, 2)"),
        (Regression, {"inputs": np.inf * ONES}, "inputs must be finite, got 6 entries that are NaN or infinite"),
        (Regression, {"shift": 0 * ONES}, "shift must have a non-zero entry, got nothing to learn"),
        (
            Regression,
            {"activation": "relu", "weight": None},
            "weight must be given for a layer with an activation, got None",
        ),
        (
            Regression,
            {"activation": "rulu"},
            "activation must be 'linear' or 'relu', got 'rulu' (did you mean 'relu'?)",
        ),
        (SoftmaxRegression, {"inputs": ONES.T}, "inputs must have 3 columns, as the weight has, got shape (3, 2)"),
        (
            SoftmaxRegression,
            {"labels": np.array([0])},
            "labels must be 2, one a sample, got 1",
        ),
        (
            SoftmaxRegression,
            {"labels": np.array([0.0, 1.0])},
            "labels must be integers from 0 to 1, got float64 of shape (2,)",
        ),
        (SoftmaxRegression, {"labels": np.array([0, 2])}, "labels must be integers from 0 to 1, got 0 to 2"),
        (
            SoftmaxRegression,
            {"labels": np.array([-1, 0])},
            "labels must be integers from 0 to 1, got -1 to 0",
        ),
    ],
)
def test_a_bad_problem_is_refused_in_one_line(kind, change, message):
    with pytest.raises(InputError) as refused:
        kind(**(GOOD[kind] | change))
    assert str(refused.value) == message

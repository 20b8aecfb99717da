import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_flow import Adapter, Factorization, InputError, linearised_task, pad, zero_adapters

DIM = st.sampled_from([1, 2, 5])  # few values: every shape compiles anew


def random_problem(seed, m, n, h, rank):
    rng = np.random.default_rng(seed)
    problem = Factorization(w1=rng.normal(size=(h, n)), w2=rng.normal(size=(m, h)), shift=rng.normal(size=(m, n)))
    adapters = tuple(
        Adapter(jnp.asarray(rng.normal(size=(rank, n_in))), jnp.asarray(rng.normal(size=(n_out, rank))))
        for n_out, n_in in problem.layers
    )
    return problem, adapters


def textbook_loss(problem, adapters):
    """1/2 ||Yft - (W2 + B2 A2)(W1 + B1 A1)||_F^2, equation (2) of arXiv 2503.06982."""
    (a1, b1), (a2, b2) = adapters
    target = problem.shift + problem.w2 @ problem.w1
    return 0.5 * jnp.sum((target - (problem.w2 + b2 @ a2) @ (problem.w1 + b1 @ a1)) ** 2)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), m=DIM, n=DIM, h=DIM, rank=st.sampled_from([1, 3]))
def test_loss_and_field_are_the_textbook_loss_and_its_negative_gradient(seed, m, n, h, rank):
    problem, adapters = random_problem(seed, m, n, h, rank)
    scale = float(textbook_loss(problem, adapters)) + 1.0
    np.testing.assert_allclose(problem.loss(adapters), textbook_loss(problem, adapters), rtol=1e-11)
    gradient = jax.grad(lambda y: textbook_loss(problem, y))(adapters)
    for ours, theirs in zip(jax.tree.leaves(problem.field(adapters)), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, -theirs, atol=1e-11 * scale)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), m=DIM, n=DIM, h=DIM)
def test_linearised_task_is_what_a_problem_without_a_formula_gets_by_differentiation(seed, m, n, h):
    problem, _ = random_problem(seed, m, n, h, 1)

    class LossOnly:
        layers = problem.layers
        loss = staticmethod(problem.loss)

    for ours, theirs in zip(problem.linearised_task(), linearised_task(LossOnly()), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_padding_with_zero_rows_and_columns_changes_neither_loss_nor_flow():
    problem, adapters = random_problem(0, 4, 5, 6, 2)
    padded = pad(adapters, 5)
    np.testing.assert_allclose(problem.loss(padded), problem.loss(adapters), rtol=1e-14)
    for wide, narrow in zip(problem.field(padded), problem.field(adapters), strict=True):
        np.testing.assert_allclose(wide.a[:2], narrow.a, atol=1e-12)
        np.testing.assert_allclose(wide.b[:, :2], narrow.b, atol=1e-12)
        assert not jnp.any(wide.a[2:])
        assert not jnp.any(wide.b[:, 2:])


def test_zero_adapters_leave_half_the_squared_shift():
    problem, _ = random_problem(1, 4, 5, 6, 1)
    np.testing.assert_allclose(
        problem.loss(zero_adapters(problem.layers, 3)), 0.5 * jnp.sum(problem.shift**2), rtol=1e-15
    )


def test_a_target_is_the_same_as_its_shift():
    problem, _ = random_problem(2, 4, 5, 6, 1)
    same = Factorization(w1=problem.w1, w2=problem.w2, target=problem.shift + problem.w2 @ problem.w1)
    np.testing.assert_allclose(same.shift, problem.shift, atol=1e-13)


def test_the_loss_keeps_its_digits_where_the_textbook_form_loses_them():
    """At an exact solution the thin products leave nothing; the full product leaves rounding of the weights."""
    problem, adapters = random_problem(3, 6, 6, 30, 2)
    tiny = jax.tree.map(lambda leaf: 1e-4 * leaf, adapters)
    solved = Factorization(w1=1e3 * problem.w1, w2=problem.w2, shift=1e3 * jnp.eye(6))
    solved = Factorization(w1=solved.w1, w2=solved.w2, shift=solved.update(tiny))
    assert problem.loss(zero_adapters(problem.layers, 1)) > 1
    assert solved.loss(tiny) == 0.0
    assert textbook_loss(solved, tiny) > 1e-25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1": np.zeros(3)}, r"w1 must be a matrix, got shape \(3,\)"),
        ({"w2": np.zeros((4, 5))}, r"w2 must have as many columns as w1 has rows \(6\), got shape \(4, 5\)"),
        ({"shift": np.ones((5, 4))}, r"shift must have shape \(4, 5\), got \(5, 4\)"),
        ({"shift": np.zeros((4, 5))}, "shift must have a non-zero entry"),
        ({"shift": np.full((4, 5), np.nan)}, "shift must be finite, got 20 entries"),
        ({"w1": np.full((6, 5), np.inf)}, "w1 must be finite, got 30 entries"),
        ({"shift": None}, "shift or target must be given, and not both, got neither"),
        ({"target": np.ones((4, 5))}, "shift or target must be given, and not both, got both"),
        ({"w1": "weights"}, "w1 must be a matrix of real numbers, got str"),
        ({"w1": 1j * np.ones((6, 5))}, "w1 must be a matrix of real numbers, got complex ones"),
        ({"w1": np.zeros((6, 0))}, "w1 must have at least one entry"),
    ],
)
def test_bad_arrays_are_named(change, message):
    good = {"w1": np.ones((6, 5)), "w2": np.ones((4, 6)), "shift": np.ones((4, 5))}
    with pytest.raises(InputError, match=message):
        Factorization(**(good | change))


def test_spectrum_of_a_hand_made_problem():
    """Singular values can be read off diagonal weights; along e1, W1 has gain 2 and W2 gain 3."""
    problem = Factorization(w1=np.diag([2.0, 1.0]), w2=np.diag([3.0, 0.5]), shift=np.diag([4.0, 0.0]))
    spectrum = problem.spectrum()
    np.testing.assert_allclose(spectrum["sigma_shift"], [4.0])
    np.testing.assert_allclose(spectrum["sigma_pretrained"], [6.0, 0.5])
    assert spectrum["delta_w"] == pytest.approx(2 / 3)
    assert spectrum["aligned"]
    rotated = Factorization(w1=problem.w1, w2=problem.w2, shift=[[1.0, 2.0], [0.0, 0.0]])
    assert not rotated.spectrum()["aligned"]
    assert "not aligned" in str(rotated)
    assert "delta_w" in str(problem)

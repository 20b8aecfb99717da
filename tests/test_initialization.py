import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lora_flow import (
    InputError,
    SingleLayer,
    aligned_problem,
    canonical,
    digits_problem,
    gaussian_init,
    linearised_task,
    lora_one_init,
    solve,
    spectral_init,
)
from lora_flow.initialization import check_rank

KEY = jax.random.key(7)


@pytest.mark.parametrize("side", ["A", "B"])
def test_gaussian_draws_one_factor_from_the_normal_and_leaves_the_other_zero(figure1_problem, side):
    drawn = []
    for adapter in gaussian_init(KEY, figure1_problem, rank=10, alpha=1e-3, side=side):
        random, zero = (adapter.a, adapter.b) if side == "A" else (adapter.b, adapter.a)
        assert not jnp.any(zero)
        drawn.append(np.asarray(random).ravel())
    assert stats.kstest(np.concatenate(drawn) / 1e-3, "norm").pvalue > 1e-3
    assert not np.allclose(drawn[0][:50], drawn[1][:50])


@pytest.mark.parametrize("side", ["A", "B"])
def test_gaussian_draws_are_nested_in_rank_and_proportional_to_alpha(figure1_problem, side):
    small = gaussian_init(KEY, figure1_problem, rank=2, alpha=1e-5, side=side)
    large = gaussian_init(KEY, figure1_problem, rank=7, alpha=1e-3, side=side)
    for narrow, wide in zip(small, large, strict=True):
        np.testing.assert_allclose(100 * narrow.a, wide.a[:2], rtol=1e-14)
        np.testing.assert_allclose(100 * narrow.b, wide.b[:, :2], rtol=1e-14)


def test_spectral_rows_lie_along_the_shifts_right_singular_vectors():
    problem = aligned_problem(KEY, component=[0, 4], shift_scale=[5.0, 2.0])
    first, second = spectral_init(KEY, problem, rank=4, alpha=1e-2)
    _, _, vt = np.linalg.svd(problem.shift)
    overlaps = np.abs(np.asarray(first.a) @ vt.T)
    # two rows along v_1, v_5 (in the order of sigma_shift sigma_W2), the rest orthogonal to both
    assert np.all(np.sort((overlaps > 1e-8).sum(axis=1))[:2] == 1)
    np.testing.assert_allclose(overlaps[2:, :2], 0.0, atol=1e-15)
    gram = np.asarray(first.a @ first.a.T)
    np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0.0, atol=1e-17)
    assert not jnp.any(first.b)
    assert not jnp.any(second.b)


def test_under_spectral_initialisation_the_modes_never_mix():
    """Section 4: U_Y^T W2 B1 A1 V_Y and U_Y^T B2 A2 W1 V_Y stay diagonal along the flow."""
    problem = aligned_problem(KEY, component=[0, 4], shift_scale=[5.0, 2.0])
    final = solve(problem, spectral_init(KEY, problem, rank=4, alpha=1e-2), t1=2.0).adapters
    u, _, vt = np.linalg.svd(problem.w2 @ problem.w1)
    (a1, b1), (a2, b2) = final
    for term in (problem.w2 @ b1 @ a1, b2 @ a2 @ problem.w1):
        rotated = u.T @ np.asarray(term) @ vt.T
        np.testing.assert_allclose(rotated - np.diag(np.diag(rotated)), 0.0, atol=1e-13)


def test_spectral_uses_ranks_above_the_tasks(figure1_problem):
    first, _ = spectral_init(KEY, figure1_problem, rank=10, alpha=1.0)
    assert np.linalg.matrix_rank(first.a) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0, "alpha": 1.0}, "rank must lie between 1 and 10, the smallest layer dimension, got 0"),
        ({"rank": 11, "alpha": 1.0}, "rank must lie between 1 and 10, the smallest layer dimension, got 11"),
        ({"rank": 2, "alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ({"rank": 2, "alpha": -1e-3}, "alpha must be positive and finite, got -0.001"),
        ({"rank": 2, "alpha": float("inf")}, "alpha must be positive and finite, got inf"),
        ({"rank": 2, "alpha": 1.0, "side": "C"}, "side must be 'A' or 'B', got 'C'"),
    ],
)
def test_bad_arguments_are_named(figure1_problem, arguments, message):
    with pytest.raises(InputError, match=message):
        gaussian_init(KEY, figure1_problem, **arguments)


def test_spectral_needs_the_rank_of_the_shift():
    problem = aligned_problem(KEY, component=[0, 1, 2])
    with pytest.raises(InputError, match="rank must be at least 3, the rank of the shift, for spectral_init, got 2"):
        spectral_init(KEY, problem, rank=2, alpha=1e-3)
    with pytest.raises(InputError, match="rank must be at least 9"):
        spectral_init(KEY, digits_problem(), rank=8, alpha=1e-3)


def test_a_rank_is_an_integer(figure1_problem):
    with pytest.raises(InputError, match=r"rank must be an integer, got 2\.5"):
        check_rank(2.5, figure1_problem.layers)


def test_lora_one_is_a_balanced_multiple_of_the_gradients_best_approximation():
    """B A = gamma P_r(G)/S_1 and A A^T = B^T B (arXiv 2502.01235v3, section 3 and Algorithm 1)."""
    problem = digits_problem()
    for adapter, task in zip(lora_one_init(KEY, problem, rank=3, alpha=0.1), linearised_task(problem), strict=True):
        u, s, vt = np.linalg.svd(task)
        np.testing.assert_allclose(adapter.b @ adapter.a, 0.01 * (u[:, :3] * s[:3] / s[0]) @ vt[:3], atol=1e-14)
        np.testing.assert_allclose(adapter.imbalance, 0.0, atol=1e-14)


def test_lora_one_leaves_out_directions_that_the_gradient_lacks():
    shift = np.outer(np.arange(1.0, 6.0), np.arange(2.0, 9.0))
    ((a, b),) = lora_one_init(KEY, SingleLayer(shift), rank=4, alpha=1.0)
    np.testing.assert_allclose(b[:, :1] @ a[:1], shift / np.linalg.norm(shift), atol=1e-14)
    assert not jnp.any(a[1:])
    assert not jnp.any(b[:, 1:])


def test_lora_one_is_the_same_in_canonical_coordinates():
    problem = aligned_problem(KEY, component=[0, 4], shift_scale=[5.0, 2.0])
    turned = canonical(problem, rank=2)
    inner = lora_one_init(KEY, turned.problem, rank=2, alpha=0.3)
    entered, _ = turned.enter(lora_one_init(KEY, problem, rank=2, alpha=0.3))
    for one, other in zip(inner, entered, strict=True):
        np.testing.assert_allclose(np.abs(one.b @ one.a), np.abs(other.b @ other.a), atol=1e-12)


def test_a_balanced_single_layer_at_rank_one_is_logistic():
    """With balanced rank-one factors along a singular pair, p = b a obeys p' = 2 p (sigma - p): the logistic curve."""
    sigma, t1 = 1.7, 3.0
    u, v = np.eye(5)[0], np.eye(7)[2]
    problem = SingleLayer(sigma * np.outer(u, v))
    start = lora_one_init(KEY, problem, rank=1, alpha=1e-2)
    ((a, b),) = solve(problem, start, t1=t1, rtol=1e-10).adapters
    grown = 1e-4 * np.exp(2 * sigma * t1)
    np.testing.assert_allclose(b @ a, sigma * grown / (sigma - 1e-4 + grown) * np.outer(u, v), atol=1e-8)


def test_a_single_layer_with_a_scaling_is_one_with_scaled_factors():
    """B A -> s B A with the same shift is the flow of sqrt(s)-scaled factors, s times as fast."""
    shift = np.random.default_rng(0).standard_normal((4, 6))
    start = gaussian_init(KEY, SingleLayer(shift), rank=2, alpha=0.1)
    grown = tuple(adapter._replace(a=2 * adapter.a, b=2 * adapter.b) for adapter in start)
    ((a, b),) = solve(SingleLayer(shift, scaling=4.0), start, t1=0.25, rtol=1e-10).adapters
    ((a1, b1),) = solve(SingleLayer(shift), grown, t1=1.0, rtol=1e-10).adapters
    np.testing.assert_allclose(4 * b @ a, b1 @ a1, atol=1e-8)


@pytest.mark.parametrize(
    ("shift", "scaling", "message"),
    [
        (np.zeros((2, 3)), 1.0, "shift must have a non-zero entry, got nothing to learn"),
        (np.ones(3), 1.0, "shift must be a matrix, got shape"),
        (np.full((2, 2), np.nan), 1.0, "shift must be finite, got entries"),
        (np.ones((2, 2)), -1.0, "scaling must be positive, got -1.0"),
    ],
)
def test_a_bad_single_layer_is_refused(shift, scaling, message):
    with pytest.raises(InputError, match=message):
        SingleLayer(shift, scaling)

"""Canonical coordinates change nothing: the same loss, field, flow and observables, to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_flow import (
    Adapter,
    Factorization,
    InputError,
    aligned_problem,
    canonical,
    digits_problem,
    gaussian_init,
    solve,
    sweep,
)
from lora_flow.algebra.diagonal import Diagonal
from lora_flow.algebra.thin import squared_norm_of_product
from lora_flow.recipes.aligned import _gaussian_spectrum
from lora_flow.recipes.turned import misaligned, noisy

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(shape[0])


def dense_start(problem, rank, scale=0.3):
    """Adapters without a zero in them."""
    starts = [gaussian_init(jax.random.key(i), problem, rank=rank, alpha=scale, side=s) for i, s in enumerate("AB")]
    return jax.tree.map(jnp.add, *starts)


def losing():
    """Aligned but for one direction that W1 carries and W2 drops."""
    u, g, v = (np.linalg.qr(np.random.default_rng(i).standard_normal((10, 10)))[0] for i in range(3))
    s1, s2 = np.linspace(2.0, 1.0, 10), np.append(np.linspace(1.5, 0.7, 9), 0.0)
    return Factorization(g * s1 @ v.T, u * s2 @ g.T, 5 * np.outer(u[:, 0], v[:, 0]))


PROBLEMS = {
    "figure 1": lambda: aligned_problem(KEY),
    "bottom, balanced": lambda: aligned_problem(KEY, component="bottom", delta_w=1.0),
    "narrow": lambda: aligned_problem(KEY, m=12, n=7, h=5),
    "narrow and wide": lambda: aligned_problem(KEY, m=30, n=40, h=5),
    "rank 3": lambda: aligned_problem(KEY, m=40, n=30, h=100, component=[0, 2, 5], shift_scale=[5.0, 4.0, 3.0]),
    "full rank": lambda: aligned_problem(KEY, m=30, n=30, h=100, component=list(range(30))),
    "equal singular values": lambda: aligned_problem(KEY, spectrum=(2.0, 2.0)),
    "turned": lambda: misaligned(aligned_problem(KEY), KEY, angle=5.0),
    "noisy": lambda: noisy(aligned_problem(KEY), KEY, noise=0.1),
    "digits": lambda: digits_problem(),
    "random": lambda: Factorization(normal(1, 50, 50), normal(2, 50, 50), normal(3, 50, 50)),
    "thin": lambda: Factorization(normal(1, 20, 70), normal(2, 30, 20), normal(3, 30, 70)),
    "low-rank shift": lambda: Factorization(normal(1, 90, 70), normal(2, 80, 90), normal(3, 80, 2) @ normal(4, 2, 70)),
    "a gain that the product does not see": lambda: Factorization(
        np.diag(np.linspace(2.0, 1.0, 10)), np.eye(4, 10), np.pad([[5.0]], ((0, 3), (0, 9)))
    ),
    "a weight that loses a direction": lambda: losing(),
    "one weight of zero": lambda: Factorization(normal(1, 20, 30), jnp.zeros((30, 20)), normal(3, 30, 30)),
    "both weights zero": lambda: Factorization(jnp.zeros((20, 30)), jnp.zeros((30, 20)), normal(3, 30, 30)),
}


def largest_difference(got, expected):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.max(jnp.abs(g - e))) / max(1.0, float(jnp.max(jnp.abs(e)))) for g, e in pairs)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("side", ["A", "B", "both"])
@pytest.mark.long
def test_field_and_loss_are_those_of_the_plain_coordinates(name, side):
    problem = PROBLEMS[name]()
    rank = min(4, min(min(shape) for shape in problem.layers))
    start = dense_start(problem, rank)
    if side != "both":
        start = gaussian_init(KEY, problem, rank=rank, alpha=0.3, side=side)
    turned = canonical(problem, rank=rank)
    entered, bases = turned.enter(start)
    assert largest_difference(turned.leave(entered, bases), start) < 1e-13
    field = turned.leave(turned.problem.field(entered), bases)
    assert largest_difference(field, problem.field(start)) < 1e-12
    np.testing.assert_allclose(turned.problem.loss(entered), problem.loss(start), rtol=1e-12)


@pytest.mark.long
@settings(max_examples=6, deadline=None)  # each compiles
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40), st.integers(1, 3), st.integers(0, 10**6))
def test_any_shape(m, n, h, rank, seed):
    weights = normal(seed, h, n), normal(seed + 1, m, h)
    problem = Factorization(*weights, normal(seed + 2, m, n))
    rank = min(rank, m, n, h)
    start = dense_start(problem, rank)
    turned = canonical(problem, rank=rank)
    entered, bases = turned.enter(start)
    assert largest_difference(turned.leave(turned.problem.field(entered), bases), problem.field(start)) < 1e-11


@pytest.mark.parametrize("name", [pytest.param("figure 1", marks=pytest.mark.long), "random"])
def test_the_flow_ends_at_the_same_adapters(name):
    problem = PROBLEMS[name]()
    start = gaussian_init(KEY, problem, rank=4, alpha=1e-2, side="B")
    turned = canonical(problem, rank=4)
    entered, bases = turned.enter(start)
    how = {"t1": 2.0, "saves": 5, "solver": "Tsit5", "rtol": 1e-11}
    plain, other = solve(problem, start, **how), solve(turned.problem, entered, **how)
    assert largest_difference(turned.leave(other.adapters, bases), plain.adapters) < 1e-9
    for name in ("loss", "norm_z1", "norm_b2a2", "overlap_1"):
        np.testing.assert_allclose(other.observables[name], plain.observables[name], rtol=1e-8, atol=1e-14)


def test_aligned_problems_become_diagonal_and_the_hidden_space_shrinks_to_what_is_used():
    turned = canonical(aligned_problem(KEY, m=40, n=40, h=500), rank=4).problem
    assert isinstance(turned.w1, Diagonal)
    assert isinstance(turned.w2, Diagonal)
    assert turned.shift.rank == 1
    assert turned.layers == ((48, 40), (40, 48))


def test_digits_shrink_in_the_input_and_the_hidden_space():
    (h, n), (m, _) = canonical(digits_problem(), rank=4).problem.layers
    assert (m, h, n) == (10, 4 + 8, 13 + 4)


def test_the_loss_from_thin_factors_keeps_its_floor():
    """At the solution E = 0 the Gram matrices of the factors would leave 1e-15 and more; QR leaves rounding squared."""
    problem = canonical(aligned_problem(KEY, m=100, n=100, h=100), rank=1).problem
    (h, n), (m, _) = problem.layers
    b2 = jnp.zeros((m, 1)).at[0, 0].set(problem.shift.values[0] / problem.w1.values[0])
    solution = Adapter(jnp.zeros((1, n)), jnp.zeros((h, 1))), Adapter(jnp.zeros((1, h)).at[0, 0].set(1.0), b2)
    assert problem.loss(solution) < 1e-29
    disturbed = jax.tree.map(lambda leaf: leaf.at[0, -1].add(1e-11), solution)
    np.testing.assert_allclose(problem.loss(disturbed), 0.5 * np.sum(np.square(problem.residual(disturbed))), rtol=1e-3)


def test_the_loss_from_thin_factors_has_the_fields_gradient():
    problem = canonical(aligned_problem(KEY, m=40, n=40, h=40), rank=3).problem
    start = dense_start(problem, 3)
    assert largest_difference(jax.tree.map(jnp.negative, jax.grad(problem.loss)(start)), problem.field(start)) < 1e-12


@pytest.mark.long
def test_a_large_aligned_problem_is_never_written_out():
    problem = aligned_problem(KEY, m=1100, n=1100, h=2200, component="bottom")
    assert isinstance(problem.w1, Diagonal)
    spectrum = problem.spectrum()
    np.testing.assert_allclose(spectrum["sigma_pretrained"][0], 6.5, rtol=1e-9)
    np.testing.assert_allclose(spectrum["delta_w"], 1 / 1.05**2, rtol=1e-12)
    np.testing.assert_allclose(spectrum["sigma_w1"] * spectrum["sigma_w2"], 0.099, rtol=1e-9)
    dataset = sweep(problem, side="B", alpha=1e-2, rank=2, t1=0.1, saves=3, progress=False)
    assert dataset["status"].item() == 0
    written = Factorization(*(np.asarray(x) for x in (problem.w1, problem.w2, problem.shift)))
    start = gaussian_init(KEY, problem, rank=2, alpha=1e-2, side="B")
    assert largest_difference(problem.field(start), written.field(start)) < 1e-12


def test_the_spectrum_of_a_gaussian_matrix_without_the_matrix():
    """Means of 300 draws against means of 300 singular value decompositions, within five standard errors."""
    drawn = np.stack([_gaussian_spectrum(jax.random.key(seed), 12, 8) for seed in range(300)])
    rng = np.random.default_rng(0)
    expected = np.stack([np.linalg.svd(rng.standard_normal((12, 8)), compute_uv=False) for _ in range(300)])
    error = np.sqrt((drawn.var(axis=0) + expected.var(axis=0)) / 300)
    assert np.all(np.abs(drawn.mean(axis=0) - expected.mean(axis=0)) < 5 * error)


def test_a_rank_of_nothing_is_refused():
    with pytest.raises(InputError, match="rank must be at least 1, got 0"):
        canonical(aligned_problem(KEY), rank=0)


@pytest.mark.parametrize("rows", [100, 10_000])
def test_what_is_left_of_a_large_residual_is_not_lost_to_rounding(rows):
    """u v^T - (u + d w) v^T has the norm d, also where d is below rows eps."""
    d = 20 * np.finfo(float).eps
    u, w = np.linalg.qr(np.random.default_rng(0).standard_normal((rows, 2)))[0].T
    v = jnp.ones((1, 9)) / 3
    x = jnp.asarray(np.stack([u, -(u + d * w)], axis=1))
    assert float(squared_norm_of_product(x, jnp.concatenate([v, v]))) == pytest.approx(d**2, rel=0.2)


@pytest.mark.long
def test_small_parts_of_a_problem_are_kept_in_single_precision():
    """At rank 1 the loss of an aligned shift ends at half of what its other values square to."""
    values = np.append(1.0, np.full(99, 5e-6))
    with jax.enable_x64(False):
        problem = Factorization(np.eye(100) * 2, np.eye(100), np.diag(values))
        dataset = sweep(problem, side="B", alpha=1e-2, rank=1, seeds=1, t1=20.0, saves=3, rtol=1e-3, progress=False)
    assert float(dataset["loss"].isel(time=-1).squeeze()) == pytest.approx(0.5 * 99 * 25e-12, rel=0.02)

"""Norms, frames and singular vectors against LAPACK, at every scale; diagonals that are not written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_flow import (
    Factorization,
    InputError,
)
from lora_flow.algebra.diagonal import Diagonal
from lora_flow.algebra.spectra import frobenius_norm, norm, norm_on_host, top_pair
from lora_flow.algebra.thin import column_norms, gram_schmidt, squared_norm_of_product
from lora_flow.solvers.control import _first_step


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(shape[0])


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10**6), st.integers(0, 3))
def test_gram_schmidt_is_a_qr_factorisation(columns, seed, copies):
    x = np.random.default_rng(seed).standard_normal((20, columns))
    x[:, :copies] = x[:, -1:]  # dependent ones
    q, r = gram_schmidt(jnp.asarray(x))
    np.testing.assert_allclose(q @ r, x, atol=1e-13)
    np.testing.assert_allclose(jnp.tril(r, -1), 0.0, atol=0)
    gram = np.asarray(q.T @ q)
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-13)
    assert set(np.round(np.diag(gram), 12)) <= {0.0, 1.0}


def test_squared_norm_of_a_product_that_cancels():
    x, y = normal(1, 30, 2), normal(2, 2, 40)
    twice = squared_norm_of_product(jnp.concatenate([x, -x * (1 + 1e-12)], axis=1), jnp.concatenate([y, y]))
    np.testing.assert_allclose(twice, 1e-24 * jnp.sum((x @ y) ** 2), rtol=1e-2)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (1, 5)])
def test_top_pairs_of_many_matrices_are_those_of_lapack(shape):
    drawn = 1e-3 * np.random.default_rng(0).standard_normal((20, *shape))
    left, right = jax.vmap(top_pair)(jnp.asarray(drawn))
    u, _, vt = np.linalg.svd(drawn)
    for found, expected in ((left, u[:, :, 0]), (right, vt[:, 0])):
        cosines = np.abs(np.sum(np.asarray(found) * expected, axis=-1))
        np.testing.assert_allclose(cosines, 1, rtol=1e-12)
    np.testing.assert_allclose(np.einsum("ki,kij,kj->k", left, drawn, right), np.linalg.norm(drawn, 2, axis=(1, 2)))


def test_the_top_pair_of_nothing_is_a_pair_of_unit_vectors():
    for nothing in (jnp.zeros((3, 4)), Diagonal(jnp.zeros(2), (3, 4)), Diagonal(jnp.zeros(0), (3, 4))):
        for vector in top_pair(nothing):
            assert float(jnp.linalg.norm(vector)) == 1.0


def test_the_top_pair_of_a_diagonal_has_its_sign():
    left, right = top_pair(Diagonal(jnp.array([1.0, -3.0]), (3, 4)))
    np.testing.assert_array_equal(left, [0, -1, 0])
    np.testing.assert_array_equal(right, [0, 1, 0, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Diagonal(jnp.ones(4), (3, 5)), "values must be a vector of at most 3 entries, got"),
        (lambda: Diagonal(jnp.ones(2), (3, 5)) @ jnp.ones((4, 2)), "a factor must have 5 rows, got shape"),
        (lambda: Diagonal(jnp.ones(2), (3, 5)) @ jnp.ones(5), "a factor must have 5 rows, got shape"),
        (lambda: jnp.ones((2, 5)) @ Diagonal(jnp.ones(2), (3, 5)), "a factor must have 3 columns, got shape"),
        (
            lambda: Factorization(Diagonal(jnp.array([1.0, jnp.nan]), (3, 3)), np.eye(3), np.eye(3)),
            "w1 must be finite, got 1 entries",
        ),
    ],
)
def test_diagonals_that_do_not_fit_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_norms_of_any_scale(scale):
    x = np.random.default_rng(0).normal(size=(3, 4))
    assert norm(scale * x) == pytest.approx(scale * np.linalg.norm(x), rel=1e-14)
    for along in (norm, norm_on_host):
        np.testing.assert_allclose(along(scale * x, axis=0), scale * np.linalg.norm(x, axis=0), rtol=1e-14)
    assert frobenius_norm(scale * x) == pytest.approx(scale * np.linalg.norm(x), rel=1e-14)
    np.testing.assert_allclose(column_norms(scale * x), scale * np.linalg.norm(x, axis=0), rtol=1e-14)
    np.testing.assert_allclose(jax.grad(norm)(scale * x), x / np.linalg.norm(x), rtol=1e-14)
    assert _first_step({"x": scale * x}, {"x": 2 * scale * x}) == pytest.approx(0.005, rel=1e-14)


def test_norms_of_what_has_none():
    assert norm(jnp.zeros(3)) == norm_on_host(np.zeros(3)) == frobenius_norm(Diagonal(np.zeros(0), (2, 3))) == 0
    assert norm_on_host(np.array([1.0, np.inf])) == np.inf
    assert np.isnan(norm_on_host(np.array([np.nan, np.inf])))
    np.testing.assert_array_equal(jax.grad(norm)(jnp.zeros(3)), np.zeros(3))
    assert norm(jnp.array([1.0, jnp.inf])) == jnp.inf
    assert jnp.isnan(norm(jnp.array([jnp.nan, 1.0])))
    assert jnp.isnan(norm(jnp.array([jnp.nan, jnp.inf])))

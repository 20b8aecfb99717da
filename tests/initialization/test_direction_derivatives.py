"""Derivatives of singular directions, and of the starts and recipes that are made of them, against differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_flow import InputError, aligned_problem, misaligned, noisy, regression_problem
from lora_flow.initialization import initialize
from lora_flow.initialization.directions import triplets

STEP = 1e-6


def difference(function, at, step=STEP):
    return jax.tree.map(lambda high, low: (high - low) / (2 * step), function(at + step), function(at - step))


def assert_close(found, expected, within=1e-7):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=within * max(1.0, np.abs(other).max()))


def tangent(function, at):
    return jax.jvp(function, (jnp.asarray(at),), (jnp.ones(()),))[1]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(6, 6), (5, 8), (8, 5)]), st.booleans())
def test_vectors_of_simple_values_move_as_their_matrix_does(seed, shape, smallest):
    matrix, change = np.random.default_rng(seed).standard_normal((2, *shape))
    values = np.linalg.svd(matrix, compute_uv=False)
    if np.min(-np.diff(values)) < 0.05 or values[-1] < 0.05:
        return
    found = tangent(lambda t: triplets(jnp.asarray(matrix + t * change), 3, smallest), 0.0)
    assert_close(found, difference(lambda t: triplets(jnp.asarray(matrix + t * change), 3, smallest), 0.0), 1e-6)


def test_vectors_of_equal_values_move_with_their_space_and_no_further():
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((6, 6)))[0] for _ in range(2))
    matrix, change = left @ np.diag([2, 2, 1, 0.5, 0, 0]) @ right.T, rng.standard_normal((6, 6))
    (u, _, vt), (du, ds, dvt) = jax.jvp(lambda t: triplets(matrix + t * change, 6), (0.0,), (1.0,))
    assert np.isfinite(du).all()
    assert np.isfinite(dvt).all()
    np.testing.assert_allclose(u[:, :2].T @ du[:, :2], 0, atol=1e-12)
    np.testing.assert_array_equal(du[:, 4:], 0)
    np.testing.assert_array_equal(ds[4:], 0)

    def spaces(t):
        w, _, zt = np.linalg.svd(matrix + t * change)
        return w[:, :2] @ w[:, :2].T, zt[:2].T @ zt[:2]

    moved = du[:, :2] @ u[:, :2].T, dvt[:2].T @ vt[:2]
    assert_close([one + one.T for one in moved], list(difference(spaces, 0.0)), 1e-6)


@pytest.mark.parametrize("init", ["spectral", "lora-one", "lora-one-theory", "pissa", "gora"])
@pytest.mark.parametrize("parameter", ["delta_w", "angle", "noise", "alpha"])
def test_a_start_follows_the_parameters_of_its_problem(init, parameter):
    key, at = jax.random.key(1), {"delta_w": 0.8, "angle": 20.0, "noise": 0.1, "alpha": 1e-2}

    def start(value):
        now = at | {parameter: value}
        made = aligned_problem(key, m=6, n=5, h=7, delta_w=now["delta_w"], shift_scale=(3.0, 2.0), component=(0, 2))
        made = noisy(misaligned(made, jax.random.key(2), angle=now["angle"]), jax.random.key(3), noise=now["noise"])
        rank = 5 if init == "spectral" else 2
        return initialize(init, jax.random.key(4), made, rank=rank, alpha=now["alpha"], side="A")

    found = tangent(start, at[parameter])
    assert_close(found, difference(start, at[parameter]), 1e-5)
    moves = any(np.any(leaf != 0) for leaf in jax.tree.leaves(found))
    assert moves == ((init, parameter) != ("pissa", "angle"))  # PiSSA starts from the weights, not from the shift


@pytest.mark.parametrize(("parameter", "value"), [("kappa", 3.0), ("angle", 30.0)])
@pytest.mark.parametrize("samples", [0, 12])
def test_a_regression_follows_its_condition_number_and_its_angle(parameter, value, samples):
    def shift(value):
        more = {"target_rank": 2, "kappa": 2.0, "samples": samples} | {parameter: value}
        return regression_problem(jax.random.key(0), m=5, n=6, **more).shift

    assert_close(tangent(shift, value), difference(shift, value), 1e-8)


def test_a_shift_follows_its_size_and_one_that_is_traced_is_not_turned():
    def problem(size):
        return aligned_problem(jax.random.key(0), m=4, n=5, h=6, shift_scale=size)

    assert_close(tangent(lambda size: problem(size).shift, 3.0), problem(1.0).shift, 1e-12)
    with pytest.raises(InputError, match="problem must have a shift that is known, to be turned"):
        tangent(lambda size: misaligned(problem(size), jax.random.key(1), angle=10.0).shift, 3.0)

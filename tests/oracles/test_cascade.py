"""The cascade of the symmetric factorisation against its Riccati equation, and Oja's flow against its definition."""

import jax
import numpy as np
import pytest
from scipy.linalg import expm

from lora_flow import InputError, oracles

RNG = np.random.default_rng(0)
BASIS = np.linalg.qr(RNG.normal(size=(5, 5)))[0]
TIMES = np.array([0.0, 0.5, 2.0, 50.0])


def symmetric(*values):
    return BASIS * np.array(values) @ BASIS.T


@pytest.mark.parametrize("values", [(2, 1, 0, 0, 0), (2, 2, 0, -0.3, -1), (1, 0.5, -0.1, -0.2, -0.3)])
@pytest.mark.parametrize("rank", [2, 6])
def test_the_stages_together_are_the_solution(values, rank):
    target, u = symmetric(*values), 0.7 * RNG.normal(size=(5, rank))
    got = oracles.cascade(target, u, TIMES)
    np.testing.assert_allclose(got.gram, oracles.symmetric(target, u, TIMES), rtol=0, atol=2e-13)
    if rank == 2:
        assert np.abs(got.noise).max() < 1e-25
    parts = got.basis.T @ u @ u.T @ got.basis
    np.testing.assert_allclose(got.tilt[0], parts[2:, :2] @ np.linalg.inv(parts[:2, :2]), atol=1e-12)
    alone = oracles.schur_complement(got.noise[0], -np.array(values[2:]), TIMES)
    np.testing.assert_allclose(got.noise, alone, atol=1e-14)


def test_late_noise_forgets_the_start_and_the_tilt_decays():
    got = oracles.cascade(symmetric(2, 1, 0, 0, 0), RNG.normal(size=(5, 4)), np.array([0.0, 10.0, 1e6]))
    assert 1e6 * np.linalg.norm(got.noise[-1], 2) == pytest.approx(0.5, rel=1e-4)
    tilts = np.linalg.norm(got.tilt, 2, axis=(-2, -1))
    assert tilts[1] <= tilts[0] * np.exp(-10.0)
    np.testing.assert_allclose(got.signal[-1], np.diag([0.5, 1.0]), atol=1e-12)


def test_derivatives_of_the_cascade():
    def value(u):
        return oracles.cascade(symmetric(2, 1, 0, 0, -1), u, 0.7).gram[0, 1]

    u, direction = RNG.normal(size=(5, 3)), RNG.normal(size=(5, 3))
    difference = (value(u + 1e-6 * direction) - value(u - 1e-6 * direction)) / 2e-6
    assert np.sum(np.asarray(jax.grad(value)(u)) * direction) == pytest.approx(float(difference), rel=1e-6)


Y = np.linalg.qr(RNG.normal(size=(6, 3)))[0] * np.array([1.0, 1.0, 0.4]) @ np.linalg.qr(RNG.normal(size=(8, 3)))[0].T
ROWS = np.linalg.qr(RNG.normal(size=(8, 8)))[0]


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_a_large_start_turns_its_rows_by_a_matrix_exponential(rank):
    got = oracles.large_start(Y, ROWS[:rank], 3.0, 9 * np.array([0.0, 1.0, 6.0]))
    for time, loss in zip((0.0, 1.0, 6.0), got, strict=True):
        columns, _ = np.linalg.qr((ROWS[:rank] @ expm(Y.T @ Y * time)).T)
        expected = np.sum((Y - Y @ columns @ columns.T) ** 2) / 2
        assert float(loss) == pytest.approx(expected, rel=1e-9, abs=1e-27)


def test_a_large_start_at_late_times_and_of_t_over_a_squared_alone():
    times = np.array([[30.0, 60.0], [80.0, 90.0]])
    one, other = (oracles.large_start(Y, ROWS[:4], a, a**2 * times) for a in (1.0, 7.0))
    np.testing.assert_allclose(one, other, rtol=1e-7)
    assert np.log(one[1, 0] / one[1, 1]) / 10 == pytest.approx(2 * 0.4**2, rel=1e-3), "the slowest mode's rate"
    few, many = (oracles.large_start(Y, ROWS[:4], 1.0, 30.0, steps=n) for n in (8, 64))
    assert float(few) == pytest.approx(float(many), rel=1e-10)


def test_derivatives_of_a_large_start_with_repeated_singular_values():
    def loss(shift):
        return oracles.large_start(shift, ROWS[:4], 3.0, 9.0, steps=4)

    direction = RNG.normal(size=Y.shape)
    difference = (loss(Y + 1e-5 * direction) - loss(Y - 1e-5 * direction)) / 2e-5
    assert np.sum(np.asarray(jax.grad(loss)(Y)) * direction) == pytest.approx(float(difference), rel=1e-7)
    assert float(jax.jvp(loss, (Y,), (direction,))[1]) == pytest.approx(float(difference), rel=1e-7)


def test_a_large_start_is_nan_where_traced_sub_steps_are_too_few():
    times = np.array([0.0, 15.0, 17.0])
    got = jax.jit(lambda t: oracles.large_start(Y, ROWS[:4], 1.0, t, steps=4))(times)
    np.testing.assert_array_equal(np.isnan(got), [False, False, True])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: oracles.cascade(np.eye(2, k=1), np.eye(2), 1.0), "target must be symmetric"),
        (lambda: oracles.cascade(-np.eye(2), np.eye(2), 1.0), "target must have a positive eigenvalue, got"),
        (lambda: oracles.cascade(np.eye(2), np.ones((2, 2)), 1.0), "u must reach the 2 eigenvectors of positive"),
        (lambda: oracles.cascade(np.eye(2), np.eye(2), -1.0), "t must be finite and at least 0, got -1"),
        (
            lambda: jax.vmap(lambda u: oracles.cascade(np.eye(2), u, np.inf))(np.ones((1, 2, 2))),
            "t must be finite and at least 0, got inf",
        ),
        (lambda: jax.jit(oracles.cascade)(np.eye(2), np.eye(2), 1.0), "target must be known, got one that JAX traces"),
        (lambda: oracles.large_start(Y, 2 * ROWS, 1.0, 1.0), "rows must be orthonormal"),
        (lambda: oracles.large_start(Y, ROWS[:, :4], 1.0, 1.0), "rows must have 8 columns"),
        (lambda: oracles.large_start(Y, ROWS, -1.0, 1.0), "a must be positive, got -1.0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()

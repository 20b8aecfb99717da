"""Starts that do nothing at protected inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import Adapter, Factorization, InputError, SingleLayer, gaussian_init, keep_away, orthogonal_init, sweep

KEY, M, N, RANK = jax.random.key(0), 5, 8, 4
PROBLEM = SingleLayer(np.random.default_rng(0).normal(size=(M, N)))
COLUMNS = np.random.default_rng(1).normal(size=(N, 3))  # no orthonormal ones
BASIS = np.linalg.qr(COLUMNS)[0]


@pytest.mark.parametrize("init", [gaussian_init, orthogonal_init])
def test_a_is_the_draw_without_its_part_at_protected_inputs(init):
    ((a, b),) = init(KEY, PROBLEM, rank=RANK, alpha=0.5)
    ((away, same),) = init(KEY, PROBLEM, rank=RANK, alpha=0.5, away_from=COLUMNS)
    np.testing.assert_allclose(away, a @ (np.eye(N) - BASIS @ BASIS.T), atol=1e-14)
    assert np.abs(away @ COLUMNS).max() < 1e-14
    assert np.abs(a @ COLUMNS).max() > 0.01
    np.testing.assert_array_equal(same, b)
    ((kept, _),) = keep_away(init(KEY, PROBLEM, rank=RANK, alpha=0.5), COLUMNS)
    np.testing.assert_allclose(kept, away, atol=1e-15)


def test_lanes_stay_in_front():
    ((a, b),) = gaussian_init(KEY, PROBLEM, rank=RANK, alpha=0.5)
    ((away, _),) = keep_away((Adapter(jnp.stack([a, 2 * a]), jnp.stack([b, b])),), COLUMNS)
    assert away.shape == (2, RANK, N)
    assert np.abs(away @ COLUMNS).max() < 1e-14


def test_a_sweep_takes_them():
    away = functools.partial(gaussian_init, away_from=COLUMNS)
    swept = sweep(PROBLEM, init=("gaussian", away), alpha=0.1, rank=2, t1=1.0, saves=3, progress=False)
    assert swept["init"].values.tolist() == ["gaussian", "gaussian_init"]
    assert float(swept["loss"].isel(init=1, time=-1).squeeze()) != float(swept["loss"].isel(init=0, time=-1).squeeze())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keep_away(gaussian_init(KEY, PROBLEM, rank=2, alpha=1.0), COLUMNS[1:]), "basis must have 8 rows"),
        (
            lambda: keep_away(gaussian_init(KEY, PROBLEM, rank=2, alpha=1.0), np.ones((N, 2))),
            "basis must have linearly",
        ),
        (lambda: gaussian_init(KEY, PROBLEM, rank=2, alpha=1.0, away_from=COLUMNS[1:]), "away_from must have 8 rows"),
        (
            lambda: gaussian_init(
                KEY,
                Factorization(w1=COLUMNS.T, w2=BASIS, shift=BASIS @ COLUMNS.T),
                rank=2,
                alpha=1.0,
                away_from=COLUMNS,
            ),
            "away_from must be left out for several layers, got a basis for 2 layers",
        ),
    ],
)
def test_bad_ones_get_one_line(make, message):
    with pytest.raises(InputError, match=f"^{message}"):
        make()

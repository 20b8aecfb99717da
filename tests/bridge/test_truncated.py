"""The leading triplets of a matrix against LAPACK's, and the residual that tells when they are not."""

import numpy as np
import pytest

from lora_flow.algebra.low_rank import LowRank
from lora_flow.bridge.truncated import krylov, lanczos, residual, truncated_svd, whole


def matrix(kind, shape=(300, 240)):
    rng = np.random.default_rng(0)
    if kind == "flat":
        return rng.standard_normal(shape)
    u, v = (np.linalg.qr(rng.standard_normal((size, min(shape))))[0] for size in shape)
    s = {"slow": np.arange(1, min(shape) + 1) ** -0.5, "low rank": np.arange(min(shape)) < 3}[kind]
    return (u * s) @ v.T


def sine(found, exact):
    """Of the largest angle between the right subspaces."""
    x, y = np.asarray(found.vt), np.asarray(exact.vt)
    return np.linalg.norm(x - (x @ y.T) @ y, 2)


@pytest.mark.parametrize("way", [lanczos, krylov])
@pytest.mark.parametrize("kind", ["slow", "flat"])
def test_both_ways_find_the_leading_triplets(way, kind):
    m = matrix(kind)
    for one in (m, m.T):
        found, exact = way(one, 6), whole(one, 6)
        assert sine(found, exact) < 1e-6
        np.testing.assert_allclose(found.s, exact.s, rtol=1e-8)
        assert residual(one, found) < 1e-6


def test_a_matrix_of_lower_rank_has_no_directions_beyond_it():
    found = truncated_svd(matrix("low rank"), 6)
    np.testing.assert_allclose(found.triplets.s, [1, 1, 1, 0, 0, 0], atol=1e-12)
    assert found.residual < 1e-10
    assert found.held(3) == pytest.approx(1)


def test_the_residual_tells_of_a_direction_that_is_not_the_matrix_s():
    m = matrix("flat")
    rng = np.random.default_rng(1)
    sketch = np.linalg.qr(m @ (m.T @ (m @ rng.standard_normal((240, 16)))))[0]  # two power steps, as others take
    u, s, vt = np.linalg.svd(sketch.T @ m, full_matrices=False)
    randomised = LowRank(sketch @ u[:, :6], s[:6], vt[:6])
    assert sine(randomised, whole(m, 6)) > 0.5
    assert residual(m, randomised) > 0.05


def test_the_smallest_triplets_are_lapack_s_and_shares_are_those_of_the_squared_norm():
    m = matrix("slow", (60, 50))
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    found = truncated_svd(m, 4, smallest=True)
    np.testing.assert_allclose(found.triplets.s, s[-4:], rtol=1e-10)
    np.testing.assert_allclose(np.asarray(found.triplets), (u[:, -4:] * s[-4:]) @ vt[-4:], atol=1e-12)
    assert truncated_svd(m, 4).held(2) == pytest.approx(np.sum(s[:2] ** 2) / np.sum(s**2))
    assert truncated_svd(np.zeros((5, 4)), 2).held(2) == 0

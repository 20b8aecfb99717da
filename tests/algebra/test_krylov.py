"""A linear flow in the space that a start sees of a matrix is the flow itself, by the whole decomposition."""

import numpy as np
import pytest

from lora_flow.algebra.krylov import seen_from
from lora_flow.theory.lora_one import linear_phase


@pytest.mark.parametrize("begin", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(300, 260), (260, 400), (12, 90), (90, 12), (20, 20)])
@pytest.mark.parametrize("growth", [0.1, 6.0, 40.0])
def test_what_the_start_sees_is_enough_for_the_flow(shape, begin, growth):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, min(shape))))[0] for n in shape)
    matrix = (u * np.arange(1, min(shape) + 1) ** -0.5) @ v.T
    a, b = rng.standard_normal((3, shape[1])), begin * rng.standard_normal((shape[0], 3))
    seen = seen_from(matrix, b, a.T, growth)
    times = growth * np.array([0.0, 0.3, 1.0])
    whole = linear_phase(matrix, a, times, b)
    small = linear_phase(seen.matrix, a @ seen.right, times, seen.left.T @ b)
    found = small[0] @ seen.right.T, seen.left @ small[1]
    for one, other in zip(found, whole, strict=True):
        size = np.linalg.norm(np.concatenate([whole[0].swapaxes(1, 2), whole[1]], axis=1), axis=(1, 2))
        assert (np.linalg.norm(one - other, axis=(1, 2)) <= 1e-11 * size).all()
    assert min(shape) < 100 or seen.matrix.shape[1] < min(shape) or growth > 6


@pytest.mark.parametrize("values", [[1.0], np.arange(1.0, 9.0), 2.0 ** -np.arange(300), np.eye(1, 300)[0] + 1e-9])
@pytest.mark.parametrize("begin", [0.0, 1.0])
def test_a_matrix_of_low_rank_is_seen_as_well(values, begin):
    """Thin factors of a gradient: the powers of the matrix soon reach nothing new but rounding."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((400, len(values))))[0] for _ in range(2))
    matrix = u * (values / np.max(values)) @ v.T
    a, b = rng.standard_normal((1, 400)), begin * rng.standard_normal((400, 1))
    seen = seen_from(matrix, b, a.T, 6.0)
    np.testing.assert_allclose(seen.right.T @ seen.right, np.eye(seen.right.shape[1]), atol=1e-13)
    whole, small = (
        linear_phase(m, one, np.array([2.0, 6.0]), other)
        for m, one, other in ((matrix, a, b), (seen.matrix, a @ seen.right, seen.left.T @ b))
    )
    size = np.linalg.norm(whole[1], axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(seen.left @ small[1] / size, whole[1] / size, atol=1e-11)

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

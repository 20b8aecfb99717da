"""The product with an inverse Gram matrix, which preconditioned flows are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import RANK, M, N, few, random
from hypothesis import given
from hypothesis import strategies as st

from lora_flow.dynamics import flows

over_gram = jax.jit(flows.over_gram)


class TestOverGram:
    """(x^T x + damping I)^{-1} y."""

    @few
    @given(seed=st.integers(0, 10**6), damping=st.sampled_from([0.0, 1e-6, 0.3, 1e4]))
    def test_is_the_solution(self, seed, damping):
        x, y = random(seed, M, RANK), random(seed + 1, RANK, N)
        gram = x.T @ x + damping * np.eye(RANK)
        expected = np.linalg.solve(gram, y)
        got = over_gram(x, y, damping)
        np.testing.assert_allclose(got, expected, atol=1e-14 * np.linalg.cond(gram) * np.abs(expected).max())

    def test_keeps_digits_that_the_gram_matrix_loses(self):
        """Columns that nearly agree, with cond(x) = 1e7: x^T x is known to 1e-2 then, and x^+ to 1e-9."""
        u, v = np.linalg.qr(random(8, M, RANK))[0], np.linalg.qr(random(9, RANK, RANK))[0]
        x, y = u * [1.0, 1e-3, 1e-7] @ v, random(10, M, N)
        expected = np.linalg.pinv(x) @ y
        errors = [
            np.linalg.norm(x @ (z - expected)) for z in (over_gram(x, x.T @ y, 0.0), np.linalg.solve(x.T @ x, x.T @ y))
        ]
        assert errors[0] < 1e-2 * errors[1]

    def test_directions_that_padding_makes_stay_zero(self):
        x, y = random(11, M, RANK), random(12, RANK, N)
        padded = over_gram(np.pad(x, [(0, 0), (0, 2)]), np.pad(y, [(0, 2), (0, 0)]), 0.0)
        np.testing.assert_allclose(padded[:RANK], over_gram(x, y, 0.0), rtol=1e-12)
        assert not padded[RANK:].any()

    @pytest.mark.parametrize("damping", [0.0, 0.3])
    def test_derivatives(self, damping):
        """Against central differences of NumPy's solution, which takes a damping below 0 as well; both modes."""
        x, y, target = random(13, M, RANK), random(14, RANK, N), random(15, RANK, N)
        steps = random(16, M, RANK), random(17, RANK, N), 0.7

        def oracle(epsilon):
            x1, y1, d1 = (v + epsilon * dv for v, dv in zip((x, y, damping), steps, strict=True))
            return np.linalg.solve(x1.T @ x1 + d1 * np.eye(RANK), y1)

        difference = (oracle(1e-5) - oracle(-1e-5)) / 2e-5
        values, tangents = jax.tree.map(jnp.asarray, ((x, y, damping), steps))
        _, forward = jax.jvp(over_gram, values, tangents)
        np.testing.assert_allclose(forward, difference, rtol=1e-7, atol=1e-8)
        gradients = jax.grad(lambda *args: jnp.sum(target * over_gram(*args)), argnums=(0, 1, 2))(*values)
        reverse = sum(np.sum(g * t) for g, t in zip(gradients, tangents, strict=True))
        np.testing.assert_allclose(reverse, np.sum(target * difference), rtol=1e-8)

"""Spectra that can be differentiated, computed one matrix at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow.algebra import spectra


@pytest.mark.parametrize("rows", [3, 30])
def test_spectra_have_the_derivatives_of_the_eigenvalues(rows):
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.standard_normal((rows, 4))), jnp.asarray(rng.standard_normal((rows, 5)))
    dx, dy = (jnp.asarray(rng.standard_normal(matrix.shape)) for matrix in (x, y))
    k = min(rows, 9)

    def kept(x, y):
        values = jnp.linalg.eigvalsh(x @ x.T - y @ y.T)[::-1]
        return jnp.concatenate([values[:4], values[-5:]]) if rows > k else values

    for ours, reference, at, along in (
        (spectra.spectrum, lambda x: jnp.linalg.svd(x, compute_uv=False), (x,), (dx,)),
        (spectra.difference_spectrum, kept, (x, y), (dx, dy)),
    ):
        np.testing.assert_allclose(ours(*at), reference(*at), atol=1e-12)
        slopes = [jax.jvp(function, at, along)[1] for function in (ours, reference)]
        np.testing.assert_allclose(*slopes, atol=1e-11)
        slopes = [jax.grad(lambda *z, f=function: jnp.sum(f(*z) ** 3))(*at) for function in (ours, reference)]
        np.testing.assert_allclose(*slopes, rtol=1e-9, atol=1e-9)


def test_no_more_than_one_matrix_is_given_to_lapack_at_a_time():
    """Batches of them, inside a compiled program on CPU, can wait for each other for ever."""
    x = jnp.zeros((7, 4, 3))
    for function, batch in ((spectra.spectrum, (x,)), (spectra.difference_spectrum, (x, x))):
        program = jax.jit(jax.vmap(function)).lower(*batch).as_text()
        calls = [line for line in program.splitlines() if "custom_call @lapack" in line]
        assert calls
        assert not any("7x" in line for line in calls)

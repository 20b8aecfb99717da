"""Starts of a fixed norm, and the rules that have spectral starts and LoRA-One's among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_flow import InputError, SingleLayer
from lora_flow.adapter import Adapter
from lora_flow.design.parametrisations import PARAMETRISATIONS, as_parametrisation
from lora_flow.initialization import lora_one_init
from lora_flow.initialization.of_norm import along_gradient, on_sphere, total_norm

KEY = jax.random.key(0)
LAYER = SingleLayer(np.random.default_rng(0).standard_normal((4, 2)) @ np.random.default_rng(1).standard_normal((2, 5)))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31 - 1), st.floats(1e-6, 1e3))
def test_adapters_of_any_size_come_to_the_sphere(seed, radius):
    keys = jax.random.split(jax.random.key(seed), 4)
    pairs = (keys[:2], keys[2:])
    drawn = tuple(Adapter(jax.random.normal(one, (2, 3)), jax.random.normal(two, (4, 2))) for one, two in pairs)
    found = on_sphere(drawn, radius)
    np.testing.assert_allclose(total_norm(found), radius, rtol=1e-12)
    np.testing.assert_allclose(found[1].b / found[0].a[0, 0], drawn[1].b / drawn[0].a[0, 0], rtol=1e-10)


def test_a_quarter_turn_and_half_a_power_are_lora_one():
    found = along_gradient(LAYER, 2, jnp.pi / 4, 0.5, jnp.zeros(1))
    expected = lora_one_init(KEY, LAYER, rank=2, alpha=1.0)
    for one, other in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(np.sqrt(2) * one, other, atol=1e-12)


def test_directions_beyond_the_gradients_rank_stay_zero_at_every_power():
    for power in (0.0, 0.5, 2.0):
        (found,) = along_gradient(LAYER, 4, 0.3, power, jnp.zeros(1))
        assert not np.any(found.a[2:])
        assert not np.any(found.b[:, 2:])
        slope = jax.grad(lambda power: jnp.sum(along_gradient(LAYER, 4, 0.3, power, jnp.zeros(1))[0].a))(power)
        assert np.isfinite(slope)


def test_frames_are_orthonormal():
    frames = PARAMETRISATIONS["frames"]
    (found,) = frames.adapters(frames.first(KEY, LAYER, 3), LAYER, 3)
    np.testing.assert_allclose(found.a @ found.a.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(found.b.T @ found.b, np.eye(3), atol=1e-12)


def test_an_unknown_one_is_refused_with_the_nearest_suggested():
    with pytest.raises(InputError, match=r"parameters must be .*, got 'adapter' \(did you mean 'adapters'\?\)"):
        as_parametrisation("adapter")
    with pytest.raises(InputError, match="parameters must be a name or a Parametrisation, got 3"):
        as_parametrisation(3)

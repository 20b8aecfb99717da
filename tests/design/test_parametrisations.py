import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_flow.adapter import Adapter
from lora_flow.design.parametrisations import on_sphere, total_norm


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31 - 1), st.floats(1e-6, 1e3))
def test_adapters_of_any_size_come_to_the_sphere(seed, radius):
    keys = jax.random.split(jax.random.key(seed), 4)
    given_ = tuple(
        Adapter(jax.random.normal(one, (2, 3)), jax.random.normal(two, (4, 2))) for one, two in (keys[:2], keys[2:])
    )
    found = on_sphere(given_, radius)
    np.testing.assert_allclose(total_norm(found), radius, rtol=1e-12)
    np.testing.assert_allclose(found[1].b / found[0].a[0, 0], given_[1].b / given_[0].a[0, 0], rtol=1e-10)

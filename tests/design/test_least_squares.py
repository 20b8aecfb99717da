"""The Jacobian by the few directions that it needs is that by all."""

import jax
import jax.numpy as jnp
import numpy as np

from lora_flow import aligned_problem
from lora_flow.coordinates.base import Coordinates
from lora_flow.design.draws import along_task
from lora_flow.design.least_squares import Data, Model
from lora_flow.dynamics.flows import as_flow
from lora_flow.initialization import as_scheme


def test_a_size_moves_its_own_curve_alone():
    problem = along_task(aligned_problem(jax.random.key(0), m=3, n=3, h=4))
    values = {"alpha": jnp.asarray(1e-2), "rate": jnp.asarray(1.0)}
    how = as_scheme("gaussian"), "A", 2, None, as_flow("plain"), "Tsit5", 1e-4
    model = Model(problem, Coordinates(problem, 1), {}, values, ("alpha", "rate"), *how)
    clock, whiten = jnp.linspace(0.0, 0.5, 6), jax.random.normal(jax.random.key(1), (3, 6, 6))
    point = jnp.log(jnp.array([1e-2, 1.1, 0.01, 0.02, 0.03, 0.01, 0.02, 0.02]))
    data = Data(clock, jnp.zeros((3, 6)), jnp.zeros((3, 6)), whiten, jnp.zeros(8))
    jacobian, value = data.linearised(model, point)
    np.testing.assert_allclose(value, data.residuals(model, point), rtol=1e-12)
    expected = jax.jacfwd(lambda point: data.residuals(model, point))(point)
    np.testing.assert_allclose(jacobian, expected, rtol=1e-9, atol=1e-9 * abs(expected).max())
    assert np.all(jacobian[:6, 4:] == 0)

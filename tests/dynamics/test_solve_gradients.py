"""Gradients through a solve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solves import random

from lora_flow import Factorization, aligned_problem, gaussian_init, solve


class TestGradients:
    """Reverse mode against central differences of the solution itself."""

    problem = aligned_problem(jax.random.key(1), m=4, n=3, h=5, delta_w=0.5, component=[0, 1], shift_scale=[3.0, 2.0])
    start = gaussian_init(jax.random.key(2), problem, rank=2, alpha=0.3, side="B")

    def log_loss(self, w1, w2, shift, adapters, derivatives="reverse"):
        problem = Factorization(w1=w1, w2=w2, shift=shift)
        run = solve(problem, adapters, t1=1.0, saves=3, rtol=1e-9, derivatives=derivatives)
        return jnp.log(run.observables["loss"][-1])

    @pytest.mark.long
    def test_with_respect_to_weights_shift_and_adapters(self):
        values = [self.problem.w1, self.problem.w2, self.problem.shift, self.start]
        gradients = jax.grad(self.log_loss, argnums=(0, 1, 2, 3))(*values)
        for index, gradient in enumerate(gradients):
            direction = jax.tree.map(lambda leaf: random(3, *leaf.shape), values[index])

            def along(epsilon, index=index, direction=direction):
                moved = jax.tree.map(lambda leaf, step: leaf + epsilon * step, values[index], direction)
                return self.log_loss(*values[:index], moved, *values[index + 1 :])

            difference = (along(1e-4) - along(-1e-4)) / 2e-4
            pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
            np.testing.assert_allclose(sum(jnp.sum(g * d) for g, d in pairs), difference, rtol=1e-5)

    @pytest.mark.long
    def test_both_modes_are_one_choice(self):
        def final_loss(adapters, derivatives):
            run = solve(self.problem, adapters, t1=1.0, saves=3, derivatives=derivatives, max_steps=100)
            return run.observables["loss"][-1]

        expected, got = (jax.grad(final_loss)(self.start, one) for one in ("reverse", "both"))
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)

    @pytest.mark.long
    def test_forward_mode(self):
        values = (self.problem.w1, self.problem.w2, self.problem.shift)

        def of_scale(scale):
            start = jax.tree.map(lambda leaf: scale * leaf, self.start)
            return self.log_loss(*values, start, "forward")

        _, tangent = jax.jvp(of_scale, (1.0,), (1.0,))
        np.testing.assert_allclose(tangent, (of_scale(1 + 1e-4) - of_scale(1 - 1e-4)) / 2e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["alignment_error_2", "drift"])
@pytest.mark.long
def test_observables_have_finite_gradients(name):
    problem, start = TestGradients.problem, TestGradients.start
    got = jax.grad(lambda y: solve(problem, y, t1=1.0, saves=3).observables[name][-1])(start)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(got))

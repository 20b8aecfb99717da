"""Problems without any formula of their own: what the library derives from the loss is held against the formulas."""

import equinox as eqx
import jax

from lora_flow import linearised_task
from lora_flow.problems.base import AbstractProblem


class LossOnly(eqx.Module):
    """The same problem, of which nothing but layers and loss is known."""

    problem: AbstractProblem

    @property
    def layers(self):
        return self.problem.layers

    def loss(self, adapters):
        return self.problem.loss(adapters)


tasks = jax.jit(linearised_task)

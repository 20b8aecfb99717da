"""Five ReLU layers with LoRA on each: which of `lora_alpha` and the step size may be raised how far."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters
from lora_flow.dynamics.descend import descend
from lora_flow.problems.base import Layers

DEPTH, SIZE, RANK, SHIFT_RANK, SAMPLES = 5, 64, 8, 4, 256
SHIFT = 0.5  # Frobenius norm of a layer's shift over that of its weight
STEPS, SAVES = 300, 61  # of the descents
RATES = {"adam": 1e-4, "gd": 1e-2}  # where both factors are 1
MOVED = ("lora_alpha", "step size")

Setting = tuple[float, float]  # the scaling s, and the step size


class ReLULayers(eqx.Module):
    """The relative squared error of a network with ReLUs, `||f(X) - Y||^2/||Y||^2`, with LoRA on every layer.

    Layer i computes `W_i + s B_i A_i`. The inputs are columns, and no ReLU follows the last layer.
    """

    weights: tuple[Float[Array, "out in"], ...]
    inputs: Float[Array, "in samples"]
    targets: Float[Array, "out samples"]
    scaling: Float[Array, ""]

    @property
    def layers(self) -> Layers:
        return tuple(weight.shape for weight in self.weights)  # type: ignore[misc]

    def loss(self, adapters: Adapters) -> Array:
        seen = outputs = self.inputs
        for weight, (a, b) in zip(self.weights, adapters, strict=True):
            outputs = weight @ seen + self.scaling * b @ (a @ seen)
            seen = jax.nn.relu(outputs)
        return jnp.sum((outputs - self.targets) ** 2) / jnp.sum(self.targets**2)


def draw_network(seed: int) -> tuple[ReLULayers, Adapters]:
    """Weights N(0, 2/n), targets from shifts of rank 4 of all of them, white inputs, and PEFT's start."""
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=(SIZE, SIZE)) * np.sqrt(2 / SIZE) for _ in range(DEPTH)]
    shifts = [rng.normal(size=(SIZE, SHIFT_RANK)) @ rng.normal(size=(SHIFT_RANK, SIZE)) for _ in range(DEPTH)]
    inputs = rng.normal(size=(SIZE, SAMPLES))
    seen = outputs = inputs
    for weight, shift in zip(weights, shifts, strict=True):
        outputs = (weight + SHIFT * np.linalg.norm(weight) / np.linalg.norm(shift) * shift) @ seen
        seen = np.maximum(outputs, 0)
    bound = 1 / np.sqrt(SIZE)
    drawn = [jnp.asarray(rng.uniform(-bound, bound, (RANK, SIZE))) for _ in range(DEPTH)]
    arrays: Any = jax.tree.map(jnp.asarray, (tuple(weights), inputs, outputs, 1.0))
    return ReLULayers(*arrays), tuple(Adapter(a, jnp.zeros((SIZE, RANK))) for a in drawn)


def settings(optimizer: str, moved: str, factors: Sequence[float]) -> list[Setting]:
    """Scalings and step sizes where one of both is raised by these factors."""
    rate = RATES[optimizer]
    return [(float(factor), rate) if moved == "lora_alpha" else (1.0, factor * rate) for factor in factors]


@functools.cache
def trained(optimizer: str, asked: tuple[Setting, ...], draws: int) -> np.ndarray:
    """The loss at the saved iterations, `(draw, setting, iteration)`, infinite from where it diverges."""
    problems, starts = zip(*map(draw_network, range(draws)), strict=True)
    scalings, rates = jnp.asarray(asked).T

    def one(lane: Any) -> Array:
        problem, start, scaling, rate = lane
        step = optax.adam(rate) if optimizer == "adam" else rate
        scaled = eqx.tree_at(lambda of: of.scaling, problem, scaling)
        return descend(scaled, start, steps=STEPS, step=step, saves=SAVES).observables["loss"]

    @jax.jit
    def each(problems: Any, starts: Any) -> Array:  # one after the other: in a batch, products are no faster
        return jax.lax.map(
            lambda drawn: jax.lax.map(lambda how: one((*drawn, *how)), (scalings, rates)), (problems, starts)
        )

    losses = each(*(jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (problems, starts)))
    return np.nan_to_num(np.asarray(losses), nan=np.inf, posinf=np.inf)

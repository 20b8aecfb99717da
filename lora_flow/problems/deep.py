"""Deep linear networks: a product of frozen layers, with an adapter on each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_flow.adapter import Adapters
from lora_flow.algebra.diagonal import as_matrix, check_task, dense
from lora_flow.algebra.spectra import frobenius_norm
from lora_flow.arrays import AnyArray
from lora_flow.checks import kind, require
from lora_flow.problems.base import AbstractProblem, Layers


class DeepLinear(AbstractProblem):
    r"""Fine-tuning a linear network of any depth by LoRA: `1/2 ||shift - update||_F^2`.

    The network `W_L ... W_1` is frozen, `B_i A_i` is added to each W_i, and the update is the change of the product.
    With two layers this is `Factorization`, which has faster formulas.

    **Arguments:** `weights`, the frozen matrices, W_1 first, and either `shift` or `target = shift + W_L ... W_1`, of
    shape `(out of the last, in of the first)`.

    **Raises:** `InputError` for shapes that do not match, for entries that are not finite, and for a shift of zero.
    """

    weights: tuple[Float[Array, "out in"], ...]
    shift: Float[Array, "last first"]

    of_products = True

    def __init__(self, weights: Sequence[AnyArray], shift: AnyArray | None = None, target: AnyArray | None = None):
        several = isinstance(weights, (list, tuple)) or getattr(weights, "ndim", 0) == 3
        require(several, "weights", "be a list of matrices, W_1 first", kind(weights))
        require(len(weights) > 0, "weights", "hold at least one matrix", "none")
        self.weights = tuple(dense(as_matrix(f"weights[{i}]", weight)) for i, weight in enumerate(weights))
        for i, (before, after) in enumerate(zip(self.weights, self.weights[1:], strict=False), start=1):
            fits = after.shape[1] == before.shape[0]
            require(fits, f"weights[{i}]", f"have {before.shape[0]} columns, as weights[{i - 1}] has rows", after.shape)
        given = "neither" if shift is None and target is None else "both"
        require((shift is None) != (target is None), "shift or target", "be given, and not both", given)
        name, goal = ("shift", shift) if target is None else ("target", target)
        matrix = dense(as_matrix(name, goal))
        shape = len(self.weights[-1]), self.weights[0].shape[1]
        require(matrix.shape == shape, name, f"have shape {shape}", matrix.shape)
        self.shift = matrix if target is None else matrix - self._products()[-1]
        check_task("shift", self.shift)

    @property
    def layers(self) -> Layers:
        return tuple(weight.shape for weight in self.weights)  # type: ignore[misc]

    @property
    def layer_inputs(self) -> tuple[Float[Array, "samples in"] | None, ...]:
        """Each layer's inputs when the network's inputs are white; None for the first layer."""
        return (None, *(product.T for product in self._products()[:-1]))

    def update(self, adapters: Adapters) -> Float[Array, "last first"]:
        """`(W_L + B_L A_L) ... (W_1 + B_1 A_1) - W_L ... W_1`, by thin products, which do not cancel."""
        left, right = self._factors(adapters)
        return left @ right

    def loss(self, adapters: Adapters) -> Float[Array, ""]:
        return 0.5 * jnp.sum((self.shift - self.update(adapters)) ** 2)

    def linearised_task(self) -> tuple[Float[Array, "out in"], ...]:
        """`(W_L ... W_{i+1})^T shift (W_{i-1} ... W_1)^T` for each layer i."""
        back, tasks = self.shift, []
        for weight, before in zip(reversed(self.weights), reversed([None, *self._products()[:-1]]), strict=True):
            tasks.append(back if before is None else back @ before.T)
            back = weight.T @ back
        return tuple(reversed(tasks))

    def task_sizes(self) -> tuple[Array, ...]:
        norms = [frobenius_norm(weight) for weight in self.weights]
        others = (norms[:i] + norms[i + 1 :] for i in range(len(norms)))
        return tuple(frobenius_norm(self.shift) * math.prod(one) for one in others)

    def _products(self) -> list[Float[Array, "out first"]]:
        """W_1, W_2 W_1, and so on."""
        products = [self.weights[0]]
        for weight in self.weights[1:]:
            products.append(weight @ products[-1])
        return products

    def _factors(self, adapters: Adapters) -> tuple[Array, Array]:
        """Thin factors of the update: with the one up to layer i - 1, `U = left right`, that up to layer i is
        `W_i U + B_i A_i (W_{i-1} ... W_1 + U)`."""
        (a, left), *rest = adapters
        right = a
        for (a, b), weight, product in zip(rest, self.weights[1:], self._products(), strict=False):
            right = jnp.concatenate([right, a @ product + (a @ left) @ right])
            left = jnp.concatenate([weight @ left, b], axis=1)
        return left, right

    def __str__(self) -> str:
        shapes = ", ".join(f"{rows} x {columns}" for rows, columns in self.layers)
        return f"DeepLinear: {len(self.weights)} layers, {shapes}"

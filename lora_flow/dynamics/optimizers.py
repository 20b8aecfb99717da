"""The optimisers that a sweep knows by name, and the gradient noise of minibatches: transformations of optax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lora_flow.adapter import Adapter, Adapters
from lora_flow.arrays import require_key
from lora_flow.checks import require, require_number

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "gd": optax.identity,
    "sign": optax.scale_by_sign,
    "adam": optax.scale_by_adam,
}
"""Gradient descent, sign descent, and Adam with beta 0.9, 0.999 and epsilon 1e-8, each before its step size."""


def gradient_noise(
    std: float | Float[Array, ""], key: Array, scaling: float | Float[Array, ""] = 1.0
) -> optax.GradientTransformation:
    r"""Noise in the gradient, as minibatches make it: every entry of dL/dW of every layer is off by N(0, std^2).

    The noise N is drawn anew at every step. LoRA's factors see it as `scaling B^T N` and `scaling N A^T`. The
    transformation is the first of a chain, `descend(..., step=optax.chain(gradient_noise(0.1, key), optax.adam(1e-3)))`
    for instance, with A and B in one step (the order "simultaneous").

    **Arguments:** `std`, in the units of dL/dW; a `key`, from `jax.random.key`; the problem's `scaling` s.

    **Raises:** `InputError` for a std that is negative, a key that is none, and a scaling that is not positive.
    """
    require_number("std", std, "be at least 0", lambda known: known >= 0)
    require_key(key)
    require_number("scaling", scaling, "be positive", lambda known: known > 0)

    def update(gradient: Any, count: Array, adapters: Any = None) -> tuple[Adapters, Array]:
        of_both = isinstance(adapters, tuple) and all(isinstance(one, Adapter) for one in adapters)
        require(of_both, "order", "be 'simultaneous' with gradient_noise", "another one")
        keys = jax.random.split(jax.random.fold_in(key, count), len(adapters))

        def one(key: Array, slope: Adapter, adapter: Adapter) -> Adapter:
            noise = scaling * std * jax.random.normal(key, (adapter.b.shape[0], adapter.a.shape[1]))
            return Adapter(slope.a + adapter.b.T @ noise, slope.b + noise @ adapter.a.T)

        return tuple(map(one, keys, gradient, adapters)), count + 1

    return optax.GradientTransformation(lambda adapters: jnp.zeros((), jnp.int32), update)


def one_of(optimizers: Sequence[optax.GradientTransformation], which: Int[Array, ""]) -> optax.GradientTransformation:
    """The optimiser at the place `which`, a traced number: lanes with different optimisers then share a program."""
    if len(optimizers) == 1:
        return optimizers[0]

    def update(gradient: Any, memory: Any, factors: Any = None) -> tuple[Any, Any]:
        done = [one.update(gradient, held, factors) for one, held in zip(optimizers, memory, strict=True)]
        updates, after = zip(*done, strict=True)
        return jax.tree.map(lambda *leaves: jax.lax.select_n(which, *leaves), *updates), after

    return optax.GradientTransformation(lambda factors: tuple(one.init(factors) for one in optimizers), update)

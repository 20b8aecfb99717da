"""The state of the flow: one `Adapter(a, b)` for each layer, layer 1 first."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.arrays import numbers, real_array
from lora_flow.checks import concrete, kind, require, require_integer


class Adapter(NamedTuple):
    """The LoRA factors of one layer, which computes `W + b @ a`.

    `a` (A in the papers) has shape `(rank, in)`, `b` (B) has shape `(out, rank)`.
    """

    a: Float[Array, "*lanes rank in"]
    b: Float[Array, "*lanes out rank"]

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def stacked(self) -> Float[Array, "*lanes stacked rank"]:
        """Z = [B; A^T], the stacked factor that the theory follows."""
        return jnp.concatenate([self.b, self.a.mT], axis=-2)

    @property
    def imbalance(self) -> Float[Array, "*lanes rank rank"]:
        """A A^T - B^T B, which gradient flow conserves."""
        return self.a @ self.a.mT - self.b.mT @ self.b


Adapters = tuple[Adapter, ...]


def zero_adapters(layers: tuple[tuple[int, int], ...], rank: int) -> Adapters:
    """Adapters that change nothing, for layers of the given `(out, in)` shapes.

    **Returns:** one `Adapter` a layer, with A = 0 of shape `(rank, in)` and B = 0 of shape `(out, rank)`.

    **Raises:** `InputError` for shapes that are none, and for a rank below 1.
    """
    check_layers("layers", layers)
    require_integer("rank", rank, "be at least 1", 1)
    return tuple(Adapter(jnp.zeros((rank, n_in)), jnp.zeros((n_out, rank))) for n_out, n_in in layers)


def pad(adapters: Adapters, rank: int) -> Adapters:
    """Adapters of a larger rank that compute the same update.

    The extra rows of A and columns of B are zero, and gradient flow keeps them zero. So lanes of different ranks can
    share one compiled program.

    **Returns:** one `Adapter` a layer, A of shape `(*lanes, rank, in)` and B of shape `(*lanes, out, rank)`.

    **Raises:** `InputError` for what are no adapters, and for a smaller rank.
    """
    adapters = as_adapters("adapters", adapters)
    least = max(adapter.rank for adapter in adapters)
    require_integer("rank", rank, f"be at least {least}, the adapters' own", least)

    def pad_one(adapter: Adapter) -> Adapter:
        extra = rank - adapter.rank
        lead = [(0, 0)] * (adapter.a.ndim - 2)
        return Adapter(
            jnp.pad(adapter.a, [*lead, (0, extra), (0, 0)]),
            jnp.pad(adapter.b, [*lead, (0, 0), (0, extra)]),
        )

    return tuple(map(pad_one, adapters))


def check_layers(name: str, layers: Any) -> None:
    """Raises unless these are the `(out, in)` shapes of at least one layer."""

    def is_shape(one: Any) -> bool:
        pair = isinstance(one, (tuple, list)) and len(one) == 2
        return pair and all(isinstance(size, (int, np.integer)) and size >= 1 for size in one)

    shapes = isinstance(layers, (tuple, list)) and len(layers) > 0 and all(map(is_shape, layers))
    require(shapes, name, "be a tuple with the shape (out, in) of each layer", kind(layers))


def as_adapters(name: str, value: Any, layers: tuple[tuple[int, int], ...] | None = None) -> Adapters:
    """The value as adapters of these layers, or of any, whose factors are arrays with leading axes in common.

    **Raises:** `InputError` that names the first thing that is none of that.
    """
    must = f"hold one Adapter for each {'layer' if layers is None else f'of {len(layers)} layers'}"
    several = isinstance(value, (tuple, list)) and len(value) > 0 and not isinstance(value, Adapter)
    got = "an Adapter by itself, not in a tuple" if isinstance(value, Adapter) else "" if several else kind(value)
    require(several, name, f"be a tuple and {must}", got)
    for index, one in enumerate(value):
        pair = isinstance(one, (tuple, list)) and len(one) == 2
        require(pair, f"{name}[{index}]", "be an Adapter(a, b)", "" if pair else kind(one))
    require(layers is None or len(value) == len(layers), name, must, len(value))
    factors: Any = (map(numbers, (f"{name}[{i}].a", f"{name}[{i}].b"), one) for i, one in enumerate(value))
    adapters = tuple(Adapter(*one) for one in factors)
    lead = adapters[0].a.shape[:-2]
    for index, (a, b) in enumerate(adapters):
        rank = a.shape[-2] if a.ndim > 1 else a.shape[0] if a.ndim else 0
        require(rank >= 1, f"{name}[{index}]", "have a rank of at least 1", rank)
        n_out, n_in = layers[index] if layers is not None else (b.shape[-2] if b.ndim > 1 else 1, a.shape[-1])
        for letter, factor, shape in (("a", a, (*lead, rank, n_in)), ("b", b, (*lead, n_out, rank))):
            require(factor.shape == shape, f"{name}[{index}].{letter}", f"have shape {shape}", factor.shape)
    return adapters


def as_start(name: str, value: Any, layers: tuple[tuple[int, int], ...]) -> Adapters:
    """The value as finite adapters of these layers, without leading axes, in JAX's default floating-point type."""
    adapters = as_adapters(name, value, layers)
    checked = []
    for index, adapter in enumerate(adapters):
        for letter, given in zip(Adapter._fields, adapter, strict=True):
            where, factor = f"{name}[{index}].{letter}", real_array(f"{name}[{index}].{letter}", given)
            require(factor.ndim == 2, where, "have two dimensions", f"shape {factor.shape}")
            known = concrete(factor)
            bad = known is not None and not np.all(np.isfinite(known))
            require(not bad, where, "be finite", "entries that are NaN or infinite")
            checked.append(factor)
    return tuple(map(Adapter, checked[::2], checked[1::2]))

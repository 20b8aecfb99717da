"""Fewer directions of the rank, for a loss of the products B A alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters, as_adapters, pad
from lora_flow.coordinates.base import Coordinates


class Narrow(Coordinates):
    """The same problem, with starts as `narrow` makes them: for a loss of the products B A alone.

    `enter` also returns the basis of each layer's directions, `(whole, r)`, with which `leave` makes adapters of the
    rank `whole` that the coordinates were made for.
    """

    whole: int = eqx.field(static=True)

    @classmethod
    def of(cls, problems: Sequence[Any], *, rank: int) -> tuple[Narrow, ...]:
        return tuple(cls(problem, min(rank, max(map(sum, problem.layers))), rank) for problem in problems)

    def enter(self, adapters: Adapters) -> tuple[Adapters, tuple[Array, ...]]:
        narrowed, bases = zip(*map(_turn, as_adapters("adapters", adapters)), strict=True)
        own = (jnp.eye(one.rank) if basis is None else basis for one, basis in zip(narrowed, bases, strict=True))
        return pad(narrowed, self.rank), tuple(map(self._padded, own))

    def leave(self, adapters: Adapters, bases: tuple[Array, ...]) -> Adapters:
        return tuple(Adapter(basis @ a, b @ basis.mT) for (a, b), basis in zip(adapters, bases, strict=True))

    def _padded(self, basis: Array) -> Array:
        rows, columns = basis.shape[-2:]
        return jnp.pad(basis, [(0, 0)] * (basis.ndim - 2) + [(0, self.whole - rows), (0, self.rank - columns)])


def narrow(adapters: Adapters) -> Adapters:
    r"""The same start with fewer directions: ranks above `out + in` become `out + in`.

    Under gradient flow, gradient descent and all of `lora_flow.dynamics.flows`, the rows of A and the columns of B move
    only within the space that they span together at the start, of at most out + in dimensions. In an orthonormal basis
    of this space everything but the basis is the same, so a network of width 10,000 costs as much as one of width out +
    in. (Optimisers that act on single entries, as Adam does, depend on the basis.) The adapters may have leading axes.
    Derivatives are defined where [B; A^T] has full rank.

    **Returns:** one `Adapter` a layer, A `(*lanes, r, in)` and B `(*lanes, out, r)` with r = min(rank, out + in).

    **Raises:** `InputError` for what are no adapters.
    """
    return tuple(_turn(adapter)[0] for adapter in as_adapters("adapters", adapters))


def _turn(adapter: Adapter) -> tuple[Adapter, Float[Array, "*lanes rank r"] | None]:
    """The adapter narrowed, and the basis of its directions; None where there is nothing to narrow."""
    n_out, n_in = adapter.b.shape[-2], adapter.a.shape[-1]
    if adapter.rank <= n_out + n_in:
        return adapter, None
    basis, inside = jnp.linalg.qr(adapter.stacked.mT)
    stacked = inside.mT
    return Adapter(stacked[..., n_out:, :].mT, stacked[..., :n_out, :]), basis

"""The state of the flow: one `Adapter(a, b)` for each layer, layer 1 first."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


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
    """
    return tuple(Adapter(jnp.zeros((rank, n_in)), jnp.zeros((n_out, rank))) for n_out, n_in in layers)


def pad(adapters: Adapters, rank: int) -> Adapters:
    """Adapters of a larger rank that compute the same update.

    The extra rows of A and columns of B are zero, and gradient flow keeps them zero. So lanes of different ranks can
    share one compiled program.

    **Returns:** one `Adapter` a layer, A of shape `(*lanes, rank, in)` and B of shape `(*lanes, out, rank)`.
    """

    def pad_one(adapter: Adapter) -> Adapter:
        extra = rank - adapter.rank
        lead = [(0, 0)] * (adapter.a.ndim - 2)
        return Adapter(
            jnp.pad(adapter.a, [*lead, (0, extra), (0, 0)]),
            jnp.pad(adapter.b, [*lead, (0, 0), (0, extra)]),
        )

    return tuple(map(pad_one, adapters))


def narrow(adapters: Adapters) -> Adapters:
    r"""The same start with fewer directions: ranks above `out + in` become `out + in`.

    Under gradient flow, gradient descent and all of `lora_flow.flows`, the rows of A and the columns of B move only
    within the space that they span together at the start, of at most out + in dimensions. In an orthonormal basis of
    this space everything but the basis is the same, so a network of width 10,000 costs as much as one of width
    out + in. (Optimisers that act on single entries, as Adam does, depend on the basis.) The adapters may have leading
    axes. Derivatives are defined where [B; A^T] has full rank.

    **Returns:** one `Adapter` a layer, A `(*lanes, r, in)` and B `(*lanes, out, r)` with r = min(rank, out + in).
    """

    def one(adapter: Adapter) -> Adapter:
        n_out, n_in = adapter.b.shape[-2], adapter.a.shape[-1]
        if adapter.rank <= n_out + n_in:
            return adapter
        stacked = jnp.linalg.qr(adapter.stacked.mT, mode="r").mT
        return Adapter(stacked[..., n_out:, :].mT, stacked[..., :n_out, :])

    return tuple(map(one, adapters))

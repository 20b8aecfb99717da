"""The starts of a classifier's adapters: the simulator's own initialisations, applied to each layer."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_flow import Adapter, Adapters, SingleLayer
from lora_flow.algebra.spectra import singular_triplets
from lora_flow.checks import require_choice
from lora_flow.initialization import initialize
from lora_flow.initialization.learned import LEARNED


class Start(NamedTuple):
    """A scheme of the simulator; `matched` where its adapters are scaled to the norm of a gaussian start's."""

    scheme: str
    side: str = "A"
    matched: bool = True


STARTS = {
    "gaussian-A": Start("gaussian", "A", matched=False),
    "gaussian-B": Start("gaussian", "B", matched=False),
    "spectral": Start("spectral"),
    "lora-one": Start("lora-one"),
}


def start(name: str, key: Array, task: tuple[Array, ...], *, rank: int, alpha: float | Array) -> Adapters:
    """Adapters for the layers whose negative one-step gradients are `task`, by the scheme called `name`.

    `gaussian-A` and `gaussian-B` draw one factor with standard deviation alpha. `spectral` and `lora-one` are scaled,
    layer by layer, to the root mean square of the norm ||[B; A^T]||_F of `gaussian-A` with that alpha,
    `alpha sqrt(rank in)`: starts of different schemes then differ in their directions and not in their size. Where the
    gradient has more directions than the rank, `spectral` takes the first ones. `learned:FOLDER` is what `lora-flow
    optimise` has learned, scaled like these.

    **Returns:** one `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.
    """
    if name.startswith(f"{LEARNED}:"):
        scheme = Start(name)
    else:
        require_choice("init", name, STARTS, f"or {LEARNED}:FOLDER")
        scheme = STARTS[name]

    def one(key: Array, gradient: Float[Array, "out in"]) -> Adapter:
        gradient = gradient.astype(float)  # what rounding leaves of other directions is none to learn
        layer = SingleLayer(best_approximation(gradient, rank) if scheme.matched else gradient)
        (adapter,) = initialize(scheme.scheme, key, layer, rank=rank, alpha=1.0, side=scheme.side)
        size = jnp.sqrt(rank * gradient.shape[1]) / norm(adapter) if scheme.matched else 1.0
        return Adapter(alpha * size * adapter.a, alpha * size * adapter.b)

    return tuple(map(one, jax.random.split(key, len(task)), task))


def best_approximation(matrix: Float[Array, "rows columns"], rank: int) -> Float[Array, "rows columns"]:
    u, s, vt = singular_triplets(matrix, rank)
    return (u * s[None]) @ vt


def norm(adapter: Adapter) -> Float[Array, ""]:
    """||Z||_F, Z = [B; A^T]."""
    return jnp.sqrt(jnp.sum(adapter.a**2) + jnp.sum(adapter.b**2))

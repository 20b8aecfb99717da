"""Every initialisation of the simulator, by name, on one layer of a checkpoint.

The functions of `lora_flow.initialization` do the work, on a problem that knows of its matrices only what they ask for:
the leading triplets of the gradient or of the weight, where these are enough.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters
from lora_flow.algebra.low_rank import LowRank
from lora_flow.bridge.gradients import Gradients, Inputs
from lora_flow.bridge.layers import Layer
from lora_flow.bridge.ranks import Ranks
from lora_flow.bridge.truncated import Truncated, truncated_svd
from lora_flow.checks import require
from lora_flow.initialization import INITIALIZATIONS, find_scheme, initialize
from lora_flow.problems.base import AbstractProblem, Layers


class Need(NamedTuple):
    """What a scheme is made of: its leading triplets, so many times the rank, or all of it where that is 0."""

    what: str
    times: int = 1
    smallest: bool = False


NEEDS = {
    **dict.fromkeys(("spectral", "lora-one", "lora-one-theory", "spectral-both"), Need("gradient")),
    **dict.fromkeys(("lora-ga", "lora-ga-peft"), Need("gradient", 2)),
    "gora": Need("gradient", 0),
    "pissa": Need("weight"),
    "milora": Need("weight", smallest=True),
    **dict.fromkeys(("olora", "loram"), Need("weight", 0)),
    "eva": Need("inputs"),
    "invariant": Need("inputs", 0),
}
"""The needs of the schemes by name; the others need nothing."""


class OneLayer(AbstractProblem):
    """A layer of a checkpoint as the initialisations see it; its loss is the change of a network's to first order."""

    size: tuple[int, int]
    weight: Any
    descent: Any
    inputs: Any
    scaling: Array

    @property
    def layers(self) -> Layers:
        return (self.size,)

    @property
    def weights(self) -> Any:
        return None if self.weight is None else (self.weight,)

    @property
    def layer_inputs(self) -> Any:
        return None if self.inputs is None else (self.inputs,)

    def loss(self, adapters: Adapters) -> Array:
        ((a, b),) = adapters
        return -self.scaling * jnp.sum(jnp.asarray(self.descent) * (b @ a))

    def linearised_task(self) -> Any:
        return (self.descent * self.scaling,)

    def task_rank(self) -> tuple[int, str]:
        """At most the rank of the start: the leading directions are what a start can be made of."""
        return (0 if self.descent is None else len(self.descent.s)), "the gradient"


class Start(NamedTuple):
    """The adapter of a layer for alpha = 1, and the decomposition that it comes from."""

    adapter: Adapter
    source: Truncated | None


def need_of(init: str) -> Need | None:
    """What the scheme called `init` is made of.

    **Raises:** `InputError` for a name that is no scheme's.
    """
    find_scheme(init)
    return NEEDS.get(init.partition(":")[0])


def offsets(init: str) -> bool:
    """Whether the scheme's start is to be taken off the frozen weight."""
    return INITIALIZATIONS[init.partition(":")[0]].offset


def start(
    init: str,
    layer: Layer,
    ranks: Ranks,
    *,
    scaling: float,
    seed: int,
    side: str,
    weight: np.ndarray,
    gradients: Gradients | None,
    inputs: Inputs | None,
) -> Start:
    """The start of a layer by the scheme called `init`, with alpha = 1; A `(rank, in)` and B `(out, rank)`.

    Its draws depend on the seed and the layer's name alone, not on which other layers there are.
    """
    need, most = need_of(init), ranks.of(layer)
    known: dict[str, Any] = {"weight": None, "descent": None, "inputs": None}
    source = None
    if need is not None and need.what == "gradient":
        assert gradients is not None
        count = min(max(need.times, 1) * most, *layer.shape)
        if need.times or ranks.share is not None:
            source = gradients.leading(layer, count)
        known["descent"] = gradients.descent(layer) if not need.times else source and source.triplets
    elif need is not None and need.what == "weight":
        if need.times or ranks.share is not None:
            source = truncated_svd(weight, most, smallest=need.smallest)
        known["weight"] = jnp.asarray(weight) if not need.times else source and source.triplets
    elif need is not None:
        assert inputs is not None
        source = inputs.read(layer, most if need.times else layer.shape[1])
        known["inputs"] = source.triplets if need.times else source.triplets.dense()
    rank = ranks.chosen(layer, source)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(layer.module.encode()))
    return Start(begin(init, key, layer.shape, rank=rank, scaling=scaling, side=side, **known), source)


def begin(
    init: str,
    key: Array,
    shape: tuple[int, int],
    *,
    rank: int,
    scaling: float = 1.0,
    side: str = "A",
    weight: Any = None,
    descent: Any = None,
    inputs: Any = None,
) -> Adapter:
    """The start of a matrix `(out, in)` by the scheme called `init`, with alpha = 1, from what the scheme is made of.

    That is the whole matrix, or a `LowRank` of at least as many leading triplets as the scheme takes.
    """
    need = need_of(init)
    known = {"weight": weight, "descent": descent, "inputs": inputs}
    for name, matrix in known.items():
        if isinstance(matrix, LowRank) and need is not None and need.times and not need.smallest:
            known[name] = matrix.first(rank * need.times)
    problem = OneLayer(shape, scaling=jnp.asarray(scaling, float), **known)
    (adapter,) = initialize(init, key, problem, rank=rank, alpha=1.0, side=side)
    factors: Any = map(np.asarray, adapter)
    return Adapter(*factors)


def check_ranks(init: str, layers: list[Layer], ranks: Ranks) -> None:
    """Raises for a rank that a layer has no room for, or that the scheme does not take."""
    need = need_of(init)
    by_energy = need is not None and need.what != "inputs" and not need.smallest
    must = f"be a number for {init}, which is made of no leading directions of a gradient or weight"
    require(ranks.share is None or by_energy, "rank", must, f"energy:{ranks.share}")
    for layer in layers:
        rank, least = ranks.of(layer), min(layer.shape)
        where = f"rank of {layer.module}"
        require(rank <= least, where, f"be at most {least}, the layer's smaller dimension", rank)
        if need is not None and need.times == 2:
            require(2 * rank <= least, where, f"be at most {least // 2}, half the smaller dimension, for {init}", rank)
        if init == "orthogonal":
            require(rank % 2 == 0, where, "be even for orthogonal", rank)
        if init == "loram":
            require(rank >= 2, where, "be at least 2 for loram, whose size is log(rank)", rank)

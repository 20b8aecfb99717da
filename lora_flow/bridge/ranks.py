"""The rank of each layer: one number, others for some layers, or what a share of a matrix's energy takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_flow.bridge.layers import Layer
from lora_flow.bridge.truncated import Truncated
from lora_flow.checks import InputError, require

MUST = "be a rank (16), a rank for some layers (q_proj=16) or a share of the energy (energy:0.9)"


class Ranks(NamedTuple):
    """`common` for layers that no pattern matches; or the rank that holds `share` of the energy, at most `common`."""

    common: int
    patterns: tuple[tuple[str, int], ...] = ()
    share: float | None = None

    def of(self, layer: Layer) -> int:
        """The rank of a layer, where the energy chooses the largest: half the dimension, as some schemes take 2 r."""
        for pattern, rank in self.patterns:
            if re.fullmatch(rf"(.*\.)?({pattern})", layer.name):
                return rank
        return self.common if self.share is None else max(min(self.common, min(layer.shape) // 2), 1)

    def chosen(self, layer: Layer, matrix: Truncated | None) -> int:
        """The same, where the energy chooses by the leading triplets of the matrix that the start is made of."""
        most = self.of(layer)
        if self.share is None or matrix is None:
            return most
        held = np.cumsum(np.square(matrix.triplets.s[:most])) / (matrix.energy or 1.0)
        return min(int(np.searchsorted(held, self.share * (1 - 1e-12))) + 1, most)


def read_ranks(words: Sequence[str | int], most: int) -> Ranks:
    """The ranks that words ask for; `most` is the largest that the energy may choose.

    **Raises:** `InputError` for a word that is none of the three kinds, or one kind twice.
    """
    commons, patterns, shares = [], [], []
    for word in map(str, words):
        pattern, equals, number = word.rpartition("=")
        energy = re.fullmatch(r"energy:([0-9.eE-]+)", word)
        try:
            if energy:
                shares.append(float(energy[1]))
            elif equals:
                patterns.append((pattern, int(number)))
                re.compile(pattern)
            else:
                commons.append(int(word))
        except (ValueError, re.error) as error:
            raise InputError(f"rank must {MUST}, got {word!r}") from error
    one = len(commons) + len(shares) == 1
    require(
        one,
        "rank",
        "have one number or one energy:SHARE for the layers that no pattern names",
        " ".join(map(str, words)),
    )
    for rank in (*commons, *(rank for _, rank in patterns), most):
        require(rank >= 1, "rank", "be at least 1", rank)
    for share in shares:
        require(0 < share <= 1, "rank", "have a share of the energy above 0 and at most 1", share)
    return Ranks(commons[0] if commons else most, tuple(patterns), shares[0] if shares else None)

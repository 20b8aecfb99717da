"""Lanes: the entries of a dataset over the dims of `status`, which says how each ended; and the boxes they are in."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import xarray as xr

NOT_RUN = -1  # the status of a lane that has not run, and what its counts read as


@dataclasses.dataclass(frozen=True)
class Boxes:
    """A grid of lanes, cut into boxes of one size: what is solved, stored and resumed as a whole.

    Lanes and boxes are numbered in C order. The last boxes of an axis may be smaller.
    """

    shape: tuple[int, ...]
    box: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of boxes along each axis."""
        return tuple(-(-size // length) for size, length in zip(self.shape, self.box, strict=True))

    @property
    def count(self) -> int:
        return math.prod(self.counts)

    def place(self, number: int) -> tuple[int, ...]:
        """The place of a box in the grid of boxes."""
        return tuple(int(i) for i in np.unravel_index(number, self.counts))

    def block(self, number: int) -> tuple[slice, ...]:
        """The part of the grid of lanes that a box is."""
        within = zip(self.place(number), self.box, self.shape, strict=True)
        return tuple(slice(i * length, min((i + 1) * length, size)) for i, length, size in within)

    def size(self, number: int) -> int:
        """The number of lanes in a box."""
        return math.prod(part.stop - part.start for part in self.block(number))

    def lanes(self, number: int) -> np.ndarray:
        """The numbers of a box's lanes."""
        axes = [np.arange(part.start, part.stop) for part in self.block(number)]
        return np.ravel_multi_index(np.meshgrid(*axes, indexing="ij"), self.shape).ravel()

    def where(self, lanes: np.ndarray) -> list[int]:
        """The numbers of the boxes with a lane that is True in an array over the grid."""
        return [number for number in range(self.count) if lanes[self.block(number)].any()]


def waiting(status: xr.DataArray) -> np.ndarray:
    """Where lanes have not run: where `status` has none of its `flag_values`, NOT_RUN left aside."""
    ran = np.setdiff1d(status.attrs.get("flag_values", status.values), [NOT_RUN])
    return ~np.isin(status.values, ran)

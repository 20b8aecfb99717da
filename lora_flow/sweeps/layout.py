"""How a sweep is cut: into boxes of lanes, which are solved and stored as a whole, and those into batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_flow.storage.lanes import Boxes
from lora_flow.sweeps.limits import BATCHES

PRICE_OF_A_STEP = 16  # in lanes: what a batch's steps take beyond what is in proportion to its size
PRICE_OF_A_BOX = 16  # in lanes: what its files take
FEWEST_BOXES = 16  # of a sweep that is longer than so many batches, about
DEVICES = (1, 2, 4)  # that a process may have; who solves a box is not known, and must not change its numbers
EXACT = 2**16  # lanes up to which every batch is looked at


class Layout(NamedTuple):
    """The boxes, and the number of lanes that share a batch; a box's last batch is filled up by repeating a lane."""

    boxes: Boxes
    width: int

    def batches(self, number: int) -> list[np.ndarray]:
        """The lane numbers of a box, batch by batch."""
        lanes = self.boxes.lanes(number)
        return [lanes[i : i + self.width] for i in range(0, len(lanes), self.width)]

    def noted(self, dims: Iterable[str]) -> dict[str, Any]:
        """What a run notes of its layout, and a larger one takes over."""
        return {"box": dict(zip(dims, self.boxes.box, strict=True)), "width": self.width}


def noted_layout(note: Mapping[str, Any], sizes: Mapping[str, int]) -> Layout:
    """The layout of a grid, its sizes by dims, that was noted for it or for a smaller one."""
    box = tuple(note["box"].get(dim, 1) for dim in sizes)
    return Layout(Boxes(tuple(sizes.values()), box), note["width"])


def choose_layout(shape: tuple[int, ...], costs: np.ndarray, most: int) -> Layout:
    """The boxes over whole trailing axes, and over a part of one, that keep devices waiting least.

    All lanes of a batch wait for the slowest, and a step takes some time for any number of lanes. Large batches are
    best for lanes of similar cost, full ones for all. Nothing depends on the machine.

    **Arguments:** `shape` is the grid of lanes, and `costs` those of a lane, over the problems, its first axes. `most`
    is the largest number of lanes in a batch.
    """
    several = min(BATCHES, max(1, math.prod(shape) // (most * FEWEST_BOXES)))
    options = [
        Layout(boxes, math.ceil(lanes / (math.ceil(lanes / most) * more)))
        for boxes in _boxes(shape, several * most * 3 // 4, several * most * 3 // 2)
        for lanes in [math.prod(boxes.box)]
        for more in (1, 2, 4, 8)
    ]
    return min(options, key=lambda option: (_waiting(option, costs), math.prod(option.boxes.box)))


def _boxes(shape: tuple[int, ...], least: int, most: int) -> Iterator[Boxes]:
    """The ways to cut evenly into boxes of more than `least` and up to `most` lanes; the whole, where that is less."""
    if math.prod(shape) <= max(least, 1):
        yield Boxes(shape, shape)
    for axis, size in enumerate(shape):
        behind = shape[axis + 1 :]
        inner = math.prod(behind)
        if inner <= most and least < size * inner:
            parts = range(math.ceil(size * inner / most), min(size, math.ceil(size * inner / max(least, 1))) + 1)
            for length in dict.fromkeys(math.ceil(size / number) for number in parts):
                if least < length * inner <= most:
                    yield Boxes(shape, (*(1,) * axis, length, *behind))


def _waiting(layout: Layout, costs: np.ndarray) -> float:
    """The time that the batches take on one device, on two and on more, added up, and that the files take."""
    shape, box, width = layout.boxes.shape, layout.boxes.box, layout.width
    total, lanes = math.prod(shape), math.prod(box)
    files = PRICE_OF_A_BOX * layout.boxes.count * costs.mean()
    if total > EXACT:
        batches = math.ceil(lanes / width) * layout.boxes.count * costs.mean()
        return files + (width + PRICE_OF_A_STEP) * float(batches * sum(1 / count for count in DEVICES))
    axis = next((i for i, length in enumerate(box) if length > 1), len(box) - 1)
    one = math.prod(shape[axis:])  # a box is a range of lanes, within such a part of the grid
    starts = np.concatenate([np.arange(i, min(i + lanes, one), width) for i in range(0, one, lanes)])
    starts = (np.arange(0, total, one)[:, None] + starts).ravel()
    batches = np.maximum.reduceat(np.repeat(costs.ravel(), total // costs.size), starts)
    rounds = [np.maximum.reduceat(batches, range(0, len(batches), count)).sum() for count in DEVICES]
    return files + (width + PRICE_OF_A_STEP) * float(sum(rounds))

"""What a page asks of the runs that are served to it: answers on some cells, and their curves, read when asked for.

A run of a million lanes is opened by its description alone. No answer reads more than `LANES` lanes: where cells have
more seeds than that allows, it is on the first of them.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import xarray as xr

from lora_flow.checks import require
from lora_flow.pages.data import axes_of, of_cells, of_curves, outline
from lora_flow.pages.server import Answer
from lora_flow.pages.thinned import curves
from lora_flow.results.answers import answers, needed
from lora_flow.results.clock import over_time
from lora_flow.results.phases import OVER_TIME
from lora_flow.storage.reading import lanes
from lora_flow.sweeps.run import Looked

LANES = 4800  # that are read for one answer: a second's work

Places = Sequence[Sequence[int]]
"""Some places along each axis of the cells; the cells asked for are all their combinations."""


class Served:
    """Runs by their names, which a page shows without having read them."""

    def __init__(self, runs: Mapping[str, Looked]):
        self._runs = list(runs.values())
        self._names = list(runs)
        self._one_at_a_time = threading.Lock()  # so that answers do not read the run at the same time

    def outlines(self) -> list[dict[str, Any]]:
        """The runs as the page's program reads them, with the answer on the first cell of each and no others."""
        return [self._outline(number) for number in range(len(self._runs))]

    def cells(self, number: int, places: Places) -> dict[str, Any]:
        """What is told of some cells of the run with this number, in C order, as `lora_flow.pages.data.of_cells`."""
        whole = self._whole(number)
        names = dict.fromkeys([*needed(whole), *(f"{name}{i}" for name in OVER_TIME for i in (1, 2))])
        part = self._read(number, [name for name in names if name in whole], places)
        return of_cells(part, answers(part)) | {"seeds": part.sizes["seed"]}

    def curves(self, number: int, places: Places, quantity: str) -> bytes:
        """The quartiles of a quantity in some cells, `(cell, 3, time)`, in single precision."""
        whole = self._whole(number)
        require(quantity in curves(whole), "quantity", "be one that the run has over time", quantity)
        floor = [name for name in ("rounding_floor",) if name in whole]
        part = self._read(number, ["status", quantity, *floor], places)
        return of_curves(part, [quantity]).astype("<f4").tobytes()

    def _outline(self, number: int) -> dict[str, Any]:
        whole = self._whole(number)
        first = self.cells(number, [[0]] * len(axes_of(whole)))
        return {
            "name": self._names[number] or "run",
            **outline(whole, curves(whole)),
            "first": first,
            "lanes": LANES,
            "thinned": [],
        }

    def _whole(self, number: int) -> xr.Dataset:
        require(0 <= number < len(self._runs), "run", f"lie between 0 and {len(self._runs) - 1}", number)
        return over_time(self._runs[number].dataset)

    def _read(self, number: int, names: Sequence[str], places: Places) -> xr.Dataset:
        path, dataset = self._runs[number]
        axes = axes_of(dataset)
        require(len(places) == len(axes), "at", f"have places along {len(axes)} axes", len(places))
        for axis, some in zip(axes, places, strict=True):
            size = dataset.sizes[axis]
            require(some and all(0 <= i < size for i in some), "at", f"lie between 0 and {size - 1} of {axis}", some)
        cells = math.prod(map(len, places))
        require(cells <= LANES, "at", f"be at most {LANES} cells", cells)
        where: dict[str, Any] = {axis: list(some) for axis, some in zip(axes, places, strict=True)}
        where["seed"] = slice(0, max(1, LANES // cells))
        with self._one_at_a_time:
            return over_time(lanes(path, dataset[list(names)], where))


def asked_by_pages(served: Served) -> dict[str, Answer]:
    """The paths that the program of a page asks, each with what answers a query."""

    def cells(query: Mapping[str, str]) -> tuple[str, bytes]:
        told = served.cells(_number(query), _places(query))
        return "application/json", json.dumps(told, allow_nan=False).encode()

    def of_curves(query: Mapping[str, str]) -> tuple[str, bytes]:
        return "application/octet-stream", served.curves(_number(query), _places(query), query.get("quantity", ""))

    return {"/cells": cells, "/curves": of_curves}


def _number(query: Mapping[str, str]) -> int:
    text = query.get("run", "")
    require(re.fullmatch("[0-9]{1,9}", text), "run", "be a number", repr(text[:100]))
    return int(text)


def _places(query: Mapping[str, str]) -> list[list[int]]:
    """The places of `0,1,2;3;0`: axes separated by semicolons, and places along one by commas."""
    text = query.get("at", "")
    known = re.fullmatch("[0-9]{1,9}([,;][0-9]{1,9})*", text)
    require(known, "at", "be whole numbers, such as 0,1,2;3;0", repr(text[:100]))
    return [[int(one) for one in axis.split(",")] for axis in text.split(";")]

"""The numbers that a picture shows, to be kept beside it and compared with those of a new picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from lora_flow.storage.remote import RunPath
from lora_flow.storage.swap import write_atomically

POINTS = 21  # of a curve
DIGITS = 4


def shown(figure: Figure) -> list[dict[str, Any]]:
    """For every axes of a picture its title, the scale of y, the y values of its lines and bands, and its maps.

    A curve is given at up to 21 of its points, the first and the last among them; NaN is null. Where it leaves the axes
    it is given at their edge: a loss below may be rounding, which another machine draws otherwise.
    """
    return [_of(ax) for ax in figure.axes if ax.lines or ax.images]


def save_numbers(pictures: Mapping[str, Figure], folder: RunPath) -> None:
    """Writes that as JSON under each picture's name, a line for each axes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        rows = [json.dumps(one, ensure_ascii=False, separators=(",", ":")) for one in shown(figure)]
        write_atomically(folder / f"{name}.json", "[\n" + ",\n".join(rows) + "\n]\n")


def _of(ax: Axes) -> dict[str, Any]:
    curves = [line for line in ax.lines if line.get_transform() == ax.transData]  # not a line across the axes
    low, high = sorted(ax.get_ylim())
    lines = [np.clip(np.asarray(line.get_ydata(), float), low, high) for line in curves]
    images: list[Any] = [image.get_array() for image in ax.images]
    bands = [one for one in ax.collections if isinstance(one, PolyCollection)]
    return {
        "title": ax.get_title(loc="left") or ax.get_title(),
        "scale": ax.get_yscale(),
        "lines": [_thinned(y) for y in lines],
        "bands": [_sides(band, low, high) for band in bands],
        "maps": [[_numbers(row) for row in np.ma.filled(image.astype(float), np.nan)] for image in images],
    }


def _sides(band: PolyCollection, low: float, high: float) -> list[list[float | None]]:
    """The two curves that a band lies between, between the edges of its axes."""
    paths = band.get_paths()
    corners = np.asarray(paths[0].vertices, float) if paths else np.zeros((3, 2))
    points = (len(corners) - 3) // 2
    sides = (corners[1 : points + 1, 1], corners[points + 2 : -1, 1][::-1])
    return [_thinned(np.clip(side, low, high)) for side in sides]


def _thinned(y: np.ndarray) -> list[float | None]:
    places: np.ndarray = (
        np.unique(np.round(np.linspace(0, len(y) - 1, POINTS)).astype(int)) if len(y) else np.zeros(0, int)
    )
    return _numbers(y[places])


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in values]

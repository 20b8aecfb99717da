"""Ticks of a logarithmic axis, of which at least three have a label, however narrow the axis is."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, NullFormatter

FEWEST, MOST = 3, 9
STRIDES = (1, 2, 3, 4, 5, 10, 20, 30, 50, 100)  # decades from one tick to the next
WITHIN = ((1, 3), (1, 2, 5), tuple(range(1, 10)))  # what a decade is divided into, the coarsest first that is enough
FEWEST_DIGITS, MOST_DIGITS = 6, 17
PLAIN = 1e-3, 1e5  # numbers between are written out where a decade is divided


def label_ticks(ax: Axes) -> Axes:
    """Puts these ticks on the logarithmic axes that have matplotlib's own; to be called when the scales are set."""
    for axis in (ax.xaxis, ax.yaxis):
        if axis.get_scale() == "log" and type(axis.get_major_locator()) is LogLocator:
            axis.set_major_locator(_Ticks())
            axis.set_major_formatter(_Labels(minor_thresholds=(np.inf, np.inf)))
            axis.set_minor_formatter(NullFormatter())
    return ax


def divided(low: float, high: float) -> np.ndarray | None:
    """The ticks between two positive values with fewer than three powers of ten between them; None for more."""
    powers = _powers(low, high)
    if _between(powers, low, high).size >= FEWEST:
        return None
    for parts in WITHIN:
        ticks = _between(np.outer(powers, parts).ravel(), low, high)
        if ticks.size >= FEWEST:
            return ticks
    linear = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=4).tick_values(low, high)
    return _between(np.asarray(linear), low, high)


def strided(low: float, high: float, most: int) -> np.ndarray:
    """Powers of ten between two values: as many as there is room for, and at least three, an even stride apart."""
    exponents = np.round(np.log10(_between(_powers(low, high), low, high))).astype(int)
    kept = [exponents[exponents % stride == 0] for stride in STRIDES]
    enough = [one for one in kept if len(one) >= FEWEST]
    return 10.0 ** next((one for one in enough if len(one) <= most), enough[-1])


def _powers(low: float, high: float) -> np.ndarray:
    return 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)


def _between(ticks: np.ndarray, low: float, high: float) -> np.ndarray:
    return ticks[(ticks >= low * (1 - 1e-9)) & (ticks <= high * (1 + 1e-9))]


class _Ticks(LogLocator):
    def tick_values(self, vmin: float, vmax: float) -> Any:
        low, high = sorted((vmin, vmax))
        if not 0 < low < high < np.inf:
            return super().tick_values(vmin, vmax)
        parts = divided(low, high)
        if parts is not None:
            return parts
        axis: Any = self.axis
        most = MOST if axis is None else int(np.clip(axis.get_tick_space(), FEWEST, MOST))
        return strided(low, high, most)


class _Labels(LogFormatterSciNotation):
    def __call__(self, x: float, pos: int | None = None) -> str:
        axis: Any = self.axis
        low, high = sorted(axis.get_view_interval())
        ticks = divided(low, high) if 0 < low < high < np.inf else None
        if ticks is None:
            return super().__call__(x, pos)
        digits = _digits(ticks)
        if PLAIN[0] <= x <= PLAIN[1]:
            return f"{x:.{digits}g}"
        if digits == FEWEST_DIGITS:
            return super().__call__(x, pos)
        factor, exponent = f"{x:.{digits - 1}e}".split("e")
        return rf"$\mathdefault{{{factor.rstrip('0').rstrip('.')}\times10^{{{int(exponent)}}}}}$"


def _digits(ticks: np.ndarray) -> int:
    """So many significant digits that the ticks' labels are at their places, and so differ."""
    near = 1e-3 * np.min(np.diff(ticks), initial=np.inf)
    counts = range(FEWEST_DIGITS, MOST_DIGITS)
    exact = (n for n in counts if all(abs(float(f"{tick:.{n}g}") - tick) <= near for tick in ticks))
    return next(exact, MOST_DIGITS)

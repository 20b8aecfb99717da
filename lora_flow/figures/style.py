"""The look of all pictures: fonts and colours, panels with letters, bands over seeds, the rounding floor, legends."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from lora_flow.checks import kind, require
from lora_flow.figures import written
from lora_flow.storage.blocks import blockwise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.dpi": 200,
    "lines.linewidth": 1.4,
}
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # Okabe and Ito's palette
OWN_STYLES: dict[str, Any] = {"gaussian": "-", "spectral": "--", "lora-one": ":"}
OTHER_STYLES: tuple[Any, ...] = ("-.", (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3)), (0, (8, 1, 1, 1)), (0, (1, 4)))
ZERO = 1e-40  # stands in for an exact zero on a logarithmic axis
SPREADS = {"quartiles": (0.25, 0.5, 0.75), "range": (0.0, 0.5, 1.0)}


@contextlib.contextmanager
def panels(
    rows: int,
    columns: int,
    height: float,
    width: float = written.WIDTHS["page"],
    look: Mapping[str, Any] | None = None,
    **how: Any,
) -> Iterator[tuple[Figure, Any]]:
    """A figure and its axes, `(rows, columns)`, to be drawn within the context, in the style of all pictures.

    Where pictures are to be as wide as a column (`lora_flow.figures.written.drawn_as`), one panel stands below the
    other.

    **Arguments:** the number of `rows` and `columns`; `height` and `width` in inches, on a page; `look`, matplotlib's
    settings that differ from `STYLE`; any argument of `matplotlib.pyplot.subplots` besides.
    """
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    from lora_flow.figures.ticks import label_ticks

    with mpl.rc_context(STYLE | dict(look or {})):
        if written.in_column():
            figure, axes = written.stacked(rows, columns, height, how)
        else:
            size = (width, height)
            figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **how)
        yield figure, axes
        if written.in_column():
            written.label_all(axes)
        for ax in axes.flat:
            label_ticks(ax)


def letters(axes: Any) -> None:
    """(a), (b), ... before the titles."""
    for ax, letter in zip(axes.flat, "abcdefghijkl", strict=False):
        ax.set_title(f"({letter}) {ax.get_title()}" if ax.get_title() else f"({letter})", loc="left")
        ax.set_title("", loc="center")


def axes_or_new(ax: Axes | None) -> Axes:
    """The axes, or those of a new figure for None."""
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

    require(ax is None or isinstance(ax, Axes), "ax", "be one matplotlib.axes.Axes, or None", kind(ax))
    return plt.subplots(layout="constrained")[1] if ax is None else ax


def shades(count: int, until: float = 0.85, of: str = "viridis") -> Any:
    """As many colours, `(count, 4)`, from dark to light, in the order of what they stand for."""
    import matplotlib as mpl

    return mpl.colormaps[of](np.linspace(0.0, until, count))


def line_styles(dataset: xr.Dataset) -> dict[str, Any]:
    """A line style for every initialisation of a dataset."""
    others = itertools.cycle(OTHER_STYLES)
    return {str(init): OWN_STYLES.get(str(init)) or next(others) for init in dataset["init"].values}


class Mark(NamedTuple):
    """How a curve is drawn, and its name in the legend."""

    label: str
    style: Mapping[str, Any]


def keys(marks: Iterable[Mark]) -> list[Line2D]:
    """The handles of a legend."""
    from matplotlib.lines import Line2D

    return [Line2D([], [], label=mark.label, **{**mark.style, "markevery": None}) for mark in marks]


def quantiles(values: xr.DataArray, log: bool, floor: float | None = None, spread: str = "quartiles") -> np.ndarray:
    """Lower end, median and upper end of the draws over `seed`, `(3, x)`; lanes that failed are left out.

    The ends are the quartiles, or the least and the largest draw where `spread` is "range". Quantiles are values of
    draws, or lie between two neighbouring ones, so they stay within the quantity's range; a mean plus or minus a
    standard deviation may not. Between two draws they are interpolated in the logarithm for a logarithmic axis. A value
    below `floor` counts as `floor`.
    """

    def of_block(block: xr.Dataset) -> xr.Dataset:
        draws = block["_values"].transpose("seed", ...)
        shown = np.array(draws.values, np.result_type(draws.dtype, np.float32))  # a copy, changed in place
        if floor is not None:
            np.maximum(shown, floor, out=shown)
        if log:
            np.log10(np.maximum(shown, ZERO, out=shown), out=shown)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)  # no draw has finished: nothing is drawn
            known = not np.isnan(shown).any()  # then there is a way that is ten times as fast
            found = (np.quantile if known else np.nanquantile)(shown, SPREADS[spread], axis=0)
        return xr.Dataset({"_quantiles": (("_quantile", *draws.dims[1:]), found)})

    found = blockwise(of_block, values.to_dataset(name="_values"), ("seed",))["_quantiles"].values
    return 10**found if log else found


def band(values: xr.DataArray, ax: Axes, floor: float | None = None, spread: str = "quartiles", **style: Any) -> None:
    """The median over seeds as a line, and what `quantiles` takes from `spread` as a band, over the other dimension.

    Set the scales of the axes first. The axes end with the longest curve.
    """
    (along,) = (dim for dim in values.dims if dim != "seed")
    low, middle, high = quantiles(values, ax.get_yscale() == "log", floor, spread)
    x = values[along].values
    ax.plot(x, middle, **style)
    ax.fill_between(x, low, high, color=style.get("color"), alpha=0.25, linewidth=0)
    end = max(x[-1], ax.get_xlim()[1]) if ax.lines[:-1] else x[-1]
    if end > x[0]:
        ax.set_xlim(x[0], end)


def mark_rounding(ax: Axes, floor: float, losses: Sequence[Line2D] | None = None) -> None:
    """A line at the rounding floor where a loss comes down to it; the axes end below it. By default all curves are."""
    curves = ax.lines if losses is None else losses
    shown = [np.asarray(line.get_ydata(), float) for line in curves]
    lowest = min((float(np.nanmin(y)) for y in shown if np.isfinite(y).any()), default=np.inf)
    if not lowest <= 1.01 * floor:  # nor where nothing has run, and the floor is NaN
        return
    ax.axhline(floor, color="0.45", linestyle=":", linewidth=0.9, zorder=0.5)
    ax.annotate(
        "rounding", (0.0, floor), xycoords=("axes fraction", "data"), xytext=(3, -2), textcoords="offset points",
        va="top", fontsize="x-small", color="0.35",
    )  # fmt: skip
    ax.set_ylim(bottom=floor / 1e3)

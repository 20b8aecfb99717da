"""How pictures are written: in which formats, and as wide as a page or as a column of one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_flow.checks import require, require_choice
from lora_flow.storage.made import FORMATS
from lora_flow.storage.remote import Place
from lora_flow.storage.swap import appearing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTHS = {"page": 7.2, "column": 3.4}  # inches
LEAST = 2.1  # inches, the height of a panel in a column
# Fonts as outlines that a journal takes (Type 42), letters of an SVG as shapes; and the same bytes each time.
EMBEDDED: dict[Any, Any] = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "lora_flow"}
UNDATED: dict[str, dict[str, Any]] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


class Asked(NamedTuple):
    """The formats beside PNG, and the width by its name."""

    formats: tuple[str, ...] = ()
    width: str = "page"


_PLAIN = Asked()
_ASKED: ContextVar[Asked] = ContextVar("asked", default=_PLAIN)


@contextlib.contextmanager
def drawn_as(formats: Sequence[str] = ("png",), width: str = "page") -> Iterator[None]:
    """Within, pictures are drawn so wide and written in these formats too; PNG they always are.

    **Raises:** `InputError` for a format other than png, pdf and svg, and a width other than page and column.
    """
    require(len(formats) > 0, "format", f"name one or several of {', '.join(FORMATS)}", "none")
    for one in formats:
        require_choice("format", one, FORMATS)
    require_choice("width", width, WIDTHS)
    before = _ASKED.set(Asked(tuple(one for one in FORMATS[1:] if one in formats), width))
    try:
        yield
    finally:
        _ASKED.reset(before)


def picture_lines(pictures: Sequence[Any]) -> list[str]:
    """A line for each picture that was written, by the paths of the PNGs."""
    beside = "".join(f", .{one}" for one in _ASKED.get().formats)
    return [f"picture: {picture}{beside}" for picture in pictures]


def in_column() -> bool:
    """Whether pictures are to be as wide as a column."""
    return _ASKED.get().width == "column"


def write(figure: Figure, folder: Place, name: str) -> Place:
    """Writes one picture in all the formats asked for, and those that the folder has it in; returns the PNG's path."""
    import matplotlib as mpl

    if in_column():
        _narrow_legends(figure)
    extra: list[str] = [
        one for one in FORMATS[1:] if one in _ASKED.get().formats or (folder / f"{name}.{one}").is_file()
    ]
    with mpl.rc_context(EMBEDDED):
        for kind in ("png", *extra):
            with appearing(folder / f"{name}.{kind}") as file:
                figure.savefig(file, format=kind, metadata=UNDATED[kind])
    return folder / f"{name}.png"


def stacked(rows: int, columns: int, height: float, how: dict[str, Any]) -> tuple[Figure, Any]:
    """A figure as wide as a column, one panel below the other as they are read, and its axes as `(rows, columns)`."""
    import matplotlib.pyplot as plt

    how = dict(how)
    shared = {which: how.pop(f"share{which}", False) for which in "xy"}
    each = max(LEAST, 0.9 * height / rows)
    size = (WIDTHS["column"], rows * columns * each)
    figure, axes = plt.subplots(rows * columns, 1, figsize=size, squeeze=False, layout="constrained", **how)
    axes = axes.reshape(rows, columns)
    for i in range(rows):
        for j in range(columns):
            for which, group in shared.items():
                first = axes[_first(group, i, j)]
                if group not in (False, "none") and first is not axes[i, j]:
                    getattr(axes[i, j], f"share{which}")(first)
    return figure, axes


def label_all(axes: Any) -> None:
    """In a column every panel has both labels: those that stood for a row or a column of panels are repeated."""
    rows, columns = axes.shape
    for i in range(rows):
        for j in range(columns):
            ax: Axes = axes[i, j]
            left = [axes[i, k].get_ylabel() for k in range(j, -1, -1)]
            below = [axes[k, j].get_xlabel() for k in range(i, rows)]
            ax.set(ylabel=next(filter(None, left), ""), xlabel=next(filter(None, below), ""))
            ax.tick_params(labelleft=True, labelbottom=True)


def _first(group: Any, i: int, j: int) -> tuple[int, int]:
    """The panel whose axis another one shares."""
    return (i if group == "row" else 0, j if group == "col" else 0)


def _narrow_legends(figure: Any) -> None:
    """Puts legends beside the panels below them, and gives each fewer columns until it is no wider than the figure."""
    for legend in figure.legends:
        if legend._outside_loc in ("left", "right"):
            legend.set_loc("outside lower center")
            _arrange(legend, 4)
    figure.draw_without_rendering()
    wide = figure.bbox.width
    for legend in (*figure.legends, *(ax.legend_ for ax in figure.axes if ax.legend_)):
        while legend.get_window_extent().width > 0.97 * wide and legend._ncols > 1:
            _arrange(legend, min(legend._ncols, len(legend.get_texts())) - 1)
            figure.draw_without_rendering()


def _arrange(legend: Any, columns: int) -> None:
    """Puts a legend's entries into so many columns, for which matplotlib has no public way once it is made."""
    title, names = legend.get_title().get_text(), [text.get_text() for text in legend.get_texts()]
    legend.set_ncols(columns)
    legend._init_legend_box(legend.legend_handles, names)
    legend._legend_box.set_offset(legend._findoffset)
    legend.set_title(title or None)

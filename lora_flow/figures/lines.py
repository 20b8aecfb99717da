"""The common parts of the pictures of studies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.lines import Line2D


def letters(axes: Any) -> None:
    """(a), (b), ... before the titles."""
    for ax, letter in zip(axes.flat, "abcdefgh", strict=False):
        ax.set_title(f"({letter}) {ax.get_title()}" if ax.get_title() else f"({letter})", loc="left")
        ax.set_title("", loc="center")


def keys(styles: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> list[Line2D]:
    """The handles of a legend for styles by name."""
    from matplotlib.lines import Line2D

    return [Line2D([], [], label=labels[name], **{**style, "markevery": None}) for name, style in styles.items()]

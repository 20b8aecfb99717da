"""What may be wrong with a picture: clipped or overlapping text, bands beyond limits, ticks, legends, colours."""

import itertools

import matplotlib as mpl
import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.text import Text

# What people without one kind of cones see of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
COLOUR_BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
APART = 9.0  # CIE76 distance below which two colours beside each other are taken for one


def faults(figure):
    """A line for each fault; nothing of a picture that may be published."""
    figure.draw_without_rendering()
    axes = [ax for ax in figure.axes if ax.get_visible()]
    found = [*clipped(figure), *overlapping(figure, axes)]
    for i, ax in enumerate(axes):
        name = ax.get_title(loc="left") or ax.get_title() or f"axes {i}"
        for fault in (*ticks(ax), *bands(ax), *unnamed(figure, ax), *alike(ax)):
            found.append(f"{name}: {fault}")
    return found


def clipped(figure):
    """Whatever reaches beyond the paper."""
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    beyond = {"left": -box.x0, "right": box.x1 - width, "bottom": -box.y0, "top": box.y1 - height}
    return [f"{by:.3f} inches are cut off on the {side}" for side, by in beyond.items() if by > 0.01]


def overlapping(figure, axes):
    """Titles, labels of axes, tick labels and legends that lie on each other."""
    boxes = []
    for ax in axes:
        texts = [ax.title, ax._left_title, ax._right_title, ax.xaxis.label, ax.yaxis.label]
        boxes += [(one.get_text(), one.get_window_extent()) for one in texts if one.get_visible() and one.get_text()]
        for axis in (ax.xaxis, ax.yaxis):
            boxes += [(label.get_text(), label.get_window_extent()) for label in shown_labels(axis)]
    boxes += [(f"legend {text.get_text()}", text.get_window_extent()) for text in legend_texts(figure, axes)]
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        up = min(a.y1, b.y1) - max(a.y0, b.y0)
        if across > 1 and up > 1:
            yield f"{one!r} lies on {two!r}"


def legend_texts(figure, axes):
    legends = [*figure.legends, *(ax.legend_ for ax in axes if ax.legend_)]
    return [text for legend in legends for text in legend.findobj(Text) if text.get_text()]


def shown_labels(axis):
    """The labels of the ticks that are in view."""
    low, high = sorted(axis.get_view_interval())
    for tick in axis.get_major_ticks():
        inside = low - 1e-9 * abs(low) <= tick.get_loc() <= high + 1e-9 * abs(high)
        if inside and tick.label1.get_visible() and tick.label1.get_text():
            yield tick.label1


def ticks(ax):
    """Too few or too many labels, and decades that are counted in steps that nobody counts in."""
    for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
        if not axis.get_visible() or not ax.axison:
            continue
        places = sorted(tick.get_loc() for tick in axis.get_major_ticks())
        low, high = sorted(axis.get_view_interval())
        inside = [one for one in places if low - 1e-9 * abs(low) <= one <= high + 1e-9 * abs(high)]
        labelled = len(list(shown_labels(axis)))
        if labelled and not 2 <= labelled <= 15 and not categorical(axis):
            yield f"{labelled} labels on {name}"
        if axis.get_scale() == "log" and len(inside) > 2 and labelled:
            steps = np.diff(np.log10(inside))
            if steps.max() - steps.min() < 1e-6 and steps[0] > 1.5 and round(steps[0]) not in (2, 3, 4, 5, 10, 20, 50):
                yield f"ticks every {steps[0]:.3g} decades on {name}"


def categorical(axis):
    """Whether labels are names, of which there may be any number."""
    return isinstance(axis.get_major_locator(), mpl.ticker.FixedLocator)


def bands(ax):
    """Bands whose curve is within the axes, and whose own ends are not."""
    low, high = sorted(ax.get_ylim())
    log = ax.get_yscale() == "log"
    scale = (lambda y: np.log10(np.maximum(y, 1e-300))) if log else np.asarray
    bottom, top = scale(low), scale(high)
    for band in (one for one in ax.collections if isinstance(one, PolyCollection) and one.get_paths()):
        y = np.concatenate([np.asarray(path.vertices)[:, 1] for path in band.get_paths()])
        y = scale(y[np.isfinite(y)])
        over = max((y.max() - top) if y.size else 0, (bottom - y.min()) if y.size else 0) / (top - bottom)
        lines = [scale(np.asarray(line.get_ydata(), float)) for line in ax.lines if np.size(line.get_ydata()) > 2]
        beyond = any(np.nanmax(one) > top or np.nanmin(one) < bottom for one in lines if np.isfinite(one).any())
        if over > 0.02 and not beyond:
            yield f"a band ends {over:.0%} of the height beyond the axes"


def marks(artist):
    """How a line looks: colour, dashes and marker."""
    dashes = artist.get_linestyle()
    dashes = (
        dashes if dashes in ("None", "", " ") else artist._unscaled_dash_pattern
    )  # "--" stands for any of one's own
    return (
        mpl.colors.to_hex(artist.get_color()),
        "None" if dashes in ("None", "", " ") else str(dashes),
        artist.get_marker(),
    )


def curves(ax):
    return [
        line
        for line in ax.lines
        if line.get_visible()
        and line.get_transform() == ax.transData
        and np.isfinite(np.asarray(line.get_ydata(), float)).sum() > 2
    ]


def unnamed(figure, ax):
    """Colours of curves that no legend and no label names, where a panel has several and nothing says how many."""
    colours = {marks(line)[0] for line in curves(ax)}
    if len(colours) < 2:
        return
    legends = [*figure.legends, *(one.legend_ for one in figure.axes if one.legend_)]
    told = " ".join(text.get_text() for legend in legends for text in legend.findobj(Text))
    if " of " in told and "shown" in told:
        return
    named = set()
    for legend in legends:
        for handle in legend.legend_handles:
            for get in ("get_color", "get_facecolor", "get_edgecolor"):
                value = getattr(handle, get, lambda: None)()
                for one in np.atleast_2d(value) if value is not None and not isinstance(value, str) else [value]:
                    if one is not None and (isinstance(one, str) or len(one)):
                        named.add(mpl.colors.to_hex(one))
    grey = {one for one in colours if len(set(mpl.colors.to_rgb(one))) == 1}  # guides, which captions tell of
    for colour in sorted(colours - named - grey):
        yield f"no legend names {colour}"


def alike(ax):
    """Pairs of curves with the same dashes and marker whose colours some people cannot tell apart."""
    looks = {marks(line) for line in curves(ax)}
    for (one, dashes, marker), (two, *same) in itertools.combinations(sorted(looks), 2):
        if [dashes, marker] == same and one != two:
            for kind, distance in distances(one, two).items():
                if distance < APART:
                    yield f"{one} and {two} are alike to eyes with {kind} ({distance:.1f})"


def distances(one, two):
    """How far apart two colours are to each kind of eyes."""
    return {
        kind: float(np.linalg.norm(lab(one, matrix) - lab(two, matrix)))
        for kind, matrix in {"all cones": np.eye(3), **COLOUR_BLIND}.items()
    }


def lab(colour, matrix):
    rgb = np.array(mpl.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(matrix) @ linear, 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = np.asarray(to_xyz) @ seen / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

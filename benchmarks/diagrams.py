"""Work-precision diagrams: what a decade of accuracy costs each peer."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.tables import OURS
from benchmarks.tasks import ENOUGH
from lora_flow.figures.style import STYLE

# Okabe and Ito's palette without black, which is ours
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999")
MARKERS = "osD^"
EXACT = 1e-6  # errors below it, of the peer that is the reference among them, are drawn there


def work_precision(job: dict[str, Any], ax: Axes | None = None) -> Axes:
    """Error on x, seconds on y, one line a peer along its ladder; what lies left of the dashed line is right."""
    ax = plt.gca() if ax is None else ax
    others = 0
    for name, row in job["peers"].items():
        points = [(max(decades, EXACT), took) for _, decades, took in row.get("points", []) if decades < 1e3]
        if not points:
            continue
        if name.startswith(OURS):
            look: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 9, "zorder": 3}
        else:
            colour, marker = COLOURS[others % len(COLOURS)], MARKERS[others // len(COLOURS)]
            look = {"color": colour, "marker": marker, "markersize": 4}
            others += 1
        ax.plot(*zip(*sorted(points), strict=True), label=name, **look)
    ax.axvline(ENOUGH, color="0.5", linestyle="--", linewidth=0.8)
    ax.set(xscale="log", yscale="log", xlabel="worst error (decades of loss)", ylabel="seconds, warm")
    ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return ax


def save(job: dict[str, Any], title: str, path: Any) -> None:
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(7.0, 3.6), layout="constrained")
        work_precision(job, ax).set_title(title, loc="left")
        figure.savefig(path)
        plt.close(figure)

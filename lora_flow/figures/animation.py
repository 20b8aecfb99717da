"""An animation of one run: singular vectors turn to the task, singular values grow, and the loss falls."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_flow.checks import as_path, kind, require, require_flag, require_integer, require_number
from lora_flow.dynamics.solve import Trajectory
from lora_flow.figures.motion import Motion, frames_of, motion_of
from lora_flow.figures.style import BLUE, GREEN, ORANGE, PURPLE, ZERO, letters, panels
from lora_flow.problems.base import Problem
from lora_flow.runtime.progress import Progress
from lora_flow.storage.swap import appearing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (BLUE, ORANGE, GREEN, PURPLE)  # of layers
FAINT = 0.35  # opacity of the second singular value and of those after it
PALETTE = 64  # colours of a GIF
DPI = 110
REST = 2000  # milliseconds that the last frame of a GIF stays

Update = Callable[[int], None]


def animate(
    problem: Problem,
    trajectory: Trajectory,
    path: str | os.PathLike[str],
    *,
    title: str = "",
    frames: int = 100,
    seconds: float = 8.0,
    progress: bool = True,
) -> Path:
    r"""Draws an animation of one run, as a GIF or, where ffmpeg is installed, as MP4.

    Of every layer it shows the left singular vectors of Z = [B; A^T] as arrows, at their angle to the direction that
    the layer aligns with (gamma of arXiv 2503.06982) and as long as their singular values over the largest; the
    singular values over time; and the loss, down to its rounding floor.

    **Arguments:**

    - `problem`: that of the run. For a start that is subtracted from the weights it is `Offset(problem, start)`.
    - `trajectory`: of `solve(problem, adapters, ..., save_adapters=True)`, one lane.
    - `path`: the file, whose name ends in .gif or .mp4; it is replaced.
    - `title`: what stands above it, before the time.
    - `frames`: at most so many, of the saved times: more where more moves. `seconds`: the length.
    - `progress`: whether it is shown.

    **Returns:** the path.

    **Raises:** `InputError` for another ending, for .mp4 without ffmpeg, and for what `solve` has not returned.
    """
    path = as_path("path", path)
    require_integer("frames", frames, "lie between 2 and 1000", 2, 1000)
    require_number("seconds", seconds, "be positive and at most 600", lambda length: (length > 0) & (length <= 600))
    require_flag("progress", progress)
    require(isinstance(title, str), "title", "be a text", kind(title))
    must = "end in .gif or .mp4"
    require(path.suffix in (".gif", ".mp4"), "path", must, path.suffix or "no ending")
    require(path.suffix == ".gif" or has_ffmpeg(), "path", "end in .gif where ffmpeg is not installed", path.suffix)
    content = animation(motion_of(problem, trajectory), path.suffix, title, frames, seconds, progress)
    with appearing(path) as file:
        file.write(content)
    return path


def animation(motion: Motion, suffix: str, title: str, frames: int, seconds: float, progress: bool) -> bytes:
    """The file of such an animation, of the kind that `suffix` says."""
    places = frames_of(motion, frames)
    with panels(1, 3, height=2.7) as (figure, axes):
        updates = [_compass(axes[0, 0], motion), _sizes(axes[0, 1], motion), _loss(axes[0, 2], motion)]
        letters(axes)
        head = figure.suptitle(" ", fontsize="medium")
        _legend(figure, axes[0, 1])
    figure.canvas.draw()
    figure.set_layout_engine("none")  # so that nothing but what moves is another from frame to frame
    with (
        contextlib.ExitStack() as held,
        tempfile.TemporaryDirectory() as folder,
        Progress(len(places), "frames", shown=progress, what="drawing") as bar,
    ):
        held.callback(_close, figure)
        file, writer = Path(folder, f"motion{suffix}"), _writer(suffix, len(places) / seconds)
        with writer.saving(figure, str(file), DPI):
            for place in places:
                head.set_text(", ".join(filter(None, [title, f"{motion.clock.at}{motion.times[place]:.3g}"])))
                for update in updates:
                    update(int(place))
                writer.grab_frame()
                bar.update()
        return file.read_bytes()


def has_ffmpeg() -> bool:
    """Whether a film can be made."""
    from matplotlib.animation import writers

    return bool(writers.is_available("ffmpeg"))


def _close(figure: Figure) -> None:
    import matplotlib.pyplot as plt

    plt.close(figure)


def _compass(ax: Axes, motion: Motion) -> Update:
    """Arrows at the angles of the singular vectors; of two layers the second's point down."""
    way = [1, -1] if len(motion.angle) == 2 else [1] * len(motion.angle)
    turn = np.linspace(-np.pi / 2 if -1 in way else 0, np.pi / 2, 91)
    ax.plot(np.cos(turn), np.sin(turn), color="0.75", linewidth=0.8)
    ax.plot([0, 1.08], [0, 0], color="0.4", linewidth=0.8, linestyle=":")
    ax.annotate("task", (1.1, 0), va="center", fontsize="small")
    ax.set(xlim=(-0.1, 1.35), ylim=(-1.1 if -1 in way else -0.1, 1.1), title="singular vectors of Z", aspect="equal")
    ax.axis("off")
    arrows = []
    for sign, layer, angle in zip(way, range(len(way)), motion.angle, strict=True):
        for mode in range(angle.shape[1]):
            (arrow,) = ax.plot(
                [], [], color=COLOURS[layer % len(COLOURS)], linewidth=_width(layer, mode),
                alpha=1 if mode == 0 else FAINT, marker="o", markersize=4 if mode == 0 else 2.5, markevery=[1],
            )  # fmt: skip
            arrows.append((arrow, layer, mode, sign))

    def update(place: int) -> None:
        for arrow, layer, mode, sign in arrows:
            angle, sigma = motion.angle[layer][place], motion.sigma[layer][place]
            length = sigma[mode] / sigma[0] if sigma[0] > 0 else 0.0
            x, y = length * np.cos(angle[mode]), sign * length * np.sin(angle[mode])
            arrow.set_data([0, x], [0, y])

    return update


def _width(layer: int, mode: int) -> float:
    """Thinner for each further layer, whose arrow may lie upon those of the others."""
    return max(1.4, 3.4 - 1.6 * layer) if mode == 0 else 1.2


def _sizes(ax: Axes, motion: Motion) -> Update:
    ax.set(xlabel=motion.clock.axis, title="singular values of Z", yscale="log")
    curves = [
        _curve(ax, motion.times, np.where(sigma[:, mode] > 0, sigma[:, mode], np.nan), color=COLOURS[i % len(COLOURS)],
               alpha=1 if mode == 0 else FAINT, label=f"layer {i + 1}" if mode == 0 else "")
        for i, sigma in enumerate(motion.sigma) for mode in range(sigma.shape[1])
    ]  # fmt: skip
    return lambda place: [curve(place) for curve in curves][-1]


def _loss(ax: Axes, motion: Motion) -> Update:
    ax.set(xlabel=motion.clock.axis, title="loss L", yscale="log")
    update = _curve(ax, motion.times, np.maximum(motion.loss, ZERO), color="0.15")
    if motion.loss.min() <= motion.floor:
        ax.axhline(motion.floor, color="0.45", linestyle=":", linewidth=0.9, zorder=0.5)
        ax.annotate("rounding", (0, motion.floor), xycoords=("axes fraction", "data"), xytext=(3, 3),
                    textcoords="offset points", fontsize="x-small", color="0.35")  # fmt: skip
    return update


def _curve(ax: Axes, times: np.ndarray, values: np.ndarray, **style: Any) -> Update:
    """A curve up to a time, with a point at its end, on axes that are those of the whole."""
    ax.plot(times, values, color=style["color"], alpha=0.12, linewidth=1)
    ax.set_xlim(times[0], times[-1])
    (line,) = ax.plot([], [], **style)
    (point,) = ax.plot([], [], marker="o", markersize=3.5, color=style["color"], alpha=style.get("alpha", 1))

    def update(place: int) -> None:
        line.set_data(times[: place + 1], values[: place + 1])
        point.set_data([times[place]], [values[place]])

    return update


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))


def _writer(suffix: str, rate: float) -> Any:
    from matplotlib.animation import FFMpegWriter, PillowWriter

    class Gif(PillowWriter):
        """In the colours of the last frame, which has all that there are: then only what moves is stored."""

        def finish(self) -> None:
            from PIL import Image

            frames = [frame.convert("RGB") for frame in self._frames]  # type: ignore[attr-defined]
            palette = frames[-1].quantize(PALETTE, dither=Image.Dither.NONE)
            few = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
            ends = [10 * round(100 * i / rate) for i in range(len(few))]  # a GIF counts hundredths of a second
            lasts = [*(end - begin for begin, end in itertools.pairwise(ends)), REST]
            few[0].save(self.outfile, save_all=True, append_images=few[1:], duration=lasts, loop=0, optimize=True)

    each: Any = rate  # not a whole number
    return Gif(fps=each) if suffix == ".gif" else FFMpegWriter(fps=each, codec="h264")

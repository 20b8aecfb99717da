"""`lora-flow animate`: one lane of a run as it moves."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from lora_flow.checks import require, require_choice, require_integer, require_number
from lora_flow.runtime.start import start_jax
from lora_flow.settings import from_table
from lora_flow.storage.folder import read_settings
from lora_flow.storage.locks import locked_if_free
from lora_flow.sweeps.from_python import is_from_python


@dataclasses.dataclass(frozen=True)
class Animate:
    """Animate one lane of a run: singular vectors turn to the task, singular values grow, and the loss falls.

    A run folder does not hold the adapters, so the lane is solved again, from the stored settings, and its loss is
    compared with the stored one. The file goes to figures/ of the folder. From Python: lora_flow.figures.animate.

    The lane is named by the values of its axes, of which those that are left out are the first:

    lora-flow animate runs/demo --lane init=gaussian alpha=1e-4 seed=3
    """

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """The run folder, or its URL in an object store."""
    lane: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="AXIS=VALUE ...", help_behavior_hint="(default: first)")
    ] = ()
    """The lane, such as alpha=1e-4 seed=0. Axes: init, side, alpha, rank, seed, and those of problems and descents."""
    format: str = "gif"
    """The kind of file, gif or mp4. The latter needs ffmpeg."""
    frames: int = 100
    """At most so many frames, more of them where more moves."""
    seconds: float = 8.0
    """The length."""

    def run(self) -> int:
        require_choice("format", self.format, ("gif", "mp4"))
        require_integer("frames", self.frames, "lie between 2 and 1000", 2, 1000)
        require_number(
            "seconds", self.seconds, "lie between 0.1 and 600", lambda length: (length >= 0.1) & (length <= 600)
        )
        table = read_settings(self.out)
        require(
            not is_from_python(table), f"'{self.out}'", "be a run that a command has started", "one of Python's sweep"
        )
        settings = from_table(table, f"{self.out}/settings.toml")
        import matplotlib as mpl

        mpl.use("Agg")
        start_jax(settings.precision, settings.devices)
        from lora_flow.experiments.animate import animate_lane
        from lora_flow.figures.animation import has_ffmpeg

        require(self.format == "gif" or has_ffmpeg(), "format", "be gif where ffmpeg is not installed", self.format)
        with locked_if_free(self.out):
            lines = animate_lane(self.out, settings, self.lane, f".{self.format}", self.frames, self.seconds)
        print(*lines, sep="\n")
        return 0

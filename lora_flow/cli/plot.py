"""`lora-flow plot`, and the pictures and the report with which every other command ends."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import tyro

from lora_flow.cli.groups import Draws
from lora_flow.storage.locks import locked_if_free
from lora_flow.storage.remote import local_path


@dataclasses.dataclass(frozen=True)
class Plot(Draws):
    """Draw a run or figure again, and write its report.md: loss, alignment and phases for every side and rank.

    The pictures and report of an unfinished run show the stored part, and say so.

    For example: lora-flow plot runs/demo
    """

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """The run folder, or its URL in an object store."""

    def run(self) -> int:
        with locked_if_free(self.out):
            return self._draw()

    def _draw(self) -> int:
        from lora_flow_vision.folder import CHECK

        from lora_flow.advice.folder import ADVICE
        from lora_flow.design.fit_folder import FIT
        from lora_flow.design.folder import SEARCH
        from lora_flow.sensitivities.folder import SENSITIVITY

        if CHECK.owns(self.out):
            from lora_flow_vision.command import tell

            return tell(local_path("the run folder", self.out))
        if SENSITIVITY.owns(self.out):
            from lora_flow.cli.sensitivity import tell as tell_sensitivity

            return tell_sensitivity(self.out)
        if SEARCH.owns(self.out):
            from lora_flow.cli.optimise import tell as tell_search

            return tell_search(self.out)
        if FIT.owns(self.out):
            from lora_flow.cli.fit import tell as tell_fit

            return tell_fit(self.out)
        if ADVICE.owns(self.out):
            from lora_flow.cli.advise import tell as tell_advice

            return tell_advice(self.out)
        return draw(self.out, partial=True)


def draw(out: str, partial: bool = False) -> int:
    """Draws a folder's run or figure and writes its report, and says so; with `partial` an unfinished run too."""
    import matplotlib as mpl

    mpl.use("Agg")
    from lora_flow.experiments.present import present

    done = present(out, partial)
    print(*done.lines, sep="\n")
    for status, count in done.failed.items():
        print(f"lora-flow: {count} of {done.lanes} runs ended with status {status}", file=sys.stderr)
    return 1 if done.failed and sum(done.failed.values()) == done.lanes else 0

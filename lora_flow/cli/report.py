"""`lora-flow report`: the page of a run, to be looked at in a browser."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from lora_flow.storage.locks import locked_if_free


@dataclasses.dataclass(frozen=True)
class Report:
    """Make a run's report.html again: one file to open in a browser, which needs no server and no network.

    It shows the curves of every cell with their values, heat maps, a table of the cells that sorts and filters, the
    text and pictures of report.md, all settings, and the command that repeats the run. Every command that draws a run
    makes it too, where the extra `report` is installed: pip install 'lora-flow[report]'.

    For example: lora-flow report runs/demo
    """

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """The run folder, or its URL in an object store."""

    def run(self) -> int:
        from lora_flow.experiments.present import present_page

        with locked_if_free(self.out):
            print(present_page(self.out))
        return 0

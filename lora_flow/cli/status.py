"""`lora-flow status`: the progress of a run."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class Status:
    """Say how far a run, a figure or an image check is, whether a process is at work on it, and how to continue.

    The command may be used while the run is at work, and leaves the run alone.

    For example: lora-flow status runs/demo
    """

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """The run folder, or its URL in an object store."""

    def run(self) -> int:
        from lora_flow.cli.status_text import status

        print(status(self.out))
        return 0

"""`lora-flow sweep --part`: a run that several processes solve, which share nothing but its folder."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_flow.checks import require
from lora_flow.runtime.interrupts import whole
from lora_flow.storage.locks import InUse, locked
from lora_flow.storage.remote import run_path

if TYPE_CHECKING:
    from lora_flow.sweeps.run import Run

_PBS_PARTS = 64  # PBS does not tell how many jobs an array has; a wrong number only changes who does what


def part_of(asked: str | None, environment: Mapping[str, str]) -> tuple[int, int] | None:
    """The number of a part and of all parts, as asked for or as a job array's; None where there is one process."""
    if asked == "none":
        return None
    if asked is None:
        return _of_array(environment)
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", asked)
    part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    require(part < parts, "part", "be I/N with I from 0 to N - 1, such as 0/4, or none", asked)
    return part, parts


def _of_array(environment: Mapping[str, str]) -> tuple[int, int] | None:
    def number(name: str, otherwise: int = -1) -> int:
        told = environment.get(name, "")
        return int(told) if told.isdecimal() else otherwise

    task, count = number("SLURM_ARRAY_TASK_ID"), number("SLURM_ARRAY_TASK_COUNT")
    if task >= 0 and count > 0:
        return (task - number("SLURM_ARRAY_TASK_MIN", 0)) % count, count
    task = number("PBS_ARRAY_INDEX")
    return None if task < 0 else (task % _PBS_PARTS, _PBS_PARTS)


def solve_part(out: str, run: Run, part: tuple[int, int], go_on: str) -> int:
    """Solves a part, and what the others have left; the process that leaves last draws the run."""
    from lora_flow.cli.plot import draw
    from lora_flow.sweeps import run as runs
    from lora_flow.sweeps.executors import Part

    path = run_path("out", out)
    with contextlib.ExitStack() as held:
        with whole(f"nothing is stored yet, continue with: {go_on}"):
            folder = held.enter_context(runs.share_run(path, run))
        runs.run(folder, run[1], Part(*part), go_on=go_on)
    try:
        with locked(path):
            return draw(out)
    except InUse:
        print(f"part {part[0]} of {part[1]} is done; the process that ends last draws the run")
        return 0

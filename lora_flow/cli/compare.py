"""`lora-flow compare`: several runs beside each other."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from lora_flow.checks import require
from lora_flow.cli.groups import Draws
from lora_flow.storage.locks import locked
from lora_flow.storage.remote import local_path, run_path
from lora_flow.storage.swap import is_generated


@dataclasses.dataclass(frozen=True)
class Compare(Draws):
    """Show several runs on one page and in one figure, and say in which settings they differ.

    The folder gets compare.md, figures/compare.png and, where the extra `report` is installed, compare.html, on which
    the curves of one cell in all the runs lie over each other. The figure has the loss of each run's best cell.

    For example: lora-flow compare runs/plain runs/adam --out runs/compared
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folders, two or more, or their URLs in an object store."""
    out: Annotated[str, tyro.conf.arg(metavar="PATH")] = "runs/compared"
    """The folder; the files of an earlier comparison there are replaced."""

    def run(self) -> int:
        from lora_flow.experiments.compare import MADE, compare

        folder = local_path("out", self.out)
        require(len(self.runs) > 1, "runs", "be two or more run folders", ", ".join(self.runs) or "none")
        different = len({str(run_path("a run", one).absolute()) for one in self.runs}) == len(self.runs)
        require(different, "runs", "differ", ", ".join(self.runs))
        found = folder.iterdir() if folder.is_dir() else ()
        held = {one.name for one in found if not is_generated(one.name)}
        free = not folder.exists() or (folder.is_dir() and held <= {*MADE, "figures"})
        must, got = "be a new folder or one of an earlier comparison", f"'{folder}', which holds something else"
        require(free, "out", must, got)
        import matplotlib as mpl

        mpl.use("Agg")
        told = compare(self.runs)  # what can be refused is refused before anything is written
        with locked(folder):
            print(*told.write(folder), sep="\n")
        return 0

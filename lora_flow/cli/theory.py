"""`lora-flow theory`: every claim, predicted and measured."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated

import tyro

from lora_flow.checks import require
from lora_flow.cli.groups import Draws
from lora_flow.runtime.start import start_jax
from lora_flow.storage.locks import locked
from lora_flow.storage.remote import local_path
from lora_flow.storage.swap import is_generated, write_atomically

MADE = ("theory.csv", "theory.md", "theory.html")


@dataclasses.dataclass(frozen=True)
class Theory(Draws):
    """Test theory against runs: every claim with its prediction, the measured value, and the verdict.

    The claims are those of Xu et al. (arXiv 2503.06982) and of the talk on that paper, of LoRA-One (arXiv 2502.01235),
    of Mu and Klabjan (arXiv 2512.18248), on Stable-LoRA (arXiv 2603.05204), on other flows and initialisations, on
    linear networks trained from scratch (Min et al. 2021, arXiv 2105.06351; Xu et al. 2023, AISTATS; Xu et al. 2025,
    arXiv 2505.11664), on symmetric factorisations (Mohammadi et al. 2024, arXiv 2411.15972), on large starts, on LoRA's
    scaling (arXiv 2606.12883), on an attention head (Duranthon et al. 2026, arXiv 2606.05899), on Muon (Kang et al.
    2026, arXiv 2602.06385), LoRA-Muon (Cesista et al. 2026, arXiv 2606.12921) and BaLoRA (Castin et al. 2026, arXiv
    2605.31484), and on continual learning. The command makes the runs for each. A formula that a paper prints wrongly
    is also tested as printed, and fails. The folder gets theory.csv, with a row for every case, theory.md,
    theory.html for a browser and figures/theory.png. The command takes about five minutes on two cores.

    For example: lora-flow theory --out runs/theory
    """

    out: Annotated[str, tyro.conf.arg(metavar="PATH")] = "runs/theory"
    """The folder; the files of an earlier check there are replaced."""
    seeds: int = 6
    """Number of random initialisations, which the intervals are over."""

    def run(self) -> int:
        folder = local_path("out", self.out)
        require(3 <= self.seeds <= 1000, "seeds", "lie between 3, for intervals, and 1000", self.seeds)
        held = {one.name for one in folder.iterdir() if not is_generated(one.name)} if folder.is_dir() else set()
        free = not folder.exists() or (folder.is_dir() and held <= {*MADE, "figures"})
        require(free, "out", "be a new folder or one of an earlier check", f"'{folder}', which holds something else")
        with locked(folder):  # or find out that it cannot be made before minutes are spent
            return self._check(folder)

    def _check(self, folder: Path) -> int:
        start_jax()
        import matplotlib as mpl

        mpl.use("Agg")
        from lora_flow.claims.check import HEADER, check, markdown, terminal_line, write_csv
        from lora_flow.claims.pictures import draw
        from lora_flow.figures.over_time import save_with_numbers
        from lora_flow.figures.written import picture_lines
        from lora_flow.pages.page import page

        lines = []
        print(HEADER, flush=True)
        for line in check(self.seeds):
            print(terminal_line(line), flush=True)
            lines.append(line)
        (picture,) = save_with_numbers({"theory": draw(self.seeds)}, folder / "figures")
        write_csv(lines, folder / "theory.csv")
        shown = "![Bounds, closed forms and levels over measured trajectories](figures/theory.png)"
        text = f"# Theory against runs\n\n{markdown(lines)}\n\n{shown}\n"
        write_atomically(folder / "theory.md", text)
        command = f"lora-flow theory --seeds {self.seeds} --out {shlex.quote(str(folder))}"
        write_atomically(folder / "theory.html", page(text, folder, command=command))
        print(f"table: {folder / 'theory.csv'}", f"report: {folder / 'theory.md'}", sep="\n")
        print(*picture_lines([picture]), f"page: {folder / 'theory.html'}", sep="\n")
        return 0

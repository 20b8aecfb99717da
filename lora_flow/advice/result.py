"""What `advise` finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import xarray as xr

from lora_flow.advice import told
from lora_flow.advice.choice import Cell, Confidence


@dataclasses.dataclass(frozen=True)
class Advice:
    """What to choose, and why.

    - `dataset`: over `init, size, rank` the scheme's own scale `alpha`; `loss`, over `time` too, as a share of that at
      the pretrained weights; `time_level`, its time to `level`, with the least and the most over seeds, `time_closed`
      by a closed form, and `time_begins`, to 0.9; the share `loss_start` at t = 0 and the least one, `loss_floor`;
      `norm`, ||Z||_F, `relative_size`, ||Z||_2 over a solution's, and `dead_directions`. Over `layer` what its gradient
      is like, and over `rank, layer` the layer's rank `ranks`, the share of its gradient's squared norm that it holds,
      `held`, and the share of its loss that it leaves, `floor`.
    - `recommended`: the cell, None where none comes to the level. `reason`, `assumptions`: in sentences.
    - `confidence`: "high", "middle" or "low", and why.
    - `translation`: what people set, in the theory's words; rows of a table. `command`: what makes or shows the start.
    """

    dataset: xr.Dataset
    recommended: Cell | None
    reason: str
    assumptions: tuple[str, ...]
    confidence: Confidence
    translation: tuple[tuple[str, ...], ...]
    command: str

    def table(self) -> str:
        """The tables over ranks, starts and sizes, in Markdown."""
        return told.tables(self.dataset, self.recommended, self.translation)

    def __str__(self) -> str:
        return "\n".join(self.short)

    @property
    def short(self) -> list[str]:
        """What is asked first: the choice and its reason, the confidence, and what makes it."""
        lines = [self.reason, f"Confidence {self.confidence}."]
        return [*lines, f"next: {self.command}"] if self.command else lines

    def report(self, links: Sequence[str] = ()) -> str:
        """The text of report.md, with links to pictures."""
        words = self.reason, str(self.confidence), self.command
        whole = told.tables(self.dataset, self.recommended, self.translation, None)
        return told.report(words, self.assumptions, links, whole)

"""The groups of flags that commands share. A command's help has those of its last base first, and its own behind."""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_flow import flags
from lora_flow.recipes import kinds


@dataclasses.dataclass(frozen=True)
class Pictures:
    """How pictures are written. Their fonts are embedded."""

    format: tuple[str, ...] = ("png",)
    """Formats: png, pdf or svg, or several. PNG is always written, as reports show it."""
    width: str = "page"
    """As wide as a page (7.2 inches) or as a column of one (3.4 inches, one panel below the other)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """A command that draws pictures."""

    pictures: Pictures = dataclasses.field(default_factory=Pictures)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnGrid:
    """A command on a grid of runs."""

    grid: flags.Runs = dataclasses.field(default_factory=flags.Runs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnProblem:
    """A command on a problem, with a group of flags for each kind."""

    problem: kinds.Trained = dataclasses.field(default_factory=kinds.Trained)
    aligned: kinds.Aligned = dataclasses.field(default_factory=kinds.Aligned)
    pretrained: kinds.Pretrained = dataclasses.field(default_factory=kinds.Pretrained)
    regression: kinds.Regression = dataclasses.field(default_factory=kinds.Regression)
    network: kinds.Network = dataclasses.field(default_factory=kinds.Network)
    symmetric: kinds.Symmetric = dataclasses.field(default_factory=kinds.Symmetric)
    attention: kinds.Attention = dataclasses.field(default_factory=kinds.Attention)

    @property
    def grouped(self) -> dict[str, Any]:
        """The flags of all groups by name, those of the command's own groups too, but for how pictures are written."""
        groups = (one for one in vars(self).values() if dataclasses.is_dataclass(one) and not isinstance(one, Pictures))
        return {name: value for group in groups for name, value in vars(group).items()}

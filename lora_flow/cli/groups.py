"""The groups of flags that commands share. A command's help has those of its last base first, and its own behind."""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_flow import flags
from lora_flow.recipes import kinds


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
        """The flags of all groups by name, those of the command's own groups too."""
        groups = filter(dataclasses.is_dataclass, vars(self).values())
        return {name: value for group in groups for name, value in vars(group).items()}

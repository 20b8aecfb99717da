"""What a command makes beside settings and results: reports and pictures, found by the patterns of their names."""

from __future__ import annotations

from lora_flow.storage.remote import RunPath, below

FORMATS = ("png", "pdf", "svg")  # of pictures


def pictures(*names: str) -> list[str]:
    """The patterns of pictures, in every format that they are written in."""
    return [f"figures/{name}.{kind}" for name in names for kind in FORMATS]


def found(path: RunPath, *patterns: str) -> list[str]:
    """What a folder has of these patterns, as names below it."""
    return [below(path, made) for pattern in patterns for made in path.glob(pattern)]

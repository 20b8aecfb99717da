"""How much memory there is, asked before anything is made that may be larger."""

from __future__ import annotations

import os

from lora_flow.checks import require


def memory() -> int:
    """The bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(name: str, needed: int, what: str) -> None:
    """Raises unless half of the memory holds so many bytes."""
    room = memory()
    must = f"leave what fits into half of the {room / 1e9:.0f} GB of memory"
    require(needed <= room / 2, name, must, f"{needed / 1e9:.3g} GB for {what}")

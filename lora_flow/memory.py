"""How much memory there is, and one line for what does not fit, before any of it is taken."""

from __future__ import annotations

import math
import os
from pathlib import Path

from lora_flow.checks import require

_GROUPS = (  # (limit, in use) of a control group, where a container or a batch system sets one
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free() -> float:
    """Bytes that may still be taken: what the system has available, or less where a limit is set; inf if unknown."""
    return min(_of_system(), *(_number(limit) - _number(used, 0.0) for limit, used in _GROUPS), _of_limit())


def require_memory(name: str, got: object, needed: int | float) -> None:
    """Raise unless `needed` bytes are free; `name` is the argument that asks for most of them."""
    room = free()
    must = f"be small enough for the {size(room)} of memory that are free"
    require(needed <= room, name, must, f"{got}, which takes {size(needed)}")


def size(count: int | float) -> str:
    """So many bytes, for people."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def _of_system() -> float:
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        try:
            return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        except (AttributeError, OSError, ValueError):
            return math.inf


def _of_limit() -> float:
    """`ulimit -v`, less what is in use."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        return math.inf if limit == resource.RLIM_INFINITY else float(limit - used)
    except (ImportError, OSError, ValueError):
        return math.inf


def _number(path: str, unknown: float = math.inf) -> float:
    try:
        return float(Path(path).read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return unknown

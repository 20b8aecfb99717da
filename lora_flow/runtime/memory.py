"""The free memory, and one line for a request that does not fit, before any memory is taken."""

from __future__ import annotations

import math
import os
from pathlib import Path

from lora_flow.checks import require

_VERSIONS = (  # of control groups: controllers in /proc/self/cgroup, folder; limit, in use, what can be had back of it
    ("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free() -> float:
    """Bytes that may still be taken: the system's available memory, or less under a limit; inf if unknown."""
    return min(_of_system(), of_groups(), _of_limit())


def require_memory(name: str, got: object, needed: int | float) -> None:
    """Raise unless `needed` bytes are free; `name` is the argument that asks for most of them."""
    room = free()
    must = f"be small enough for the {size(room)} of memory that are free"
    require(needed <= room, name, must, f"{got}, which takes {size(needed)}")


def of_groups(root: Path = Path("/")) -> float:
    """Bytes that control groups leave, which containers and batch systems set: the process's own group and all above.

    A group's use includes the files that it has read, which the kernel gives up when memory is needed. Inside a
    container /proc may name a group as the host sees it. A group that is missing there sets no limit; the topmost one
    exists.
    """
    left = math.inf
    for controller, mounted, limit, used, reclaimable in _VERSIONS:
        own = Path("/", _group(root, controller)).relative_to("/")
        for group in (own, *own.parents):
            folder = root / mounted / group
            left = min(left, _number(folder / limit) - _number(folder / used, 0.0) + _stat(folder, reclaimable))
    return left


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


def _group(root: Path, controller: str) -> str:
    """The group that the process is in, "" where that is outside of what is seen here."""
    try:
        lines = (line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines())
        found = {name: path for _, controllers, path in lines for name in controllers.split(",")}
    except (OSError, ValueError):
        return ""
    path = found.get(controller, "")
    return "" if ".." in Path(path).parts else path


def _stat(group: Path, name: str) -> float:
    try:
        return float(dict(line.split() for line in (group / "memory.stat").read_text().splitlines())[name])
    except (OSError, KeyError, ValueError):
        return 0.0


def _number(path: Path, unknown: float = math.inf) -> float:
    try:
        return float(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return unknown

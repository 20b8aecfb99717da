"""Seconds and bytes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, budget: float) -> dict[str, dict[str, float]]:
    """Round-robin, so that what else the machine does falls on all alike; the calls must be warm.

    A call leaves the rounds when it has spent its budget of seconds, after one round at least.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if sum(taken[name]) < budget:
                taken[name].append(seconds(call))
    return {name: summary(values) for name, values in taken.items()}


def summary(values: list[float]) -> dict[str, float]:
    return {"median_s": float(np.median(values)), "min_s": min(values), "max_s": max(values), "rounds": len(values)}


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of a child counts its parent's from before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

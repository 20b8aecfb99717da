"""Job e: how long a person waits at the command line."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.timing import seconds, summary

SWEEP = ("sweep", "--alpha", "1e-3", "1e-4", "1e-5", "--seeds", "1", "--side", "B", "--overwrite", "--out")


def run(quick: bool) -> dict[str, Any]:
    """Wall time of whole processes: a sweep of three lanes with no cache and with a warm one, help, and bare Python."""
    command = str(Path(sysconfig.get_path("scripts")) / "lora-flow")
    repeats = 1 if quick else 3
    with tempfile.TemporaryDirectory() as folder:
        sweep = [command, *SWEEP, str(Path(folder) / "run")]
        caches = [str(Path(folder) / f"cache{i}") for i in range(repeats)]
        rows = {
            "sweep of 3 lanes, cold": [_wall(sweep, cache) for cache in caches],
            "sweep of 3 lanes, cache warm": [_wall(sweep, caches[0]) for _ in range(repeats)],
            "--help": [_wall([command, "--help"], caches[0]) for _ in range(repeats)],
            "Python's start-up": [_wall([sys.executable, "-c", ""], caches[0]) for _ in range(repeats)],
        }
    return {"rows": {name: summary(values) for name, values in rows.items()}}


def _wall(command: list[str], cache: str) -> float:
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    environment.pop("XLA_FLAGS", None)  # as a user has it, not as this process set it for its own JAX
    return seconds(lambda: subprocess.run(command, env=environment, check=True, capture_output=True))

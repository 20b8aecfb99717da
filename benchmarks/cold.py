"""Job e: how long a person waits at the command line, and with a script of diffrax's."""

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
SCRIPT = Path(__file__).with_name("plain_script.py")


def run(quick: bool) -> dict[str, Any]:
    """Wall time of whole processes in turn: three lanes by lora_flow and by a script, help, and bare Python.

    Each round has a folder of compiled programs of its own, empty at first, warm when the same is run again.
    """
    command = str(Path(sysconfig.get_path("scripts")) / "lora-flow")
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sweep = [command, *SWEEP, str(Path(folder) / "run")]
        script = [sys.executable, str(SCRIPT), str(Path(folder) / "script")]
        for number in range(1 if quick else 5):
            cache = str(Path(folder) / f"cache{number}")
            for warmth in ("cold", "cache warm"):
                rows.setdefault(f"sweep of 3 lanes, {warmth}", []).append(_wall(sweep, cache))
                rows.setdefault(f"plain diffrax script, {warmth}", []).append(_wall(script, cache))
            rows.setdefault("--help", []).append(_wall([command, "--help"], cache))
            rows.setdefault("Python's start-up", []).append(_wall([sys.executable, "-c", ""], cache))
    return {"rows": {name: summary(values) for name, values in rows.items()}}


def _wall(command: list[str], cache: str) -> float:
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    environment.pop("XLA_FLAGS", None)  # as a user has it, not as this process set it for its own JAX
    return seconds(lambda: subprocess.run(command, env=environment, check=True, capture_output=True))

"""Measurements that need a fresh process: its peak of memory is its own, and one that takes too long can be stopped."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from typing import Any


class Failed(Exception):
    """A child that ended without a result; the message says how."""


def in_child(function: str, *arguments: Any, timeout: float) -> Any:
    """The result of `benchmarks.module:function(*arguments)`, both as JSON, from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.children", function, json.dumps(arguments)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Failed(f"stopped after {timeout:.0f} s") from None
    finally:
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)  # its workers too
            child.communicate()
    if child.returncode:
        raise Failed(err.strip().splitlines()[-1] if err.strip() else f"exit status {child.returncode}")
    return json.loads(out.splitlines()[-1])


def start_jax() -> None:
    """Double precision, one CPU device a core and kept programs, for every peer that is written in JAX."""
    from lora_flow.runtime import start

    start.start_jax()


def main() -> None:
    module, name = sys.argv[1].split(":")
    start_jax()
    print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(sys.argv[2]))))


if __name__ == "__main__":
    main()

"""The settings that JAX needs before it is imported."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

from lora_flow.checks import require_choice

PRECISIONS = ("double", "single")
_DEVICES = "--xla_force_host_platform_device_count="
IN_WORKERS = {"NPROC": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "EQX_ON_ERROR": "nan"}
"""Variables that XLA and equinox read when they start."""


_own: list[bool] = []  # holds something in a process of ours


def own_process() -> None:
    """Says that this process runs this package's commands alone, so that its programs are what the source says."""
    _own.append(True)


def start_jax(precision: str = "double", devices: int = 0) -> None:
    """Sets one CPU device a core (or `devices`), the precision, and where compiled programs are kept.

    Programs are kept from one command to the next in the user's cache folder, or where JAX's own variable
    `JAX_COMPILATION_CACHE_DIR` says; nowhere, if the user's may not be written. A process of ours (`own_process`) keeps
    them as they are before they are compiled, too.
    """
    require_choice("precision", precision, PRECISIONS)
    if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = f"{_DEVICES}{min(max(devices, 0) or cores, cores)}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
    import jax

    gc.set_threshold(20_000, 10, 10)  # to trace a program makes much that stays, which would be gone through 200 times
    jax.config.update("jax_enable_x64", precision == "double")
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lora_flow", "programs")
        if _is_writable(cache):  # or else JAX warns of every program
            jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    programs = jax.config.values["jax_compilation_cache_dir"]
    if _own and programs and "://" not in programs:
        from lora_flow.runtime import kept_programs

        kept_programs.start(Path(programs, "lowered"))


def start_worker(precision: str) -> None:
    """The same for a process that is one of several on a machine: a device, a thread, and GPU memory as it is needed.

    Where JAX has started, only the precision changes.
    """
    if "jax" not in sys.modules:
        own_process()
    for name, value in IN_WORKERS.items():
        os.environ.setdefault(name, value)
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_DEVICES)]
    os.environ["XLA_FLAGS"] = " ".join(others)
    start_jax(precision, 1)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)

"""A second process of ours on this machine, for work that takes minutes and has two independent halves."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor

from lora_flow.runtime.start import start_worker

THREADS = {"OPENBLAS_NUM_THREADS": "1"}
"""What a library of linear algebra reads when it is loaded: threads of two processes would wait for each other."""


def second_process() -> ProcessPoolExecutor:
    """An executor of one process, with JAX as its workers have it, which begins with the first thing to do."""
    for name, value in THREADS.items():
        os.environ.setdefault(name, value)  # the process inherits it
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends both, and only the first one says so
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start_worker("double")


def _end_with_parent() -> None:
    """A process that is ended from outside takes the other one with it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

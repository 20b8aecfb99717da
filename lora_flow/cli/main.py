"""`main`: from the command line's words to an exit status. Little is imported before signals are watched for."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from lora_flow.runtime import interrupts


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command: 0 when done, 2 with one line for bad input, 1 for a failure in the run and after Ctrl-C.

    Without arguments it takes the process's words, and its signals. Called with words it leaves signals to Python.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    with interrupts.watched() if arguments is None else contextlib.nullcontext():
        os.environ.setdefault("EQX_ON_ERROR", "nan")  # a compiled program that can raise Python's errors cannot be kept
        from lora_flow.cli.answer import answer
        from lora_flow.runtime.start import own_process

        if arguments is None:
            own_process()
        return answer(words)

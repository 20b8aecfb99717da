"""`main`: from the command line's words to an exit status. Little is imported before signals are watched for."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from lora_flow import interrupts


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command: 0 when done, 2 with one line for bad input, 1 for a failure in the run and after Ctrl-C.

    Called from a program of your own, with words of your own, it leaves signals to Python.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    own_process = words == sys.argv[1:]
    with interrupts.watched() if own_process else contextlib.nullcontext():
        os.environ.setdefault("EQX_ON_ERROR", "nan")  # a compiled program that can raise Python's errors cannot be kept
        from lora_flow.cli.answer import answer

        return answer(words)

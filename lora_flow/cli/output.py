"""Output for any terminal, log or pipe: characters that it cannot carry are put into ASCII."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from lora_flow.checks import StartWarning

IN_ASCII = {"±": "+-", "−": "-", "–": "-", "—": "-", "×": "x", "·": ".", "•": "*", "→": "->", "…": "...", "≤": "<="}
IN_ASCII |= dict.fromkeys("│┃", "|") | dict.fromkeys("─━", "-") | dict.fromkeys("╭╮╰╯├┤┌┐└┘", "+")
_ERRORS = "lora_flow.in_ascii"


def in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Python's handler of encoding errors: known characters by their likeness, others by their number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join(IN_ASCII.get(one) or one.encode("ascii", "backslashreplace").decode() for one in wrong), error.end


@contextlib.contextmanager
def any_text() -> Iterator[None]:
    """Within, standard output and error take any text, and pass each line on at once."""
    codecs.register_error(_ERRORS, in_ascii)
    closed = [name for name in ("stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    before = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            before.append((stream, stream.errors, stream.line_buffering))
            stream.reconfigure(errors=_ERRORS, line_buffering=True)
    try:
        yield
    finally:
        for stream, errors, line_buffering in before:
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
                stream.reconfigure(errors=errors, line_buffering=line_buffering)
        for name in closed:
            getattr(sys, name).close()
            setattr(sys, name, None)


@contextlib.contextmanager
def warnings_of_starts() -> Iterator[None]:
    """Within, a warning of a start is a line of the command, without its place in the source."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, StartWarning):
                complain(f"warning: {message}")
            else:
                shown(message, category, *where, **more)

        warnings.showwarning = show
        yield


def complain(line: str) -> None:
    """One line on standard error, if anybody reads it."""
    try:
        print(f"lora-flow: {' '.join(line.split())}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        hush(sys.stderr)


def hush(stream: object) -> None:
    """Lets go of a stream that cannot be written, so that Python does not complain of what is left in it at its end."""
    with contextlib.suppress(Exception):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[attr-defined]
        os.close(nowhere)

"""Ctrl-C and SIGTERM while a command runs: one line, status 1, and no step cut in two.

Python's way, an exception wherever the main thread happens to be, does not do: raised within a callback (of the garbage
collector for instance, where JAX has one) it is printed and forgotten, within a compiled program it waits for its end,
and other people's `except` clauses turn it into errors of their own. So a thread of ours is told of the signal by the
C level handler itself, and ends the process: whatever is stored is safe from that by design, see
`lora_flow.storage.folder`.

Only a command line that owns its process asks for this; importing the library changes nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

PATIENCE = 10.0  # seconds that a step which must not be cut in two may take to end
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_step = threading.RLock()
_stored = ""
_is_regular = False


@contextlib.contextmanager
def whole(stored: str = "") -> Iterator[None]:
    """A step that Ctrl-C waits for: a file or a folder is replaced. `line` says `stored` once it is done."""
    with _step:
        yield
        if stored:
            tell(stored)


def tell(stored: str) -> None:
    """From now on `line` says this of what is stored, and of how to continue."""
    global _stored
    _stored = stored


def stored() -> str:
    """The line on what the running command has stored, and how to continue; "" for nothing."""
    return _stored


def nothing_stored() -> None:
    """A command begins."""
    tell("")


@contextlib.contextmanager
def regular() -> Iterator[None]:
    """Within, an interruption is how the command ends: without a line, and with status 0."""
    global _is_regular
    _is_regular = True
    try:
        yield
    finally:
        _is_regular = False


def line() -> str:
    """The line to print at an interruption."""
    return f"interrupted; {_stored}" if _stored else "interrupted"


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Within, SIGINT and SIGTERM end the process with `line` on standard error and status 1, at most one step later.

    A second signal does not wait for the step. Signals that are ignored, as in the background of a shell script, stay
    ignored, and other threads than the main one, which Python gives no signals, change nothing.
    """
    heeded = [one for one in _SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
    if os.name != "posix" or threading.current_thread() is not threading.main_thread() or not heeded:
        yield
        return
    told, tells = os.pipe()
    os.set_blocking(tells, False)
    threading.Thread(target=_watch, args=(told,), daemon=True).start()
    wakeup = signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    before = {one: signal.signal(one, _leave_it_to_the_thread) for one in heeded}
    try:
        yield
    finally:
        atexit.register(_over, heeded)
        for one, handler in before.items():
            signal.signal(one, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(tells)


def _leave_it_to_the_thread(number: int, frame: object) -> None:
    pass


def _over(heeded: list[signal.Signals]) -> None:
    """The command has done all it had to; while the interpreter ends nobody could answer an exception."""
    for one in heeded:
        signal.signal(one, signal.SIG_IGN)


def _watch(told: int) -> None:
    """Waits for the first byte that says that a signal came, and ends the process."""
    if not os.read(told, 1):
        os.close(told)
        return
    until = time.monotonic() + PATIENCE
    while not _step.acquire(timeout=0.02):
        another, _, _ = select.select([told], [], [], 0)
        if another or time.monotonic() > until:
            break
    new_line = "\n" if os.isatty(2) else ""  # a terminal has a bar or ^C on its last line
    said = new_line if _is_regular else f"{new_line}lora-flow: {line()}\n"
    with contextlib.suppress(OSError):
        os.write(2, said.encode(errors="backslashreplace"))
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(0 if _is_regular else 1)

"""The progress of a long run: a bar on a terminal, and elsewhere plain lines, so that a log stays readable."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

EVERY = 60.0  # seconds after which another line is due, whatever was done
SHARE = 0.05  # of the whole, after which a line is due
APART = 2.0  # seconds at the least before the first line, and between two

T = TypeVar("T")


class Progress:
    """Counts units of work on standard error: `with Progress(240, "lanes") as bar: ...; bar.update(8)`.

    On a terminal it is tqdm's bar. Elsewhere (a file, a pipe, a batch system's log) it writes a line for every 5 % of
    the whole and after every minute, with the time left, and no carriage returns. A run of less than two seconds
    writes nothing.
    """

    def __init__(self, total: int, unit: str, done: int = 0, shown: bool = True, what: str = ""):
        self._total, self._unit, self._done, self._what = total, unit, done, what
        self._at_first = self._done_when_told = done
        self._began = self._told = time.monotonic()
        self._lock, self._over = threading.Lock(), threading.Event()
        shown = shown and sys.stderr is not None
        terminal = shown and sys.stderr.isatty()
        self._lines, self._bar = shown and not terminal, None
        if terminal:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit=f" {unit}", desc=what, smoothing=0.1)

    def __enter__(self) -> Progress:
        if self._lines:
            threading.Thread(target=self._every_minute, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._bar is not None:
            self._bar.close()

    def describe(self, what: str) -> None:
        """Names the current work, before the numbers."""
        self._what = what
        if self._bar is not None:
            self._bar.set_description(what)

    def update(self, done: int = 1) -> None:
        """So many more units are done."""
        self._done += done
        if self._bar is not None:
            self._bar.update(done)
        since = time.monotonic() - self._told
        enough = self._done - self._done_when_told >= SHARE * self._total
        if self._lines and done and since >= APART and (enough or since >= EVERY):
            self._tell()

    def _every_minute(self) -> None:
        while not self._over.wait(max(0.1, EVERY - (time.monotonic() - self._told))):
            if time.monotonic() - self._told >= EVERY:
                self._tell()

    def _tell(self) -> None:
        with self._lock:
            self._told, self._done_when_told = time.monotonic(), self._done
            spent, fresh = self._told - self._began, self._done - self._at_first
            share = 100 * self._done / max(self._total, 1)
            left = f", {span(spent * (self._total - self._done) / fresh)} left" if fresh else ""
            what = f"{self._what}: " if self._what else ""
            print(
                f"{what}{self._done} of {self._total} {self._unit} ({share:.0f} %), {span(spent)} so far{left}",
                file=sys.stderr,
                flush=True,
            )


def each(items: Iterable[T], unit: str, what: str = "") -> Iterator[T]:
    """The items one after the other, with progress shown."""
    listed = list(items)
    with Progress(len(listed), unit, what=what) as bar:
        for item in listed:
            yield item
            bar.update()


def span(seconds: float) -> str:
    """A length of time for people: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

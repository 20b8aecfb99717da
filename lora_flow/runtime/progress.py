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

    The time left follows from the pace since the first units were done, because programs are compiled before that.
    Until more units are done it is not told.
    """

    def __init__(self, total: int, unit: str, done: int = 0, shown: bool = True, what: str = ""):
        self._total, self._unit, self._done, self._what = total, unit, done, what
        self._done_when_told = done
        self._began = self._told = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first units were done, and how many then
        self._lock, self._over = threading.Lock(), threading.Event()
        shown = shown and sys.stderr is not None
        terminal = shown and sys.stderr.isatty()
        self._lines, self._bar = shown and not terminal, None
        if terminal:
            from tqdm import tqdm

            look = "{l_bar}{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}{postfix}]"
            self._bar = tqdm(total=total, initial=done, unit=f" {unit}", desc=what, bar_format=look)

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
        """So many more units are done, of those that are at work together all."""
        self._done += done
        now = time.monotonic()
        if done and self._first is None:
            self._first = now, self._done
        if self._bar is not None:
            self._bar.set_postfix_str(self._left(now), refresh=False)
            self._bar.update(done)
        since = now - self._told
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
            spent, left = self._told - self._began, self._left(self._told)
            share = 100 * self._done / max(self._total, 1)
            what = f"{self._what}: " if self._what else ""
            done = f"{self._done} of {self._total} {self._unit} ({share:.0f} %)"
            told = [f"{what}{done}", f"{span(spent)} so far", *([left] if left else [])]
            print(", ".join(told), file=sys.stderr, flush=True)

    def _left(self, now: float) -> str:
        """The time left, "" where nothing is done since the first units were."""
        if self._first is None or self._done == self._first[1]:
            return ""
        since, done = self._first
        return f"{span((now - since) * (self._total - self._done) / (self._done - done))} left"


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

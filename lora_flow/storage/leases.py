"""The lock of a folder in an object store: a lease, which its holder renews for as long as the process lives.

Whoever wants the lock puts an object of its own into the folder, and then lists all such objects. Stores show at once
what was put, so of two that come together one at least sees the other, and steps back. The times are the store's, whose
clock is the only one. A lease that was not renewed is nobody's.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid
from collections.abc import Iterator

from lora_flow.storage.remote import RemotePath

LEASE = 90.0  # seconds that a lease lasts
RENEWED = 20.0  # seconds between two renewals
_TRIES = 3  # of two that step back from each other
_PAUSE = 0.3  # seconds between them, about
_SHARED, _ALONE = "shared", "alone"


@contextlib.contextmanager
def leased(lock: RemotePath, who: str, shared: bool) -> Iterator[str]:
    """Holds a lease, alone or with others, under names that begin with that of `lock`; gives "".

    Where others have it, gives one of them, and holds nothing.
    """
    ours = lock.with_name(f"{lock.name}-{_SHARED if shared else _ALONE}-{uuid.uuid4().hex}")
    other = _take(lock, ours, who, shared)
    if other:
        yield other
        return
    ends = threading.Event()
    renewal = threading.Thread(target=_renew, args=(ours, who, ends), daemon=True)
    renewal.start()
    try:
        yield ""
    finally:
        ends.set()
        renewal.join()
        with contextlib.suppress(OSError):  # then it ends by itself
            ours.unlink()


def lease_holder(lock: RemotePath) -> str:
    """Who holds a lease, "" for nobody, by the clock of this machine."""
    try:
        live = [one for one in _leases(lock) if time.time() - one.stat().st_mtime < LEASE]
        return live[0].read_bytes().decode(errors="replace") if live else ""
    except OSError:
        return ""


def _take(lock: RemotePath, ours: RemotePath, who: str, shared: bool) -> str:
    """Takes the lease, and removes those that have ended; or gives the name of one who has it."""
    other = ""
    for _ in range(_TRIES):
        try:
            ours.write_text(who)
            times = {one: one.stat().st_mtime for one in _leases(lock)}
            ended = [one for one, at in times.items() if times[ours] - at >= LEASE]
            against = [one for one in times if one != ours and one not in ended and not (shared and _is_shared(one))]
            if not against:
                for one in ended:
                    one.unlink(missing_ok=True)
                return ""
            with contextlib.suppress(FileNotFoundError):  # just given back
                other = against[0].read_bytes().decode(errors="replace")
            ours.unlink()
        except BaseException:
            with contextlib.suppress(OSError):
                ours.unlink(missing_ok=True)
            raise
        time.sleep(_PAUSE * random.uniform(0.5, 1.5))
    return other or "another process"


def _renew(ours: RemotePath, who: str, ends: threading.Event) -> None:
    while not ends.wait(RENEWED):
        with contextlib.suppress(OSError):  # the next time, perhaps
            ours.write_text(who)


def _leases(lock: RemotePath) -> list[RemotePath]:
    return [one for one in lock.parent.iterdir() if one.name.startswith(f"{lock.name}-")]


def _is_shared(lease: RemotePath) -> bool:
    return f"-{_SHARED}-" in lease.name

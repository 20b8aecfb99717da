"""The lock of a folder: one process writes there, and whoever comes next mends what a killed one has left.

A process that writes into a folder holds the lock for as long as it lives. Processes that do parts of one run share it,
and then nobody else may have it. On a disk the kernel keeps the lock, in an object store it is a lease.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lora_flow.checks import InputError
from lora_flow.storage.leases import LEASE, lease_holder, leased
from lora_flow.storage.remote import RemotePath, RunPath, run_path
from lora_flow.storage.swap import LOCK, replaced_in, settle

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_PATIENCE = 0.05  # seconds to wait for a lock that somebody may only look at
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
_UNSUPPORTED = {getattr(errno, name, None) for name in ("ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL", "EBADF")}


class InUse(InputError):
    """Another process holds the lock of the folder."""


@contextlib.contextmanager
def locked(
    folder: str | RunPath, patience: float = _PATIENCE, shared: bool = False, purpose: str = ""
) -> Iterator[None]:
    """Holds the lock of a folder, which is made if it is missing, and first mends what a killed process left there.

    A `shared` lock mends nothing, because others may be at work. `holder` tells the `purpose`. The kernel releases the
    lock when the process ends, however it ends; a lease ends after some time.

    **Raises:** `InUse` where another process still holds it after `patience` seconds, with its number and host.
    """
    folder, who = run_path("the run folder", folder), f"process {os.getpid()} on {socket.gethostname()}{purpose}"
    if isinstance(folder, RemotePath):
        with leased(folder / LOCK, who, shared) as other:
            if other:
                raise InUse(f"{_in_use(folder, other)}; the lock of one that was killed ends within {LEASE:.0f} s")
            if not shared:
                settle(folder)
            yield
        return
    new = not folder.exists()
    handle = _acquire(folder, patience, shared, who)
    try:
        if not shared:
            settle(folder)
        yield
    finally:
        try:
            with contextlib.suppress(OSError):
                if not shared or _try_flock(handle, shared=False):  # the last of those that share it
                    (folder / LOCK).unlink(missing_ok=True)
        finally:
            os.close(handle)
        if new:
            with contextlib.suppress(OSError):  # gone again, if nothing came of it
                folder.rmdir()


@contextlib.contextmanager
def locked_if_free(folder: str | RunPath) -> Iterator[None]:
    """Holds the lock of an existing folder, unless another process is at work there or the folder may not be written.

    For work that may go on beside a writer, file by file, but should keep others from replacing the folder meanwhile.
    """
    with contextlib.ExitStack() as held:
        if run_path("the run folder", folder).is_dir():
            try:
                held.enter_context(locked(folder))
            except InUse:
                pass
            except OSError as error:  # said of the file that is then written
                if error.errno not in _READ_ONLY:
                    raise
        yield


def mend(folder: RunPath) -> None:
    """Puts old entries back that a killed process was about to replace. Readers call it; writers hold the lock.

    Entries that a living process is about to replace, or that the reader may not write, are left alone.
    """
    for one in replaced_in(folder):
        try:
            with contextlib.suppress(InUse), locked(one):
                pass
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise


def holder(folder: str | RunPath) -> str:
    """The holder of a folder's lock, such as "process 4711 on node3"; "" for nobody. The lock stays as it is."""
    folder = run_path("the run folder", folder)
    if isinstance(folder, RemotePath):
        return lease_holder(folder / LOCK)
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return ""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back at once; nobody had it
        return ""
    except BlockingIOError:
        return os.read(handle, 300).decode(errors="replace") or "another process"
    except OSError:
        return ""
    finally:
        os.close(handle)


def _acquire(folder: Path, patience: float, shared: bool, who: str) -> int:
    """An open file in the folder that holds the lock; the file says who has it, of those that share it the last."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError:  # another process had made the folder for nothing, and has just removed it
            continue
        try:
            _flock(handle, folder, patience, shared)
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(handle)):
                os.ftruncate(handle, 0)
                os.write(handle, who.encode())
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # who had it has just removed the file


def _flock(handle: int, folder: Path, patience: float, shared: bool) -> None:
    until = time.monotonic() + patience
    try:
        while not _try_flock(handle, shared):
            if time.monotonic() > until:
                has = os.read(handle, 300).decode(errors="replace") or "another process"
                raise InUse(_in_use(folder, has))
            time.sleep(_PATIENCE / 10)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        print(f"lora-flow: '{folder}' has no locks; leave it to one process at a time", file=sys.stderr)


def _in_use(folder: RunPath, has: str) -> str:
    return f"'{folder}' must be written by one process at a time, got one that {has} has"


def _try_flock(handle: int, shared: bool) -> bool:
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "no locks")
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

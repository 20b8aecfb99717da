"""One process at a time writes into a folder, and its lock ends with it."""

import contextlib
import errno
import os
import subprocess
import sys
import textwrap
import threading

import pytest
from entries import FOREIGN, HEX, NEW, fill, found, replace

from lora_flow import InputError
from lora_flow.storage.locks import locked, mend
from lora_flow.storage.swap import LOCK


def test_one_process_at_a_time_and_the_lock_ends_with_it(folder):
    script = f"""
        import sys
        from lora_flow.storage.locks import locked
        with locked({str(folder)!r}):
            print("locked", flush=True)
            sys.stdin.read()
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=rf"one process at a time, got one that process {other.pid} on \S+ has$"):
            replace(folder)
        assert (folder / LOCK).is_file()
    finally:
        other.kill()
        other.communicate()
    assert (folder / LOCK).is_file()
    replace(folder)
    assert found(folder) == dict(sorted((NEW | FOREIGN).items()))  # and no lock


def test_a_reader_leaves_alone_what_a_living_process_is_about_to_replace(folder):
    with locked(folder):
        (folder / "results.zarr").rename(folder / f"results.zarr.{HEX}.old")
        mend(folder)
        assert not (folder / "results.zarr").exists()
    mend(folder)
    assert (folder / "results.zarr").is_dir()


@pytest.mark.parametrize("why", [errno.EACCES, errno.EROFS])
def test_a_reader_leaves_alone_what_it_may_not_write(folder, monkeypatch, why):
    """Permissions do not bind root, so the system's refusal is put in the place of opening the lock."""
    (folder / "results.zarr").rename(folder / f"results.zarr.{HEX}.old")
    before, opened = found(folder), os.open

    def closed(path, flags, *rest, **options):
        if flags & os.O_CREAT:
            raise OSError(why, os.strerror(why), str(path))
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", closed)
    mend(folder)
    assert found(folder) == before
    with pytest.raises(OSError, match=os.strerror(why)), locked(folder):
        pass


def test_a_lock_that_is_only_looked_at_is_waited_for(folder):
    fill(folder, {LOCK: ""})
    with (folder / LOCK).open() as looked_at:
        fcntl = pytest.importorskip("fcntl")
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        until = threading.Timer(0.01, lambda: fcntl.flock(looked_at, fcntl.LOCK_UN))
        until.start()
        replace(folder)
        until.join()
    assert found(folder) == dict(sorted((NEW | FOREIGN).items()))


def test_a_folder_that_another_process_takes_away_again_is_made_again(tmp_path, monkeypatch):
    """Who made it for nothing removes it, between the moment it is there and that in which the lock is opened."""
    opened, removed = os.open, []

    def removing(path, flags, *rest, **options):
        if not removed and str(path).endswith(LOCK):
            removed.append((tmp_path / "run").rmdir())
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", removing)
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).is_file()
    assert removed


def test_a_folder_that_was_made_for_nothing_goes(tmp_path):
    with contextlib.suppress(InputError), locked(tmp_path / "a" / "run"):
        raise InputError("no")
    assert not (tmp_path / "a" / "run").exists()


def test_a_file_system_without_locks_is_said_to_be_one(folder, monkeypatch, capsys):
    def flock(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("lora_flow.storage.locks.fcntl.flock", flock)
    replace(folder)
    assert found(folder) == dict(sorted((NEW | FOREIGN).items()))
    assert capsys.readouterr().err == f"lora-flow: '{folder}' has no locks; leave it to one process at a time\n"

"""What a path in an object store does, how entries are replaced there, and who may write."""

import os
import sys
import threading

import pytest
from s3_server import S3Server

from lora_flow import InputError
from lora_flow.storage import leases, remote, staged, swap
from lora_flow.storage.locks import InUse, holder, locked, mend
from lora_flow.storage.remote import RemotePath, run_path
from lora_flow.storage.swap import is_generated, is_replaced, replacing, write_atomically


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, S3Server() as server:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        remote._store.cache_clear()
        yield server
        server.shutdown()
    remote._store.cache_clear()


@pytest.fixture
def folder(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(leases, "_PAUSE", 0.0)
    server.objects.clear()
    server.page, server.refuse = 3, lambda method, key: 0
    yield run_path("out", "s3://bucket/runs/x")
    assert not os.listdir(tmp_path)  # nothing of a URL lies on a disk


def names(server):
    return sorted(key.removeprefix("runs/x/") for key in server.objects)


def test_a_path_names_what_is_in_the_store(folder):
    assert str(folder / "a" / "b.c") == "s3://bucket/runs/x/a/b.c"
    assert (folder / "a" / "b.c").parent.name == "a"
    assert not folder.exists()
    for name in ("a", "b", "c", "d", "e/f", "e/g", "h-1"):
        (folder / name).write_text(name)
    assert folder.is_dir()
    assert not folder.is_file()
    assert sorted(one.name for one in folder.iterdir()) == ["a", "b", "c", "d", "e", "h-1"]
    assert sorted(one.name for one in folder.rglob("*")) == ["a", "b", "c", "d", "f", "g", "h-1"]
    assert [str(one) for one in folder.glob("*/g")] == ["s3://bucket/runs/x/e/g"]
    assert [one.name for one in folder.glob("h-*")] == ["h-1"]
    assert not list(folder.glob("i"))
    assert (folder / "e" / "f").read_bytes() == (folder / "e" / "f").open().read() == b"e/f"
    assert (folder / "e" / "f").stat().st_mtime > 1e9
    (folder / "e").remove(keep=[folder / "e" / "g"])
    assert not (folder / "e" / "f").exists()
    assert (folder / "e" / "g").is_file()


def test_what_a_store_refuses_is_an_error_of_the_system(server, folder):
    with pytest.raises(FileNotFoundError) as missing:
        (folder / "a").read_bytes()
    assert missing.value.filename == "s3://bucket/runs/x/a"
    (folder / "a").unlink(missing_ok=True)
    server.refuse = lambda method, key: 403
    with pytest.raises(OSError, match=r"403 Forbidden.*s3://bucket/runs/x/a"):
        (folder / "a").write_text("")
    server.refuse = lambda method, key: 0
    with pytest.raises(OSError, match="no such bucket"):
        run_path("out", "s3://other/x").exists()


def test_files_go_there_and_come_back(folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("here") / "own.npz"
    file.write_bytes(b"own")
    swap.copy_file(file, folder / "kept.npz")
    with remote.as_file(folder / "kept.npz") as here:
        assert (here.name, here.read_bytes()) == ("kept.npz", b"own")
    assert not here.exists()


@pytest.mark.parametrize("path", ["", ".", "/a/b", "C:/runs", "runs/a:b", "~/s3"])
def test_paths_of_disks_stay_what_they_are(path):
    assert not isinstance(run_path("out", path), RemotePath)


@pytest.mark.parametrize("url", ["ftp://a/b", "s3:/bucket/x", "s3://", "s3:///x", "https://a/b", "file:///x"])
def test_other_urls_are_refused(url):
    with pytest.raises(InputError, match=r"out must be a path or a URL such as s3://bucket/x \(s3, gs\), got '"):
        run_path("out", url)


def test_a_url_takes_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(
        InputError, match=r"out must be a path: s3:// needs obstore \(pip install 'lora-flow\[remote\]'\)"
    ):
        run_path("out", "s3://bucket/x")


def fill(folder):
    for name in ("results/a", "results/b", "settings", "report", "own"):
        write_atomically(folder / name, f"old {name}")


def make(folder, gone=("report",)):
    with replacing(folder, gone) as new:
        for name in ("results/a", "results/c", "settings"):
            write_atomically(new / name, f"new {name}")


def contents(server):
    return {name: server.objects[f"runs/x/{name}"][0].decode() for name in names(server)}


OLD = {name: f"old {name}" for name in ("own", "report", "results/a", "results/b", "settings")}
NEW = {name: f"new {name}" for name in ("results/a", "results/c", "settings")} | {"own": "old own"}


def test_entries_are_replaced_whole(server, folder):
    fill(folder)
    make(folder)
    assert contents(server) == NEW


def test_whatever_request_fails_the_old_entries_or_the_new_ones_are_there(server, folder):
    """At every request of a replacement: the process ends there, and the next one that locks the folder mends it."""
    server.page = 1000
    fill(folder)
    before = len(server.asked)
    make(folder)
    found = []
    for last in range(len(server.asked) - before):
        server.objects.clear()
        fill(folder)
        left = iter(range(last))
        server.refuse = lambda method, key, left=left: 0 if next(left, None) is not None else 403
        with pytest.raises(OSError, match="403"):
            make(folder)
        server.refuse = lambda method, key: 0
        assert not is_replaced(folder) or contents(server).items() >= {"own": "old own"}.items()
        with locked(folder):
            pass
        found.append(contents(server))
    assert found == [OLD] * found.count(OLD) + [NEW] * found.count(NEW)
    assert found.count(OLD) >= 3
    assert found.count(NEW) >= 5


def test_a_reader_ends_what_a_killed_process_has_begun(server, folder, monkeypatch):
    fill(folder)
    monkeypatch.setattr(staged, "copy", lambda pairs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(folder)
    assert is_replaced(folder)
    monkeypatch.undo()
    mend(folder)
    assert contents(server) == NEW


def test_a_journal_that_names_other_places_is_refused(folder):
    for name in ("../y", "/y"):
        write_atomically(folder / f"run.{'0' * 32}.{swap.OLD}", f'{{"old": [], "new": ["{name}"]}}')
        with pytest.raises(InputError, match="name entries of its own folder"), locked(folder):
            pass


def test_one_process_writes_at_a_time(server, folder):
    with locked(folder):
        assert f"process {os.getpid()} on " in holder(folder)
        assert all(map(is_generated, names(server)))
        with pytest.raises(
            InUse, match=rf"'s3://bucket/runs/x' must be written by one .* got one that process {os.getpid()}"
        ):
            locked(folder).__enter__()
        with pytest.raises(InUse):
            locked(folder, shared=True).__enter__()
    assert holder(folder) == ""
    assert not server.objects


def test_parts_share_a_folder(server, folder):
    with locked(folder, shared=True), locked(folder, shared=True):
        assert len(server.objects) == 2
        with pytest.raises(InUse):
            locked(folder).__enter__()
    assert not server.objects


def test_a_lease_that_nobody_renews_ends(server, folder, monkeypatch):
    with locked(folder):
        (lease,) = server.objects
        content, at = server.objects[lease]
        server.objects[lease] = content, at - leases.LEASE + 5
        with pytest.raises(InUse):
            locked(folder).__enter__()
        server.objects[lease] = content, at - leases.LEASE - 5
        assert holder(folder) == ""
        with locked(folder):
            assert lease not in server.objects


def test_a_lease_is_renewed_as_long_as_it_is_held(server, folder, monkeypatch):
    renewed = threading.Event()
    monkeypatch.setattr(leases, "RENEWED", 0.01)
    with locked(folder):
        server.refuse = lambda method, key: renewed.set() or 0
        assert renewed.wait(10)
    assert not server.objects


def test_of_two_that_come_together_one_holds_the_lock_at_the_most(folder, monkeypatch):
    monkeypatch.setattr(leases, "_PAUSE", 0.01)
    held, most, errors = [], [], []

    def work():
        try:
            with locked(folder):
                held.append(1)
                most.append(len(held))
                held.pop()
        except InUse as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) + len(errors) == 8
    assert max(most, default=1) == 1

"""Folders are replaced whole or not at all, whatever goes wrong and whenever; locks end with their process."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from lora_flow import InputError
from lora_flow.storage.folder import LOCK, check_run, is_generated, locked, mend, replacing, write_atomically

HEX = "0123456789abcdef" * 2
OLD = {"settings.toml": "old", "results.zarr/loss/0.0": "old", "report.md": "old", "figures/sweep.png": "old"}
OLD |= {"part/settings.toml": "old"}
NEW = {"settings.toml": "new", "results.zarr/loss/0.0": "new", "adapters/unit": "new", "part/settings.toml": "new"}
FOREIGN = {"results.zarr.bak/loss/0.0": "mine", "figures/thesis.png": "mine", "results.zarr.x": "mine"}
FOREIGN |= {"part/notes": "mine"}
STEPS = 40  # more than a replacement has


def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def found(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def replace(folder):
    with locked(folder), replacing(folder, gone=("report.md", "figures/sweep.png"), within=("part",)) as new:
        fill(new, NEW)


def touching(act):
    """A context in which `act` comes before every call that changes a file system."""
    stack = contextlib.ExitStack()
    owners = {Path: ("rename", "replace", "mkdir", "unlink"), os: ("open", "fsync", "write", "ftruncate")}
    patch, read_or_open = pytest.MonkeyPatch(), os.open
    stack.callback(patch.undo)
    for owner, name in [(owner, name) for owner, names in owners.items() for name in names] + [(shutil, "rmtree")]:
        original = getattr(owner, name)

        def changed(*args, original=original, **kwargs):
            if original is not read_or_open or args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
                act()
            return original(*args, **kwargs)

        patch.setattr(owner, name, changed)
    opened = Path.open

    def opening(path, mode="r", *args, **kwargs):
        if set(mode) & set("wxa+"):
            act()
        return opened(path, mode, *args, **kwargs)

    patch.setattr(Path, "open", opening)
    return stack


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path / "run", OLD | FOREIGN)
    return tmp_path / "run"


def test_the_new_entries_take_the_places_of_the_old_and_nobody_elses(folder):
    replace(folder)
    assert found(folder) == dict(sorted((NEW | FOREIGN).items()))


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("step", range(STEPS))
def test_a_disk_that_is_full_at_any_step_leaves_the_old_or_the_new(folder, step, for_good):
    calls = itertools.count()

    def act():
        number = next(calls)
        if number == step or (for_good and number > step):
            raise OSError(errno.ENOSPC, "No space left on device")

    failed = False
    with touching(act):
        try:
            replace(folder)
        except OSError as error:
            failed = error.errno == errno.ENOSPC
    with locked(folder):
        pass
    old, new = (dict(sorted((files | FOREIGN).items())) for files in (OLD, NEW))
    assert found(folder) in ([old] if failed else [new])
    assert failed or step > 15


def test_the_steps_above_are_all_the_steps(folder):
    calls = itertools.count()
    with touching(lambda: next(calls)):
        replace(folder)
    assert 15 < next(calls) < STEPS


def test_killed_at_any_step_it_leaves_the_old_or_the_new(tmp_path):
    """A process for each step, which the kernel ends there; without JAX, whose threads do not survive a fork."""
    script = f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_folder import FOREIGN, NEW, OLD, fill, found, itertools, locked, mend, replace, touching
        seen = []
        for step in range({STEPS}):
            folder = Path({str(tmp_path)!r}, str(step))
            fill(folder, OLD | FOREIGN)
            child = os.fork()
            if not child:
                calls = itertools.count()
                with touching(lambda: next(calls) == step and os.kill(os.getpid(), signal.SIGKILL)):
                    replace(folder)
                os._exit(0)
            killed = os.waitpid(child, 0)[1] == signal.SIGKILL
            mend(folder)
            whole = {{name: text for name, text in found(folder).items() if ".partial/" not in name}}
            states = [dict(sorted((files | FOREIGN).items())) for files in (OLD, NEW)]
            with locked(folder):
                pass
            assert found(folder) in states, (step, found(folder))
            seen.append((killed, states.index(found(folder))))
        print(seen)
    """
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    seen = eval(done.stdout)
    kills = sum(killed for killed, _ in seen)
    assert 15 < kills < STEPS
    assert [killed for killed, _ in seen] == [True] * kills + [False] * (STEPS - kills)
    states = [state for _, state in seen]
    assert states == sorted(states)  # the old up to one step, the new from there on
    assert set(states) == {0, 1}


@pytest.mark.parametrize("moves", [1, 4, 6, 9])
def test_mending_that_is_cut_short_is_mended(folder, tmp_path, moves, monkeypatch):
    """Killed after so many renames of a swap, then again at every step of putting the old back."""
    calls = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr("lora_flow.storage.folder._put_back", lambda *args: None)  # what a kill leaves
        patch.setattr("lora_flow.storage.folder._remove", lambda *args: None)
        rename = Path.rename
        patch.setattr(Path, "rename", lambda *args: [_stop(next(calls) >= moves), rename(*args)])
        with pytest.raises(KeyboardInterrupt):
            replace(folder)
    for step in range(STEPS):
        torn = tmp_path / f"torn{step}"
        shutil.copytree(folder, torn)
        calls = itertools.count()
        with (
            contextlib.suppress(KeyboardInterrupt),
            touching(lambda calls=calls, step=step: _stop(next(calls) >= step)),
        ):
            mend(torn)
        with locked(torn):
            pass
        assert found(torn) == dict(sorted((OLD | FOREIGN).items())), step


def _stop(now):
    if now:
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["partial", "old", "gone"])
@pytest.mark.parametrize("what", ["file", "folder", "link", "broken link"])
def test_what_is_left_under_generated_names_goes_and_links_are_not_followed(folder, tmp_path, kind, what):
    fill(tmp_path / "elsewhere", {"data": "mine"})
    left = folder / f"results.zarr.{HEX}.{kind}"
    if what == "file":
        left.write_text("left")
    elif what == "folder":
        fill(left, {"loss/0.0": "left"})
    else:
        left.symlink_to(tmp_path / ("elsewhere" if what == "link" else "nowhere"))
    with locked(folder):
        pass
    assert found(folder) == dict(sorted((OLD | FOREIGN).items()))
    assert not os.path.lexists(left)
    assert (tmp_path / "elsewhere" / "data").read_text() == "mine"


@pytest.mark.parametrize(
    "name",
    ["results.zarr.bak", "results.zarr.old", "results.zarr.partial", f"results.zarr.{HEX}", f"results.zarr.{HEX}.bak",
     f"results.zarr.{HEX[1:]}.old", f"results.zarr.{HEX.upper()}.old", f".{HEX}.old", "results.zarr.x"],
)  # fmt: skip
def test_names_that_people_give_are_not_generated(name):
    assert not is_generated(name)


def test_old_results_that_an_earlier_version_set_aside_come_back(folder):
    (folder / "results.zarr").rename(folder / f"results.zarr.{HEX}.old")
    mend(folder)
    assert found(folder) == dict(sorted((OLD | FOREIGN).items()))


@pytest.mark.parametrize("names", ['{"old": ["../../x"], "new": []}', '{"old": ["/x"], "new": []}', "[" * 10**5, "3"])
def test_names_that_lead_elsewhere_are_refused(folder, names):
    fill(folder / f"run.{HEX}.old", {"names.json": names, "0": "old"})
    with pytest.raises(InputError, match=r"names\.json' must name"):
        mend(folder)
    assert (folder / f"run.{HEX}.old" / "0").is_file()


def test_a_file_is_replaced_in_one_step(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "a.txt.partial").write_text("mine")
    for step in range(8):
        calls = itertools.count()
        with contextlib.suppress(OSError), touching(lambda calls=calls, step=step: _full(next(calls) == step)):
            write_atomically(tmp_path / "a.txt", "new")
        assert (tmp_path / "a.txt").read_text() in ("old", "new")
        assert found(tmp_path).keys() == {"a.txt", "a.txt.partial"}
    assert found(tmp_path) == {"a.txt": "new", "a.txt.partial": "mine"}


def _full(now):
    if now:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_one_process_at_a_time_and_the_lock_ends_with_it(folder):
    script = f"""
        import sys
        from lora_flow.storage.folder import locked
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

    monkeypatch.setattr("lora_flow.storage.folder.fcntl.flock", flock)
    replace(folder)
    assert found(folder) == dict(sorted((NEW | FOREIGN).items()))
    assert capsys.readouterr().err == f"lora-flow: '{folder}' has no locks; leave it to one process at a time\n"


def test_a_run_that_was_replaced_is_noticed(tmp_path):
    (tmp_path / ".zattrs").write_text(json.dumps({"run_id": "a"}))
    check_run(tmp_path, "a")
    for content in ('{"run_id": "b"}', "{}", "[]", "", "\0"):
        (tmp_path / ".zattrs").write_text(content)
        with pytest.raises(InputError, match="must stay in place while its run is solved, got another run's, or none"):
            check_run(tmp_path, "a")

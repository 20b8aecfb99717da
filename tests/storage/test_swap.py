"""Folders are replaced whole or not at all, whatever goes wrong and whenever."""

import contextlib
import errno
import itertools
import os
import shutil
from pathlib import Path

import pytest
from entries import FOREIGN, HEX, NEW, OLD, fill, found, replace, told_by, touching

from lora_flow import InputError
from lora_flow.storage.locks import locked, mend
from lora_flow.storage.swap import is_generated, write_atomically

STEPS = 40  # more than a replacement has


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
        import itertools, os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from entries import FOREIGN, NEW, OLD, fill, found, locked, replace, touching
        from lora_flow.storage.locks import mend
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
    seen = told_by(script)
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
        patch.setattr("lora_flow.storage.swap._put_back", lambda *args: None)  # what a kill leaves
        patch.setattr("lora_flow.storage.swap._remove", lambda *args: None)
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

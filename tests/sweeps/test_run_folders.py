"""What happens to run folders when disks fill up, processes meet, and people keep things of their own there.

Nothing is solved here: what is written are made-up values, a different one for every number.
"""

import errno
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from entries import touching

from lora_flow import InputError, load_run
from lora_flow.claims.check import write_csv
from lora_flow.cli import main
from lora_flow.cli.status_text import status
from lora_flow.experiments.folder import load_study, store_study
from lora_flow.figures.over_time import save
from lora_flow.figures.shown import save_numbers
from lora_flow.settings import Settings, build_plan, to_table
from lora_flow.storage import folder as store
from lora_flow.storage import reading
from lora_flow.storage.folder import Kind
from lora_flow.storage.locks import holder, locked
from lora_flow.sweeps.run import load_figure, open_runs

ASKED = Settings(m=4, n=5, h=6, alpha=(1e-1, 1e-2), rank=(1,), seeds=4, t1=0.5, saves=3, batch_size=2, devices=1)
OTHER = Settings(m=4, n=5, h=6, alpha=(1e-3,), rank=(2,), seeds=2, t1=1.0, saves=2, batch_size=2, devices=1)
HEX = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def plans():
    return {settings: build_plan(settings) for settings in (ASKED, OTHER)}


def made_up(plan, box):
    lanes = plan.layout.boxes.lanes(box)
    values, empty = {}, plan.empty()
    for number, (name, one) in enumerate(sorted(empty.data_vars.items())):
        rest = one.shape[empty["status"].ndim :]
        drawn = [np.random.default_rng([number, lane]).uniform(1, 99, rest) for lane in lanes]
        values[name] = np.zeros(len(lanes), np.int8) if name == "status" else np.asarray(drawn).astype(one.dtype)
    return values


def solve(out, settings, plans, boxes=None, names=("",), **options):
    plan = plans[settings]
    with open_runs(out, {name: (to_table(settings), plan) for name in names}, **options) as folders:
        for folder in folders.values():
            for box in folder.pending() if boxes is None else boxes:
                folder.write(box, made_up(plan, box))


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, plans):
    out = tmp_path_factory.mktemp("finished") / "run"
    solve(out, ASKED, plans)
    (out / "report.md").write_text("old")
    (out / "figures").mkdir()
    (out / "figures" / "sweep.png").write_text("old")
    return out


@pytest.fixture
def out(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def full_at(step, for_good):
    calls = itertools.count()

    def act():
        number = next(calls)
        if number == step or (for_good and number > step):
            raise OSError(errno.ENOSPC, "No space left on device")

    return act


def steps_of(action):
    calls = itertools.count()
    with touching(lambda: next(calls)):
        action()
    return next(calls)


def test_a_disk_that_is_full_while_a_run_is_replaced_leaves_the_old_or_the_new(finished, tmp_path, plans):
    """At thirty steps, more of them where the new takes the old one's place: once, or from then on, in turns."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    whole = contents(finished)
    total = steps_of(lambda: solve(out, OTHER, plans, [], overwrite=True))
    assert total > 100
    states, failed = [], 0
    for step in [*np.linspace(0, total - 19, 12).astype(int), *range(total - 18, total)]:
        shutil.rmtree(out)
        shutil.copytree(finished, out)
        with touching(full_at(step, len(states) % 2)):
            try:
                solve(out, OTHER, plans, [], overwrite=True)
            except OSError as error:
                failed += error.errno == errno.ENOSPC
        dataset = load_run(out, partial=True)  # mends what a disk that stays full has kept from being put back
        with locked(out):  # removes what threads of zarr have written since
            pass
        states.append("new" if dataset.sizes["time"] == 2 else "old")
        if states[-1] == "old":
            assert contents(out) == whole
    assert len(states) == 30
    assert states == sorted(states, reverse=True)  # the old up to one step, the new from there on
    assert set(states[-18:]) == {"old", "new"}
    assert failed >= states.count("old")
    assert not (out / "report.md").exists()
    solve(out, OTHER, plans, resume=True)
    assert load_run(out).sizes["time"] == 2


def test_a_disk_that_is_full_while_a_batch_is_written_loses_that_batch(finished, tmp_path, plans):
    total = steps_of(lambda: solve(tmp_path / "count", ASKED, plans, [0]))
    made = steps_of(lambda: solve(tmp_path / "made", ASKED, plans, []))
    assert total - made > 50
    solve(tmp_path / "started", ASKED, plans, [0, 1])
    for step in np.linspace(0, total - made - 1, 4).astype(int):
        out = tmp_path / "run"
        shutil.copytree(tmp_path / "started", out)
        plan = plans[ASKED]
        opened = open_runs(out, {"": (to_table(ASKED), plan)}, resume=True)
        with opened as folders, touching(full_at(step, True)), suppress(OSError):
            folders[""].write(2, made_up(plan, 2))
        assert int((load_run(out, partial=True)["status"] == 0).sum()) in (4, 6)
        solve(out, ASKED, plans, resume=True)
        xr.testing.assert_identical(load_run(out), load_run(finished))
        shutil.rmtree(out)


def test_the_runs_of_a_figure_are_replaced_together(tmp_path, plans):
    """The second cannot be made: the first is not lost."""
    out = tmp_path / "figure"
    solve(out, ASKED, plans, names=("a", "b"))
    (out / "report.md").write_text("old")
    (out / "a" / "notes.txt").write_text("mine")
    whole = contents(out)
    total = steps_of(lambda: solve(tmp_path / "count", OTHER, plans, [], names=("a", "b")))
    for step in (total // 3, 2 * total // 3, *range(total - 15, total, 4)):
        failed = True
        with touching(full_at(step, False)), suppress(OSError):
            solve(out, OTHER, plans, [], names=("a", "b"), overwrite=True)
            failed = False
        with locked(out):
            pass
        if not failed:
            break
        assert contents(out) == whole
    solve(out, OTHER, plans, names=("a", "b"), overwrite=True)
    assert [load_run(out / name).sizes["time"] for name in "ab"] == [2, 2]
    assert (out / "a" / "notes.txt").read_text() == "mine"
    assert not (out / "report.md").exists()


def test_a_run_that_took_anothers_place_is_not_written_into(out, tmp_path, plans):
    """A process that was paused while somebody removed its folder by hand, or where there are no locks."""
    plan = plans[ASKED]
    solve(tmp_path / "new", OTHER, plans)
    with open_runs(out, {"": (to_table(ASKED), plan)}, resume=True) as folders:
        shutil.rmtree(out / "results.zarr")
        shutil.copytree(tmp_path / "new" / "results.zarr", out / "results.zarr")
        before = contents(out)
        with pytest.raises(InputError, match="must stay in place while its run is solved, got another run's, or none"):
            folders[""].write(0, made_up(plan, 0))
        assert contents(out) == before
        shutil.rmtree(out / "results.zarr")
        with pytest.raises(InputError, match="must stay in place"):
            folders[""].write(0, made_up(plan, 0))
        assert not (out / "results.zarr").exists()


def test_a_run_is_read_and_its_lanes_are_summed_once_to_be_resumed(out, plans, monkeypatch):
    whole, reads, sums = load_run(out), [], []
    read, lane_sums = store.read, reading.lane_sums
    monkeypatch.setattr(store, "read", lambda path, *how: reads.append(path) or read(path, *how))
    monkeypatch.setattr(reading, "lane_sums", lambda *of: sums.append(of) or lane_sums(*of))
    (out / "results.zarr" / "loss" / "0.0.0.1.0").write_bytes(b"")
    with open_runs(out, {"": (to_table(ASKED), plans[ASKED])}, resume=True) as folders:
        assert (len(reads), len(sums)) == (1, 4)
        (box,) = folders[""].pending()
        folders[""].write(box, made_up(plans[ASKED], box))
    xr.testing.assert_identical(load_run(out), whole)


@contextmanager
def replaced_slowly(act):
    """Within, a thread does `act`, and every rename of it takes longer than a reader waits for a lock."""
    rename, patch, failed = Path.rename, pytest.MonkeyPatch(), []
    patch.setattr(Path, "rename", lambda *args: [time.sleep(0.07), rename(*args)][1])

    def run():
        try:
            act()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()
        patch.undo()
    assert not failed


@pytest.mark.parametrize("names", [("",), ("a", "b")], ids=["run", "figure"])
def test_who_reads_while_a_run_is_replaced_reads_the_old_or_the_new(tmp_path, plans, names):
    out, seen, figure = tmp_path / "run", [], {"figure": "3" if "a" in names else ""}
    solve(out, ASKED, plans, names=names, attrs=figure)
    old, new = load_run(out / names[0]), None
    with replaced_slowly(lambda: solve(out, OTHER, plans, names=names, overwrite=True, attrs=figure)) as replacing:
        while replacing.is_alive() or new is None:
            if not replacing.is_alive():
                new = load_run(out / names[0])
            one = load_run(out / names[0], partial=True)
            _, runs = load_figure(out, partial=True)
            assert sorted(runs) == sorted(names)
            seen.append([part.sizes["time"] for part in (one, *runs.values())])
            assert "lanes done" in status(out)
    for first, *rest in seen:
        assert len(set(rest)) == 1
        assert first >= rest[0]
    assert seen == sorted(seen, reverse=True)
    assert (old.sizes["time"], new.sizes["time"]) == (3, 2)


def test_who_reads_a_run_that_stays_half_replaced_is_told_so_in_one_line(out, plans, monkeypatch):
    """By a process that was stopped; killed ones are mended."""
    go_on, rename = threading.Event(), Path.rename

    def stopped(path, to):
        moved = rename(path, to)
        return moved if path.name != "settings.toml" else go_on.wait(60)

    monkeypatch.setattr(store, "_REPLACED_WITHIN", 0.2)
    monkeypatch.setattr(Path, "rename", stopped)
    replacing = threading.Thread(target=lambda: solve(out, OTHER, plans, [], overwrite=True))
    replacing.start()
    try:
        while (out / "settings.toml").exists():
            time.sleep(0.01)
        with pytest.raises(InputError, match=r"run' must stay in place while it is read, got one that is being replac"):
            load_run(out)
    finally:
        go_on.set()
        replacing.join()
    assert load_run(out, partial=True).sizes["time"] == 2


@pytest.mark.parametrize("flags", [["--resume"], ["--overwrite", "--rank", "1"]])
def test_a_second_process_is_refused_in_one_line(out, flags, capsys):
    script = (
        f"from lora_flow.storage.locks import locked\nwith locked({str(out)!r}): print('held', flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    before = contents(out)
    try:
        assert main(["sweep", "--out", str(out), *flags]) == 2
    finally:
        other.kill()
        other.communicate()
    said = capsys.readouterr().err
    assert f"lora-flow: '{out}' must be written by one process at a time, got one that process {other.pid} on" in said
    assert said.count("\n") == 1
    assert contents(out) == before
    load_run(out)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("results.zarr.bak", "folder"),
        ("results.zarr.x", "file"),
        ("results.zarr.old", "link"),
        (f"results.zarr.{HEX}", "folder"),
    ],
)
def test_what_people_keep_beside_their_results_stays_and_blocks_nothing(out, tmp_path, plans, name, kind):
    mine = out / name
    if kind == "folder":
        shutil.copytree(out / "results.zarr", mine)
    elif kind == "file":
        mine.write_text("mine")
    else:
        mine.symlink_to(tmp_path / "nowhere")
    solve(out, ASKED, plans, resume=True)
    solve(out, OTHER, plans, overwrite=True)
    assert load_run(out).sizes["time"] == 2
    shutil.rmtree(out / "results.zarr")
    (out / "settings.toml").unlink()
    (out / "figures").rmdir()
    solve(out, OTHER, plans)  # only what is mine was left
    assert mine.is_symlink() or mine.exists()
    if kind == "folder":
        assert len(contents(mine)) > 50


def test_studies_are_replaced_whole_and_prove_themselves(tmp_path):
    out = tmp_path / "study"
    first, second = (xr.Dataset({"x": ("seed", [n, 0.0])}, {"seed": [0, 1]}) for n in (1.0, 2.0))
    for dataset in (first, second):
        with locked(out):
            store_study(out, "scaling", 2, dataset)
        xr.testing.assert_identical(load_study(out), dataset)
    for partial in (False, True):
        with pytest.raises(InputError, match=r"'.*' must hold a sweep, got results of another kind"):
            load_run(out, partial)
    for step in range(0, 60, 4):
        with touching(full_at(step, False)), suppress(OSError), locked(out):
            store_study(out, "scaling", 2, first)
        assert float(load_study(out)["x"][0]) in (1.0, 2.0)
    for damaged in (out / "results.zarr").rglob("*"):
        if damaged.is_file():
            content = damaged.read_bytes()
            damaged.write_bytes(content[:-1])
            with pytest.raises(InputError, match=r"must be as it was written, got .*; --overwrite runs it again"):
                load_study(out)
            damaged.write_bytes(content)


def test_plot_keeps_others_from_replacing_a_run_meanwhile_and_goes_on_beside_one_that_is_at_work(out, monkeypatch):
    found = []
    monkeypatch.setattr("lora_flow.cli.plot.draw", lambda path, partial: found.append(holder(path)) or 0)
    assert main(["plot", str(out)]) == 0
    assert found[0].startswith(f"process {os.getpid()} on ")
    assert holder(out) == ""
    with locked(out):
        assert main(["plot", str(out)]) == 0
    assert len(found) == 2


def test_a_study_is_not_begun_in_a_folder_that_somebody_has_made_since(tmp_path, monkeypatch, capsys):
    out, checked = tmp_path / "study", []

    def check(kind, path, overwrite):
        free(kind, path, overwrite)
        if not checked:
            out.mkdir()
            (out / "thesis.tex").write_text("years of work")
        checked.append(path)

    free = Kind.check_free
    monkeypatch.setattr(Kind, "check_free", check)
    monkeypatch.setattr("lora_flow.experiments.folder.begin_study", lambda *_: pytest.fail("begun"))
    assert main(["figure", "scaling", "--out", str(out)]) == 2
    assert "out must be a new folder or a figure's" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.png", lambda folder: save({"a": plt.figure()}, folder)),
        ("a.json", lambda folder: save_numbers({"a": plt.figure()}, folder)),
        ("theory.csv", lambda folder: write_csv([], folder / "theory.csv")),
    ],
    ids=["picture", "numbers", "table"],
)
def test_a_disk_that_is_full_leaves_the_old_picture_or_table(tmp_path, monkeypatch, name, write):
    (tmp_path / name).write_text("old")
    with monkeypatch.context() as patch:

        def full(handle):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path)
    plt.close("all")
    assert contents(tmp_path) == {name: b"old"}
    write(tmp_path)
    assert (tmp_path / name).read_bytes() != b"old"
    assert len(contents(tmp_path)) == 1
    plt.close("all")

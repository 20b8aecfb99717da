"""A program that was kept is not traced again; no other file is taken for it, and none is needed."""

import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import SingleLayer
from lora_flow.dynamics.batch import lane_sharding
from lora_flow.dynamics.measurements import principal_directions
from lora_flow.runtime import compiling, kept_files, kept_programs, start
from lora_flow.settings import Settings, build_plan

PROBLEM = SingleLayer(np.diag([3.0, 2.0, 1.0]))


def _directions(problem):
    return {"problem": problem, "directions": principal_directions(problem)}


def _other(problem):
    return problem


_other.__module__ = _directions.__module__ = (
    "lora_flow.runtime"  # without what these tests wrap around the package's own functions
)
directions = compiling.compiled()(_directions)


@pytest.fixture(autouse=True)
def folder(tmp_path):
    compiling._programs.clear()
    kept_programs.start(tmp_path / "lowered")
    yield tmp_path / "lowered"
    kept_programs.stop()
    compiling._programs.clear()


@pytest.fixture
def traced(monkeypatch):
    """The names of the programs that are traced to be kept."""
    names, exported = [], kept_programs._exported

    def counted(program, arrays):
        names.append(program.__name__)
        return exported(program, arrays)

    monkeypatch.setattr(kept_programs, "_exported", counted)
    return names


def anew(problem=PROBLEM):
    """The result of a process that has just begun."""
    compiling._programs.clear()
    return directions(problem)


def test_what_was_traced_once_is_read(folder, traced):
    first, second = anew(), anew()
    assert traced == ["_directions"]
    assert len(list(folder.iterdir())) == 1
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))
    kept_programs.stop()
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(anew())))
    np.testing.assert_array_equal(first["directions"][0].left, [1, 0, 0])


def test_the_results_go_with_arrays_on_several_devices():
    left = anew()["directions"][0].left
    spread = jax.device_put(jnp.ones(4), lane_sharding(tuple(jax.devices()[:2])))
    assert len(spread.devices()) == 2
    np.testing.assert_array_equal(spread[:, None] * left[None], np.ones((4, 1)) * [[1, 0, 0]])


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def change(file):
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


def give_away(file):
    file.chmod(0o666)


def link(file):
    file.rename(file.with_suffix(".elsewhere"))
    file.symlink_to(file.with_suffix(".elsewhere"))


def replace_by_a_pipe(file):
    file.unlink()
    os.mkfifo(file)


def take_another(file):
    """The program of another shape."""
    anew(SingleLayer(np.ones((2, 2))))
    (other,) = set(file.parent.iterdir()) - {file}
    shutil.copyfile(other, file)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("spoil", [cut, change, empty, give_away, link, replace_by_a_pipe, take_another])
def test_a_file_that_is_not_what_was_written_is_not_read_and_replaced(folder, traced, spoil):
    first = anew()
    (file,) = folder.iterdir()
    good = file.read_bytes()
    spoil(file)
    traced.clear()
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(anew())))
    assert traced == ["_directions"]
    assert kept_programs._read(file) is not None
    assert not file.is_symlink()
    assert len(file.read_bytes()) == len(good)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users of POSIX")
def test_a_file_of_another_user_is_not_read(folder, traced, monkeypatch):
    anew()
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    anew()
    assert len(traced) == 2


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    kept_programs.start(tmp_path / "file")
    np.testing.assert_array_equal(anew()["directions"][0].left, [1, 0, 0])
    assert capfd.readouterr() == ("", "")


def refuse(file):
    raise PermissionError(file)


def test_what_may_only_be_read_is_read(folder, traced, monkeypatch):
    anew()
    monkeypatch.setattr(os, "utime", refuse)
    anew()
    assert traced == ["_directions"]


def test_what_was_traced_of_another_source_than_the_keys_is_not_written(folder, monkeypatch):
    monkeypatch.setattr(kept_programs, "_source_digest", lambda: "edited since")
    np.testing.assert_array_equal(anew()["directions"][0].left, [1, 0, 0])
    assert not folder.exists()


KEYS = """
from pathlib import Path
from lora_flow.runtime import kept_programs, start
start.start_jax()
kept_programs.start(Path("programs"))
from lora_flow.settings import Settings, build_plan
place = kept_programs.place
def told(function, *arguments):
    print(place(function, *arguments))
    if function.__name__ == "solve_round":
        raise SystemExit
kept_programs.place = told
next(build_plan(Settings(alpha=(1e-2,), rank=(2,), seeds=2, saves=5, m=4, n=5, h=6)).solve())
"""


def test_keys_are_the_same_in_every_process():
    """Nothing in them depends on the seed of Python's hashes, or on where objects lie in memory."""
    told = [
        subprocess.run([sys.executable, "-c", KEYS], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True)
        for seed in ("1", "2")
    ]
    assert told[0].stdout == told[1].stdout
    assert b"programs/solve_round-" in told[0].stdout
    assert b"None" not in told[0].stdout


def files_of(*arguments):
    return kept_programs.place(_directions, *arguments)


def test_all_that_a_program_depends_on_has_a_file_of_its_own(monkeypatch):
    structure = jax.tree.structure(PROBLEM)
    of_three = files_of(structure, [jnp.ones(3)], ["a"])
    assert files_of(structure, [jnp.zeros(3)], ["a"]) == of_three
    others = [
        files_of(structure, [jnp.ones(4)], ["a"]),
        files_of(structure, [jnp.ones(3, int)], ["a"]),
        files_of(structure, [jnp.ones(3)], ["b"]),
        files_of(structure, [jnp.ones(3)], [jnp.sin]),
        files_of(structure, [jnp.ones(3)], [functools.partial(jnp.sin, 2)]),
        files_of(jax.tree.structure((PROBLEM,)), [jnp.ones(3)], ["a"]),
        kept_programs.place(_other, structure, [jnp.ones(3)], ["a"]),
    ]
    with monkeypatch.context() as patch:
        patch.setenv("EQX_ON_ERROR", "raise")
        others.append(files_of(structure, [jnp.ones(3)], ["a"]))
    with monkeypatch.context() as patch:
        patch.setattr(kept_programs, "_packages", lambda: "other source")
        others.append(files_of(structure, [jnp.ones(3)], ["a"]))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 99)
        others.append(files_of(structure, [jnp.ones(3)], ["a"]))
    assert None not in others
    assert len({of_three, *others}) == 1 + len(others)


class Own(SingleLayer):
    pass


@pytest.mark.parametrize("static", [lambda: None, anew, Own, object(), np.float64, functools.partial(anew)])
def test_what_the_source_does_not_tell_is_not_kept(static, folder):
    known = static is np.float64
    assert (files_of(jax.tree.structure(PROBLEM), [], [static]) is not None) == known


def test_a_problem_of_ones_own_is_not_kept(folder):
    np.testing.assert_array_equal(anew(Own(np.diag([3.0, 2.0, 1.0])))["directions"][0].left, [1, 0, 0])
    assert not folder.exists()


def test_a_part_of_another_program_is_not_kept(folder):
    jax.jit(directions)(PROBLEM)
    assert not folder.exists()


def test_no_more_are_kept_than_most(folder, monkeypatch):
    monkeypatch.setattr(kept_files, "MOST", 2)
    for name in "abc":
        kept_files.write(folder / name, b"content")
        os.utime(folder / name, (ord(name), ord(name)))
    assert {file.name for file in folder.iterdir()} == {"b", "c"}


def test_nothing_is_kept_once_programs_are_to_be_forgotten():
    compiling.forget()
    assert not kept_programs.is_on()


def test_only_a_process_of_ours_keeps_programs(monkeypatch):
    kept_programs.stop()
    start.start_jax()
    assert not kept_programs.is_on()
    monkeypatch.setattr(start, "_own", [True])
    start.start_jax()
    assert kept_programs.is_on()


def test_a_sweep_of_other_values_compiles_nothing(caplog):
    kept_programs.stop()
    settings = Settings(alpha=(1e-2,), rank=(2,), seeds=2, saves=5, m=4, n=5, h=6, solver="Tsit5")
    others = {"alpha": (1e-3,), "seeds": (7, 5), "t1": 3.0, "rtol": 1e-4, "delta_w": (0.3,), "problem_seed": (4,)}
    with jax.log_compiles():
        for values in ({}, others):
            caplog.clear()
            plan = build_plan(settings.__class__(**vars(settings) | values))
            plan.outline()
            ((_, solved),) = plan.solve()
            assert solved["status"].tolist() == [0, 0]
    assert [line for line in caplog.messages if line.startswith("Compiling")] == []

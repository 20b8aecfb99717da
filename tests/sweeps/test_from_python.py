"""Run folders of Python's `sweep`."""

import jax
import jax.numpy as jnp
import pytest
import xarray as xr

from lora_flow import InputError, SingleLayer, aligned_problem, extend, load_run, sweep
from lora_flow.cli import main
from lora_flow.settings import Settings, build_plan, to_table
from lora_flow.storage.folder import read_settings
from lora_flow.sweeps import run

HOW = {"alpha": (1e-1, 1e-2), "rank": 1, "seeds": 7, "t1": 0.5, "saves": 3, "batch_size": 2}


@pytest.fixture(scope="module")
def problem():
    return aligned_problem(jax.random.key(0), m=4, n=5, h=6)


@pytest.fixture(scope="module")
def whole(problem):
    return sweep(problem, **HOW)


@pytest.fixture
def unfinished(problem, tmp_path, monkeypatch):
    """A folder of whose boxes two are stored."""
    write, written = run.Folder.write, []

    def stops(folder, number, values):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        write(folder, number, values)

    monkeypatch.setattr(run.Folder, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        sweep(problem, **HOW, out=tmp_path / "run")
    monkeypatch.undo()
    return tmp_path / "run"


def test_the_same_call_goes_on_and_then_returns_what_is_stored(problem, whole, unfinished, monkeypatch):
    before = (load_run(unfinished, partial=True)["status"] == 0).values
    assert 0 < before.sum() < before.size
    done = sweep(problem, **HOW, out=unfinished)
    xr.testing.assert_equal(done, whole)
    monkeypatch.setattr(run.Folder, "write", None)  # nothing is solved any more
    xr.testing.assert_identical(sweep(problem, **HOW, out=str(unfinished)), done)
    xr.testing.assert_identical(load_run(unfinished), done)


def test_another_run_is_refused_and_replaced_where_that_is_asked_for(problem, whole, tmp_path):
    sweep(problem, **HOW, out=tmp_path / "run")
    with pytest.raises(InputError, match=r"^t1 must be 0\.5, as '.*run' was started, to resume it, got 0\.6"):
        sweep(problem, **HOW | {"t1": 0.6}, out=tmp_path / "run")
    with pytest.raises(InputError, match=r"^problem must be the one that '.*run' was started with"):
        sweep(aligned_problem(jax.random.key(1), m=4, n=5, h=6), **HOW, out=tmp_path / "run")
    xr.testing.assert_equal(load_run(tmp_path / "run"), whole)
    other = sweep(problem, **HOW | {"t1": 0.6}, out=tmp_path / "run", overwrite=True)
    assert other.attrs["t1"] == 0.6
    xr.testing.assert_identical(load_run(tmp_path / "run"), other)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"^out must be a folder, got the file"):
        sweep(problem, **HOW, out=tmp_path / "file", overwrite=True)


def test_the_call_with_further_values_extends(problem, unfinished):
    """What was stored keeps its bits; the same call, and one in the run's own order, then return the larger run."""
    before = load_run(unfinished, partial=True)
    larger = HOW | {"alpha": (1e-3, 1e-1, 1e-2), "seeds": 9, "init": ("spectral", "gaussian")}
    grown = sweep(problem, **larger, out=unfinished, extend=True)
    assert list(grown.alpha.values) == [1e-1, 1e-2, 1e-3]
    assert list(grown.init.values) == ["gaussian", "spectral"]
    assert grown.sizes["seed"] == 9
    assert (grown["status"] == 0).all()
    held = before["status"] == 0
    assert (
        (grown["loss"].sel(init=["gaussian"], alpha=before.alpha, seed=before.seed) == before["loss"])
        .where(held, True)
        .all()
    )
    alone = sweep(problem, **larger)
    xr.testing.assert_allclose(grown, alone.sel(init=grown.init, alpha=grown.alpha), rtol=1e-6)
    same = larger | {"alpha": tuple(grown.alpha.values), "init": tuple(grown.init.values)}
    xr.testing.assert_identical(sweep(problem, **same, out=unfinished), grown)
    xr.testing.assert_identical(sweep(problem, **larger, out=unfinished, extend=True), grown)


def test_what_cannot_be_extended(problem, unfinished, tmp_path):
    with pytest.raises(InputError, match=r"^seeds must hold all that '.*run' has, to extend it, got none of \[6\]"):
        sweep(problem, **HOW | {"seeds": 6}, out=unfinished, extend=True)
    with pytest.raises(InputError, match=r"^t1 must be 0\.5, as '.*run' was started"):
        sweep(problem, **HOW | {"seeds": 8, "t1": 0.6}, out=unfinished, extend=True)
    asked = Settings(m=4, n=5, h=6, rank=(1,), alpha=(0.1,), seeds=1, t1=0.5, saves=3, batch_size=2)
    with run.open_runs(tmp_path / "other", {"": (to_table(asked), build_plan(asked))}):
        pass
    with pytest.raises(InputError, match=r"^'.*other' must be extended by lora_flow\.extend, as a command's run"):
        sweep(problem, **HOW, out=tmp_path / "other", extend=True)


def test_a_command_says_that_python_goes_on(unfinished, capsys):
    assert main(["sweep", "--out", str(unfinished), "--resume"]) == 2
    must = f"'{unfinished}' must be continued from Python, by the call of sweep that has started it"
    assert capsys.readouterr().err == f"lora-flow: {must}, got a command\n"
    with pytest.raises(InputError, match="must be extended by the call of sweep that has started it, with extend=True"):
        extend(unfinished, seeds=9)
    with pytest.raises(InputError, match=r"finish it with: sweep\(\.\.\., out='.*run'\) in Python$"):
        load_run(unfinished)
    assert main(["status", str(unfinished)]) == 0
    assert f"not finished; continue with: sweep(..., out='{unfinished}') in Python\n" in capsys.readouterr().out
    assert main(["sweep", "--out", str(unfinished)]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    run.SWEEP.check_free(unfinished, overwrite=True)


def test_the_folder_is_drawn_and_reported(problem, tmp_path, capsys):
    sweep(problem, **HOW, out=tmp_path / "run")
    assert main(["plot", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/report.md").read_text().startswith("#")
    assert "report: " in capsys.readouterr().out


def test_words_that_do_not_go_together(problem):
    with pytest.raises(InputError, match=r"^overwrite must be left out without out, got True"):
        sweep(problem, **HOW, overwrite=True)
    with pytest.raises(InputError, match=r"^extend must be left out without out, got True"):
        sweep(problem, **HOW, extend=True)
    with pytest.raises(InputError, match=r"^overwrite and extend must not be given together, got both"):
        sweep(problem, **HOW, out="run", overwrite=True, extend=True)
    with pytest.raises(InputError, match=r"^client and executor must not be given together, got both"):
        sweep(problem, **HOW, client=1, executor=2)
    with pytest.raises(InputError, match=r"^client must be a dask\.distributed\.Client, got 3"):
        sweep(problem, **HOW, client=3)


def test_other_shapes_of_problems(tmp_path):
    several, how = {"a": SingleLayer(jnp.eye(3)), "b": SingleLayer(2 * jnp.eye(3))}, HOW | {"seeds": (3, 1)}
    stored = sweep(several, **how, out=tmp_path / "run")
    told = read_settings(tmp_path / "run")
    assert (told["seeds"], told["problems"], told["problem_class"]) == ([3, 1], ["a", "b"], "SingleLayer")
    xr.testing.assert_equal(stored, sweep(several, **how))

"""Sweeps of gradient descent: lanes over optimiser, step size, noise, alpha, rank and seed."""

import pickle
import shutil

import jax
import numpy as np
import optax
import pytest
import xarray as xr

import lora_flow
from lora_flow import (
    InputError,
    SingleLayer,
    aligned_problem,
    descend,
    extend,
    gradient_noise,
    load_run,
    phases,
    solve,
    sweep,
    time_to,
)
from lora_flow.cli import main
from lora_flow.dynamics.ways import NOISE
from lora_flow.figures import plot_loss
from lora_flow.initialization import initialize
from lora_flow.settings import Settings, build_plan, from_table, to_table
from lora_flow.storage.folder import read_settings
from lora_flow.sweeps import run
from lora_flow.sweeps.descents import parse_descents
from lora_flow.sweeps.pickling import pickled

PROBLEM = SingleLayer(np.random.default_rng(0).normal(size=(6, 5)), scaling=2.0)
MAKERS = {"adam": optax.adam, "sign": optax.sign_sgd, "gd": optax.sgd}
TEXTS = [f"{name}:{step}" for name in MAKERS for step in (0.01, 0.02)]
AXES = {"alpha": (0.1, 1.0), "rank": (1, 3), "seeds": 2}
HOW = {"steps": 30, "saves": 4, "progress": False}


@pytest.fixture(scope="module")
def dataset():
    return sweep(PROBLEM, **AXES, **HOW, descend=TEXTS, gradient_noise=(0.0, 0.5), batch_size=7)


def test_dimensions_and_labels_are_as_documented(dataset):
    dims = ("init", "optimizer", "step", "gradient_noise", "alpha", "rank", "seed")
    assert dataset["loss"].dims == (*dims, "iteration")
    assert dataset["status"].dims == dims
    assert list(dataset["optimizer"].values) == list(MAKERS)
    np.testing.assert_array_equal(dataset["step"], [0.01, 0.02])
    np.testing.assert_array_equal(dataset["iteration"], [0, 10, 20, 30])
    assert dataset["iteration"].attrs["long_name"] == "iteration"
    assert "time" not in dataset.variables
    assert "t1" not in dataset.attrs
    assert dataset.attrs["steps"] == 30
    assert (dataset["steps"] == 30).all()
    assert (dataset["status"] == 0).all()
    one = sweep(PROBLEM, descend="gd:0.1", steps=2, saves=[0, 2], progress=False)
    assert one["loss"].dims == ("init", "alpha", "rank", "seed", "iteration")
    told = {name: one.attrs[name] for name in ("optimizer", "step", "gradient_noise", "steps")}
    assert told == {"optimizer": "gd", "step": 0.1, "gradient_noise": 0.0, "steps": 2}


def test_every_lane_is_the_descent_of_its_labels(dataset):
    for name, step, noise, alpha, rank, seed in (
        ("adam", 0.01, 0.0, 0.1, 1, 0),
        ("adam", 0.02, 0.5, 1.0, 3, 1),
        ("sign", 0.02, 0.0, 0.1, 3, 1),
        ("gd", 0.01, 0.5, 1.0, 1, 0),
    ):
        start = initialize("gaussian", jax.random.key(seed), PROBLEM, rank=rank, alpha=alpha, side="A")
        key = jax.random.fold_in(jax.random.key(seed), NOISE)
        noisy = [gradient_noise(noise, key, PROBLEM.scaling)] if noise else []
        alone = descend(PROBLEM, start, steps=30, step=optax.chain(*noisy, MAKERS[name](step)), saves=4)
        lane = dataset.sel(optimizer=name, step=step, gradient_noise=noise, alpha=alpha, rank=rank, seed=seed)
        for variable in ("loss", "norm_z1"):
            np.testing.assert_allclose(lane[variable].squeeze(), alone.observables[variable], rtol=1e-9)


def test_gradient_descent_with_small_steps_is_the_flow():
    problem = aligned_problem(jax.random.key(0), m=4, n=5, h=6)
    swept = sweep(problem, alpha=0.1, rank=2, descend="gd:1e-4", steps=5000, saves=6, details=True, progress=False)
    start = initialize("gaussian", jax.random.key(0), problem, rank=2, alpha=0.1, side="A")
    flow = solve(problem, start, t1=0.5, saves=6)
    np.testing.assert_allclose(np.log10(swept["loss"].squeeze()), np.log10(flow.observables["loss"]), atol=0.01)
    assert swept["update_singular_values"].dims[-2:] == ("iteration", "mode")
    spans, flowed = phases(swept), phases(sweep(problem, alpha=0.1, rank=2, t1=0.5, saves=6, progress=False))
    assert spans["t_align"].item() * 1e-4 == pytest.approx(flowed["t_align"].item(), rel=0.01)
    assert np.isnan(spans["t1_predicted"])  # of the flow's time
    loss = swept["loss"].squeeze(drop=True)
    assert 0 < float(time_to(loss, loss[0].item() / 2)) < 5000


def test_a_lane_that_diverges_does_not_harm_the_others():
    swept = sweep(PROBLEM, alpha=0.1, rank=2, descend=("gd:1e-2", "gd:10"), steps=200, saves=3, progress=False)
    assert swept["status"].squeeze().values.tolist() == [0, 2]
    assert np.isfinite(swept["loss"].sel(step=0.01)).all()
    assert np.isnan(swept["loss"].sel(step=10.0).isel(iteration=-1)).all()


def test_a_plan_is_solved_to_the_same_bits_where_workers_open_it():
    settings = Settings(m=4, n=5, h=6, alpha=(0.1,), rank=(1,), seeds=3, descend=("adam:1e-2",), steps=9, saves=4)
    plan = build_plan(settings)
    ((_, here),), ((_, there),) = plan.solve(), pickle.loads(pickled("a plan", plan)).solve()
    for name, values in here.items():
        np.testing.assert_array_equal(values, there[name])


@pytest.mark.parametrize(
    ("texts", "line"),
    [
        (["adam"], "descend must be optimisers with positive step sizes, such as adam:1e-3"),
        (["adam:-1"], "descend must be optimisers with positive step sizes"),
        (["adam:1e-3:1e-2"], "descend must be optimisers with positive step sizes"),
        (["adam:1e-3:1e-2:1"], "descend must be optimisers with positive step sizes"),
        (["adam:nan"], "descend must be optimisers with positive step sizes"),
        ([3], "descend must be optimisers with positive step sizes"),
        (["adam:1", "adam:1.0"], "descend must name each value once, got adam:1, adam:1"),
        (
            ["gd:0.1", "adam:1e-3"],
            "descend must give every optimiser the same step sizes, or be several sweeps, got gd",
        ),
    ],
)
def test_texts_that_are_no_optimisers_are_refused(texts, line):
    with pytest.raises(InputError) as refused:
        parse_descents(texts)
    assert str(refused.value).startswith(line)


def test_a_range_of_step_sizes_has_equal_ratios():
    names, steps = parse_descents(["adam:1e-4:1e-2:5", "sign:1e-4:1e-2:5"])
    assert names == ("adam", "sign")
    np.testing.assert_allclose(np.diff(np.log10(steps)), 0.5, rtol=1e-12)
    assert (steps[0], steps[2], steps[-1]) == (1e-4, 1e-3, 1e-2)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"t1": 1.0}, "t1 must be left out with descend, got 1.0"),
        ({"flow": "scaled"}, "flow must be left out with descend, got scaled"),
        ({"solver": "Tsit5"}, "solver must be left out with descend, got Tsit5"),
        ({"rtol": 1e-3}, "rtol must be left out with descend, got 0.001"),
        ({"max_steps": 7}, "max_steps must be left out with descend, got 7"),
        ({"steps": None}, "steps must be given with descend, got None"),
        ({"steps": 0}, "steps must lie between 1 and 2147483647, got 0"),
        ({"saves": [0, 31]}, "saves must be at most steps = 30, got 31"),
        ({"descend": "rmsprop:0.1"}, "the optimiser of descend must be 'gd', 'sign' or 'adam', got 'rmsprop'"),
        ({"descend": []}, "descend must hold at least one value, got none"),
        ({"descend": None}, "steps must be left out without descend, got 30"),
        ({"descend": None, "steps": None}, "t1 must be given for a flow"),
        ({"descend": None, "steps": None, "t1": 1.0, "gradient_noise": 0.1}, "gradient_noise must be left out without"),
    ],
)
def test_arguments_that_make_no_sense_together_are_refused(given, line):
    with pytest.raises(InputError) as refused:
        sweep(PROBLEM, **{"alpha": 0.1, "rank": 1, "descend": "adam:1e-3", **HOW} | given)
    assert str(refused.value).startswith(line)


WORDS = ["--m", "4", "--n", "5", "--h", "6", "--alpha", "1e-1", "1e-2", "--rank", "1", "--seeds", "3", "--saves", "5"]
DESCENT = ["--descend", "adam:1e-2,adam:2e-2", "--steps", "20", "--batch-size", "2"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--t1", "3"], "t1 must be left out with descend, got 3.0"),
        (["--spacing", "log"], "spacing must be left out with descend, got log"),
        (["--flow", "scaled"], "flow must be left out with descend, got scaled"),
        (["--rtol", "1e-3"], "rtol must be left out with descend, got 0.001"),
        (["--solver", "RKC"], "solver must be left out with descend, got RKC"),
        (["--max-steps", "10"], "max_steps must be left out with descend, got 10"),
        (["--gradient-noise", "-1"], "gradient_noise must be at least 0, got -1.0"),
    ],
)
def test_flags_of_flows_are_refused_with_a_descent(words, line, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["sweep", *WORDS, *DESCENT, *words, "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"lora-flow: {line}\n"
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--steps", "20"], "steps must be left out without descend, got 20"),
        (["--gradient-noise", "0.1"], "gradient_noise must be left out without descend, got (0.1,)"),
        (["--descend", "adam:1e-3"], "steps must lie between 1 and 2147483647, got 0"),
        (["--descend", "adam", "--steps", "2"], "descend must be optimisers with positive step sizes, such as adam"),
    ],
)
def test_flags_of_descents_are_refused_without_one(words, line, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["sweep", *WORDS, *words, "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"lora-flow: {line}")
    assert not out.exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("descents") / "run"
    assert main(["sweep", *WORDS, *DESCENT, "--out", str(out)]) == 0
    return out


def test_a_run_of_the_command_line_is_stored_drawn_and_told(folder, capsys):
    settings = read_settings(folder)
    assert settings["descend"] == ["adam:1e-2", "adam:2e-2"]
    assert not {"t1", "rtol", "solver", "flow", "spacing", "max_steps"} & set(settings)
    assert to_table(from_table(settings, "here")) == settings
    dataset = load_run(folder)
    assert dataset["loss"].dims == ("init", "step", "alpha", "rank", "seed", "iteration")
    assert dataset.attrs["optimizer"] == "adam"
    report = (folder / "report.md").read_text()
    assert "Adam, step size 0.01 to 0.02, 20 iterations" in report
    assert "loss at iteration 20" in report
    assert "the predictions are for the plain gradient flow, and this is gradient descent" in report
    assert " t = " not in report
    assert "gradient-flow time" not in report
    assert sorted(one.name for one in folder.glob("figures/*.png")) == ["sweep-step-0.01.png", "sweep-step-0.02.png"]
    assert plot_loss(dataset.isel(step=0, rank=0)).get_xlabel() == "iteration"
    capsys.readouterr()
    assert main(["status", str(folder)]) == 0
    assert "12 of 12 lanes done" in capsys.readouterr().out
    assert main(["plot", str(folder)]) == 0
    assert "at iteration 20" in capsys.readouterr().out


def test_an_interrupted_run_resumes_to_the_same_bits(folder, tmp_path, monkeypatch):
    write, written = run.Folder.write, []

    def stops(folder, number, values):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        write(folder, number, values)

    out = tmp_path / "run"
    monkeypatch.setattr(run.Folder, "write", stops)
    assert main(["sweep", *WORDS, *DESCENT, "--out", str(out)]) == 1
    monkeypatch.undo()
    assert 0 < int((load_run(out, partial=True)["status"] == 0).sum()) < 12
    assert main(["plot", str(out)]) == 0
    assert main(["sweep", "--out", str(out), "--resume"]) == 0
    xr.testing.assert_identical(load_run(out), load_run(folder))


def test_a_run_grows_along_its_axes_and_not_in_its_steps(folder, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(folder, out)
    grown = extend(out, alpha=1e-3, progress=False)
    xr.testing.assert_equal(grown.sel(alpha=[1e-1, 1e-2])["loss"], load_run(folder)["loss"])
    assert main(["sweep", "--out", str(out), "--extend", "--steps", "30"]) == 2
    assert "steps must be 20, as" in capsys.readouterr().err
    assert main(["sweep", "--out", str(out), "--resume", "--descend", "adam:1e-2"]) == 2
    assert "descend must be ('adam:1e-2', 'adam:2e-2'), as" in capsys.readouterr().err


def test_a_run_of_python_goes_on_and_is_told_apart_from_a_flow(tmp_path):
    how = {"alpha": 0.1, "rank": 1, "seeds": 3, "descend": "sign:1e-2", **HOW, "out": tmp_path / "run"}
    done = sweep(PROBLEM, **how)
    xr.testing.assert_identical(sweep(PROBLEM, **how), done)
    with pytest.raises(
        InputError, match=r"^step must be \(0\.01\), as '.*run' was started, to resume it, got \(0\.02\)"
    ):
        sweep(PROBLEM, **how | {"descend": "sign:2e-2"})
    with pytest.raises(InputError, match=r"must be None, as '.*run' was started, to resume it"):
        sweep(PROBLEM, alpha=0.1, rank=1, seeds=3, t1=1.0, saves=4, out=tmp_path / "run", progress=False)
    assert lora_flow.load_run(tmp_path / "run").attrs["optimizer"] == "sign"

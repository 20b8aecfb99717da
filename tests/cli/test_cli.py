import inspect
import os
import resource
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest

from lora_flow import load_run, sweep
from lora_flow.cli import main
from lora_flow.cli.sweep import describe
from lora_flow.dynamics.integrator import SOLVERS
from lora_flow.settings import Settings, build_plan, from_table, to_table

QUICK = ["--rank", "1", "--m", "4", "--n", "5", "--h", "6", "--t1", "0.5", "--saves", "3", "--batch-size", "2"]


@pytest.mark.parametrize("command", [[], ["sweep"], ["plot"], ["figure"]])
def test_help_teaches_in_under_a_second_and_without_jax(command):
    script = "import sys; from lora_flow.cli import main; assert main() == 0; print('jax' in sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", script, *command, "--help"], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # the processor's time: how busy the machine is otherwise is not the point
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert done.stdout.endswith("False\n")
    assert "lora-flow" in done.stdout
    for example in {"sweep": ["--resume", "--alpha 1e-3 1e-4", "--problem target.npz"], "plot": ["plot runs/demo"]}.get(
        "".join(command), []
    ):
        assert example in " ".join(done.stdout.split())
    assert "default: )" not in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["swep"], "got 'swep' (did you mean 'sweep'?)"),
        ([], "the command must be one of sweep, plot"),
        (["sweep"], "--out"),
        (["sweep", "--out", "OUT", "--alpa", "1"], "did you mean --alpha?"),
        (["sweep", "--out", "OUT", "--alpha", "small"], "--alpha"),
        (["sweep", "--out", "OUT", "--alpha", "0"], "alpha must be positive and finite, got 0.0"),
        (["sweep", "--out", "OUT", "--alpha", "-1e-3"], "alpha must be positive and finite, got -0.001"),
        (["sweep", "--out", "OUT", "--alpha", "nan"], "alpha must be positive and finite, got nan"),
        (["sweep", "--out", "OUT", "--rank", "0"], "rank must lie between 1 and 10"),
        (
            ["sweep", "--out", "OUT", "--rank", "11"],
            "rank must lie between 1 and 10, the smallest layer dimension, got 11",
        ),
        (
            ["sweep", "--out", "OUT", "--init", "spektral"],
            "got 'spektral' (did you mean 'spectral'?)",
        ),
        (["sweep", "--out", "OUT", "--side", "C"], "side must be 'A' or 'B', got 'C'"),
        (["sweep", "--out", "OUT", "--solver", "Tsit6"], "got 'Tsit6' (did you mean 'Tsit5'?)"),
        (["sweep", "--out", "OUT", "--component", "botom"], "got 'botom' (did you mean 'bottom'?)"),
        (["sweep", "--out", "OUT", "--spacing", "lgo"], "spacing must be 'linear' or 'log', got 'lgo'"),
        (["sweep", "--out", "OUT", "--precision", "half"], "precision must be 'double' or 'single', got 'half'"),
        (["sweep", "--out", "OUT", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["sweep", "--out", "OUT", "--t1", "inf"], "t1 must be positive and finite, got inf"),
        (["sweep", "--out", "OUT", "--saves", "1"], "saves must be at least 2"),
        (["sweep", "--out", "OUT", "--delta-w", "0"], "delta_w must be positive, got 0.0"),
        (["sweep", "--out", "OUT", "--problem", "digit"], "got 'digit' (did you mean 'digits'?)"),
        (["sweep", "--out", "OUT", "--problem", "none.npz"], "problem must be a file that exists, got '"),
        (
            ["sweep", "--out", "OUT", "--problem", "digits", "--m", "4"],
            "m must be left out with problem 'digits', got 4",
        ),
        (["sweep", "--out", "OUT", "--problem", "SHAPES"], "w2 must have as many columns as w1 has rows"),
        (["sweep", "--out", "OUT", "--problem", "NAN"], "shift must be finite, got 1 entries that are NaN or infinite"),
        (["sweep", "--out", "OUT", "--config", "none.toml"], "the settings file must exist, got 'none.toml'"),
        (["sweep", "--out", "OUT", "--config", "TOML"], "a setting in"),
        (["sweep", "--out", "OUT", "--resume", "--overwrite"], "resume"),
        (["plot", "OUT"], "the run folder must exist, got"),
        (["figure", "2", "--out", "OUT"], "'learned' or 'elasticities', got '2'"),
    ],
)
def test_bad_input_gets_one_line_and_status_2_and_writes_nothing(flags, message, tmp_path, capsys):
    np.savez(tmp_path / "shapes.npz", w1=np.ones((3, 2)), w2=np.ones((2, 4)), shift=np.ones((2, 2)))
    np.savez(tmp_path / "nan.npz", w1=np.ones((3, 2)), w2=np.ones((2, 3)), shift=np.array([[1, np.nan], [0, 1]]))
    (tmp_path / "bad.toml").write_text("alpa = [1e-3]\n")
    files = {"OUT": "out", "SHAPES": "shapes.npz", "NAN": "nan.npz", "TOML": "bad.toml"}
    before = sorted(os.listdir(tmp_path))
    assert main([str(tmp_path / files[flag]) if flag in files else flag for flag in flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("lora-flow: ")
    assert said.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_single_precision_with_a_tolerance_it_cannot_carry(tmp_path, capsys):
    run = ["sweep", "--out", str(tmp_path / "run"), "--precision", "single", *QUICK]
    try:
        assert main([*run, "--rtol", "1e-6"]) == 2
        assert "rtol must be at least 1e-05 for float32 to carry it, got 1e-06" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        assert main(run) == 0
    finally:
        jax.config.update("jax_enable_x64", True)  # JAX's global switch
    assert load_run(tmp_path / "run").attrs["dtype"] == "float32"


def test_flags_override_the_config_file_which_overrides_the_defaults(tmp_path, capsys):
    config = tmp_path / "config.toml"
    sizes = "rank = 1\nsaves = 3\nm = 4\nn = 5\nh = 6\nbatch_size = 2\nseeds = 4\n"
    config.write_text(f'alpha = [1e-1, 1e-2]\nside = "B"\nt1 = 1\n{sizes}')
    assert (
        main(["sweep", "--out", str(tmp_path / "run"), "--config", str(config), "--t1", "0.5", "--alpha", "1e-3"]) == 0
    )
    capsys.readouterr()
    settings = tomllib.loads((tmp_path / "run" / "settings.toml").read_text())
    assert (settings["alpha"], settings["side"], settings["t1"], settings["init"]) == ([1e-3], ["B"], 0.5, ["gaussian"])
    # the resolved settings are themselves a config file
    assert main(["sweep", "--out", str(tmp_path / "again"), "--config", str(tmp_path / "run" / "settings.toml")]) == 0
    first, second = load_run(tmp_path / "run"), load_run(tmp_path / "again")
    np.testing.assert_array_equal(first["loss"], second["loss"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('alpha = "small"', "alpha must be a number, got 'small'"),
        ("rank = [1.5]", "rank must be an integer, got 1.5"),
        ("seeds = true", "seeds must be an integer, got True"),
        ("side = 1", "side must be a string, got 1"),
    ],
)
def test_values_of_the_wrong_kind_in_a_config_file(tmp_path, capsys, text, message):
    (tmp_path / "c.toml").write_text(text)
    assert main(["sweep", "--out", str(tmp_path / "run"), "--config", str(tmp_path / "c.toml")]) == 2
    assert message in capsys.readouterr().err


def test_settings_survive_a_file():
    settings = Settings(alpha=(1e-3, 0.2), component=("top", "3"), problem="digits")
    assert from_table(to_table(settings), "there") == settings


@pytest.mark.long
def test_every_way_to_name_a_problem_runs(tmp_path):
    draw = np.random.default_rng(0).normal
    np.savez(tmp_path / "t.npz", w1=draw(size=(4, 3)), w2=draw(size=(3, 4)), target=draw(size=(3, 3)))
    for i, problem in enumerate(("digits", str(tmp_path / "t.npz"))):
        flags = ["--problem", problem, "--rank", "2", "--t1", "1", "--saves", "5", "--spacing", "log"]
        assert main(["sweep", "--out", str(tmp_path / f"run{i}"), *flags]) == 0
        dataset = load_run(tmp_path / f"run{i}")
        np.testing.assert_allclose(dataset["time"], [0, 1e-4, 10 ** (-8 / 3), 10 ** (-4 / 3), 1])
        assert dataset.attrs["aligned"] == 0


def test_plot_draws_a_finished_run_again(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["sweep", "--out", str(out), "--side", "A", "B", "--alpha", "1e-1", "1e-2", *QUICK]) == 0
    report = (out / "report.md").read_text()
    for path in [*(out / "figures").iterdir(), out / "report.md"]:
        path.unlink()
    assert main(["plot", str(out)]) == 0
    assert sorted(path.name for path in (out / "figures").iterdir()) == ["sweep-A.png", "sweep-B.png"]
    assert (out / "report.md").read_text() == report
    assert f"report: {out}/report.md" in capsys.readouterr().out


@pytest.mark.long
def test_runs_that_fail_are_reported_and_all_failing_is_status_1(tmp_path, capsys):
    assert main(["sweep", "--out", str(tmp_path / "run"), *QUICK, "--max-steps", "2"]) == 1
    assert "1 of 1 runs ended with status max_steps" in capsys.readouterr().err


@pytest.mark.long
def test_every_solver_offered_runs(tmp_path):
    for solver in SOLVERS:
        assert main(["sweep", "--out", str(tmp_path / solver), *QUICK, "--solver", solver]) == 0


def test_defaults_are_those_of_the_library():
    defaults = {name: parameter.default for name, parameter in inspect.signature(sweep).parameters.items()}
    for name, value in vars(Settings()).items():
        if name in ("descend", "steps"):
            assert not value
            assert defaults[name] is None
        elif name in defaults and name not in ("problem", "t1", "solver"):
            assert defaults[name] == (value[0] if isinstance(value, tuple) else value), name


def test_a_sweep_says_before_it_begins_where_its_flow_may_take_very_long():
    """Undamped LoRA-Muon above the task's rank."""
    how = {"problem": "regression", "m": 6, "n": 5, "target_rank": 1, "init": ("gaussian-both",), "alpha": (0.1,)}
    above, at = (describe(build_plan(Settings(flow="lora-muon", rank=ranks, **how))) for ranks in ((1, 2), (1,)))
    assert above.endswith("or a damping such as lora-muon:1e-3")
    assert "lora-muon" not in at

"""What the command line reads and how it answers: values, versions, memory, and the system's refusals."""

import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest

import lora_flow
from lora_flow import Factorization, InputError, memory, sweep
from lora_flow.cli import main
from lora_flow.cli.parse import parse
from lora_flow.cli.sweep import read_config
from lora_flow.settings import Settings, from_table, to_table


def settings(*words):
    return parse(["sweep", "--out", "runs/x", *words]).settings


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--alpha", "1e-3,1e-4"], "alpha", (1e-3, 1e-4)),
        (["--alpha", "1e-3, 1e-4", "1e-5"], "alpha", (1e-3, 1e-4, 1e-5)),
        (["--alpha", "1e-6:1e-2:5"], "alpha", (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)),
        (["--alpha=1e-2:1e-4:3"], "alpha", (1e-2, 1e-3, 1e-4)),
        (["--angle", "0:90:7"], "angle", (0.0, 15.0, 30.0, 45.0, 60.0, 75.0, 90.0)),
        (["--rank", "1:4", "8"], "rank", (1, 2, 3, 8)),
        (["--rank", "2:9:2"], "rank", (2, 4, 6, 8)),
        (["--seeds", "30"], "seeds", 30),
        (["--seeds", "3e1"], "seeds", 30),
        (["--seeds", "0:60"], "seeds", 60),
        (["--seeds", "0", "1", "2"], "seeds", 3),
        (["--seeds", "10:13"], "seeds", (10, 11, 12)),
        (["--seeds", "7:8"], "seeds", (7,)),
        (["--seeds", "5,3"], "seeds", (5, 3)),
        (["--init", "gaussian,spectral"], "init", ("gaussian", "spectral")),
        (["--component", "top,-1"], "component", ("top", "-1")),
        (["--max-steps", "1e6"], "max_steps", 1_000_000),
    ],
)
def test_values(words, name, value):
    asked = settings(*words)
    assert getattr(asked, name) == value
    assert from_table(to_table(asked), "there") == asked


def test_a_settings_file_may_have_a_byte_order_mark_and_names_files_beside_it(tmp_path):
    (tmp_path / "run.toml").write_bytes(b'\xef\xbb\xbfproblem = "mine.npz"\nseeds = [3, 7]\n')
    assert read_config(str(tmp_path / "run.toml")) == Settings(problem=str(tmp_path / "mine.npz"), seeds=(3, 7))


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lora-flow {version('lora-flow')}\n"
    assert lora_flow.__version__ == version("lora-flow")


def test_help_is_a_line_a_command(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert sum(line.startswith("  sweep") for line in told.splitlines()) == 1
    assert len(told.splitlines()) < 20
    assert main(["sweep", "--help"]) == 0
    told = capsys.readouterr().out
    assert "None}" not in told
    for title in ("aligned", "pretrained", "regression", "network", "solver"):
        assert f"{title} options" in told


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--seeds", "20000", "--saves", "1001"], "seeds"),
        (["--seeds", "10", "--saves", "10000000"], "saves"),
        (["--h", "10000000"], "h"),
        (["--details", "--h", "1000", "--saves", "20000"], "details"),
        (["--problem", "regression", "--n", "20000"], "n"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_flag_before_anything_starts(words, flag, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(memory, "free", lambda: 1e9)
    monkeypatch.setattr("lora_flow.cli.sweep.build_plan", None)  # calling it would fail
    assert main(["sweep", "--out", str(tmp_path / "run"), *words]) == 2
    assert f"{flag} must be small enough for the 1 GB of memory that are free" in capsys.readouterr().err


def test_a_sweep_in_python_that_does_not_fit_is_refused_too(figure1_problem, monkeypatch):
    monkeypatch.setattr(memory, "free", lambda: 1e6)
    with pytest.raises(InputError, match="the sweep must be small enough for the 1 MB of memory"):
        sweep(figure1_problem, t1=1.0, seeds=1000)
    with pytest.raises(InputError, match="saves must be small enough for the 1 MB of memory"):
        sweep(figure1_problem, t1=1.0, saves=10**9)


def test_a_folder_that_may_not_be_searched_is_named(capsys, tmp_path, monkeypatch):
    """Permissions do not bind root, so the system's refusal is put in the place of each command's first look."""
    out = str(tmp_path / "closed" / "run")

    def closed(*arguments, **options):
        raise PermissionError(13, "Permission denied", out)

    monkeypatch.setattr("os.stat", closed)
    for words in (["sweep", "--out", out], ["plot", out], ["figure", "1", "--out", out], ["theory", "--out", out]):
        assert main(words) == 2
        assert capsys.readouterr().err == f"lora-flow: '{out}' must be accessible, got Permission denied\n"


FULL = "lora-flow: 'standard output' must be writable, got No space left on device\n"


@pytest.mark.parametrize(
    ("shell", "status", "said"),
    [
        ("{} sweep --help | head -1", 0, ""),
        ("{} --help > /dev/full", 2, "lora-flow: 'standard output' must be writable, got No space left on device\n"),
        (
            "{} sweep --help > /dev/full",
            2,
            "lora-flow: 'standard output' must be writable, got No space left on device\n",
        ),
        ("{} sweep --help >&-", 0, ""),
        ("{} swep 2>&-", 2, ""),
        ("PYTHONIOENCODING=ascii {} sweep --help > /dev/null", 0, ""),
    ],
)
def test_output_that_nobody_reads_or_that_takes_only_ascii(shell, status, said):
    command = f"{sys.executable} -c 'from lora_flow.cli import main; raise SystemExit(main())'"
    done = subprocess.run(["sh", "-c", shell.format(command)], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert done.stderr == said


def test_a_transposed_weight_is_told():
    rng = np.random.default_rng(0)
    w1, w2 = rng.normal(size=(5, 3)), rng.normal(size=(4, 5))
    for given in ((w1.T, w2), (w1, w2.T)):
        with pytest.raises(InputError, match=r"w2 must have as many columns as w1 has rows .*is w[12] transposed\?"):
            Factorization(w1=given[0], w2=given[1], shift=np.ones((4, 3)))

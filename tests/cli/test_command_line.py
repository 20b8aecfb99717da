"""What the command line reads and how it answers: values, versions, memory, and the system's refusals."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version

import numpy as np
import pytest
import tomli_w

import lora_flow
import lora_flow.dynamics.solve
from lora_flow import Factorization, InputError, load_run, sweep
from lora_flow.cli import main
from lora_flow.cli.parse import COMMANDS, parse
from lora_flow.cli.sweep import read_config
from lora_flow.runtime import memory
from lora_flow.settings import Settings, build_plan, from_table, to_table


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
    assert len(told.splitlines()) == len(COMMANDS) + 9
    assert main(["sweep", "--help"]) == 0
    told = capsys.readouterr().out
    assert "None}" not in told
    for title in ("aligned", "pretrained", "regression", "network", "solver"):
        assert f"{title} options" in told


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--seeds", "10", "--saves", "1000000"], "saves"),
        (["--h", "10000000"], "h"),
        (["--details", "--h", "1000", "--saves", "20000"], "details"),
        (["--problem", "regression", "--n", "20000"], "n"),
    ],
)
@pytest.mark.usefixtures("one_machine")
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


def group(folder, limit, used, reclaimable, version=2):
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(names, (limit, used, f"anon 7\n{names[2]} {reclaimable}"), strict=True):
        (folder / (name if "memory." in name else "memory.stat")).write_text(f"{content}\n")


@pytest.mark.parametrize(
    ("own", "left"),
    [
        ("0::/job/step", 100 - 70 + 50),
        ("0::/job", 1000 - 990 + 200),
        ("0::/", 9000 - 9000 + 400),
        ("0::/docker/of/the/host", 9000 - 9000 + 400),
        ("0::/../../elsewhere", 9000 - 9000 + 400),
        (None, 9000 - 9000 + 400),
    ],
)
def test_what_control_groups_leave_is_the_least_of_all_above_and_files_that_were_read_do_not_count(tmp_path, own, left):
    """Limit, in use, and how much of that is copies of files that nobody has touched for long."""
    (tmp_path / "proc/self").mkdir(parents=True)
    if own:
        (tmp_path / "proc/self/cgroup").write_text(f"5:devices:/a:b\n{own}\n")
    group(tmp_path / "sys/fs/cgroup", 9000, 9000, 400)
    group(tmp_path / "sys/fs/cgroup/job", 1000, 990, 200)
    group(tmp_path / "sys/fs/cgroup/job/step", 100, 70, 50)
    assert memory.of_groups(tmp_path) == left
    (tmp_path / "sys/fs/cgroup/job/step/memory.max").write_text("max\n")
    assert memory.of_groups(tmp_path) == (210 if own == "0::/job/step" else left)


def test_control_groups_of_version_1(tmp_path):
    assert memory.of_groups(tmp_path) == float("inf")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,memory:/job\n0::/\n")
    group(tmp_path / "sys/fs/cgroup/memory", 2**63 - 4096, 10**9, 0, version=1)
    group(tmp_path / "sys/fs/cgroup/memory/job", 1000, 990, 200, version=1)
    assert memory.of_groups(tmp_path) == 210


def test_the_size_of_a_sweep_is_that_of_its_arrays():
    plan = build_plan(Settings(m=4, n=5, h=6, alpha=(1e-1, 1e-2), rank=(1,), seeds=4, t1=0.5, saves=3))
    assert plan.nbytes == sum(values.nbytes for values in plan.empty().data_vars.values())


def test_memory_is_not_asked_for_at_every_solve(monkeypatch):
    monkeypatch.setattr(memory, "free", lambda: pytest.fail("was asked"))
    assert len(lora_flow.dynamics.solve.save_times(1.0, 1000)) == 1000


@pytest.mark.parametrize("command", ["sweep", "vision"])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_at_home_is_found(tmp_path, monkeypatch, command, resume):
    """`--out=~/x`, which a shell leaves alone; also before the settings are read from it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").mkdir()
    table = {"vision": {"steps": 20}} if command == "vision" else to_table(Settings(t1=3.0))
    (tmp_path / "x/settings.toml").write_text(tomli_w.dumps(table))
    parsed = parse([command, "--out=~/x", *resume])
    assert parsed.out == str(tmp_path / "x")
    asked = parsed.settings
    if resume:
        assert (asked.steps == 20) if command == "vision" else (asked.t1 == 3.0)
    with pytest.raises(InputError, match="out must be a folder's name, got ''"):
        parse([command, "--out", "", *resume])


def test_a_folder_that_may_not_be_searched_is_named(capsys, tmp_path, monkeypatch):
    """Permissions do not bind root, so the system's refusal is put in the place of each command's first look."""
    out, look = str(tmp_path / "closed" / "run"), os.stat

    def closed(path, *arguments, **options):
        if str(path).startswith(out):
            raise PermissionError(13, "Permission denied", out)
        return look(path, *arguments, **options)

    monkeypatch.setattr("os.stat", closed)
    for words in (["sweep", "--out", out], ["plot", out], ["figure", "1", "--out", out], ["theory", "--out", out]):
        assert main(words) == 2
        assert capsys.readouterr().err == f"lora-flow: '{out}' must be accessible, got Permission denied\n"


AS_NOBODY = """
import contextlib, io, json, os, sys
import flax, jax, matplotlib, xarray, zarr
import lora_flow.cli.figure, lora_flow.cli.plot, lora_flow.cli.status, lora_flow.cli.sweep, lora_flow.cli.theory
import lora_flow.cli.answer, lora_flow.cli.vision, lora_flow.sweeps.plan, lora_flow.theory
import lora_flow_vision.check, lora_flow_vision.command
from lora_flow.cli import main
# with all that loading imports: whoever installed Python may have kept it to himself
lora_flow_vision.data.load_dataset("digits")
if os.geteuid() == 0:
    os.setuid(65534)
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()) as told:
        status = main(words)
    print(json.dumps([status, told.getvalue(), said.getvalue()]))
"""

CLOSED = [
    ("sweep --out RUN", "RUN"),
    ("sweep --out RUN --resume", "RUN"),
    ("sweep --out RUN --overwrite", "RUN"),
    ("sweep --out CLOSED", "CLOSED"),
    ("sweep --out CLOSED --resume", "CLOSED"),
    ("sweep --out CLOSED --overwrite", "CLOSED"),
    ("sweep --out NEW --config CLOSED/settings.toml", "CLOSED/settings.toml"),
    ("sweep --out NEW --problem CLOSED/target.npz", "CLOSED/target.npz"),
    ("sweep --out LOCKED --m 4 --n 4 --h 4", "LOCKED"),
    ("plot RUN", "RUN"),
    ("plot CLOSED", "CLOSED"),
    ("status RUN", "RUN"),
    ("status CLOSED", "CLOSED"),
    ("figure 1 --out RUN", "RUN"),
    ("figure 1 --out CLOSED", "CLOSED"),
    ("figure 1 --out RUN --resume", "RUN"),
    ("figure kappa --out CLOSED --overwrite", "CLOSED"),
    ("theory --out RUN", "RUN"),
    ("theory --out CLOSED", "CLOSED"),
    ("vision --out RUN", "RUN"),
    ("vision --out CLOSED", "CLOSED"),
    ("vision --out RUN --resume", "RUN"),
    ("vision --out CLOSED --resume", "CLOSED"),
    ("vision --out CLOSED --overwrite", "CLOSED"),
    ("vision --out NEW --weights CLOSED/vit", "CLOSED/vit"),
    ("vision --out NEW --weights CLOSED", "CLOSED/config.json"),
    ("vision --out NEW --data mnist --data-dir RUN", "RUN"),
    ("vision --out NEW --data mnist --data-dir CLOSED", "CLOSED/train-images-idx3-ubyte"),
]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_folders_that_a_user_may_not_search_are_named():
    """By a user who is not root: one folder may not be searched, another not be written; the home is closed too."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"RUN": f"{folder}/closed/run", "CLOSED": f"{folder}/closed", "NEW": f"{folder}/new"}
        places["LOCKED"] = f"{folder}/read-only/run"
        for path in (places["RUN"], f"{folder}/read-only"):
            os.makedirs(path)
        lines = [
            [functools.reduce(lambda text, one: text.replace(*one), places.items(), two) for two in case]
            for case in CLOSED
        ]
        for name, mode in (("closed", 0o000), ("read-only", 0o555), ("", 0o755)):
            os.chmod(f"{folder}/{name}", mode)
        environment = {**os.environ, "HOME": places["CLOSED"], "JAX_COMPILATION_CACHE_DIR": ""}
        command = [sys.executable, "-c", AS_NOBODY, json.dumps([line.split() for line, _ in lines])]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        os.chmod(places["CLOSED"], 0o755)
        assert sorted(os.listdir(folder)) == ["closed", "read-only"]
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for (line, path), answer in zip(lines, map(json.loads, done.stdout.splitlines()), strict=True):
        assert answer == [2, "", f"lora-flow: '{path}' must be accessible, got Permission denied\n"], line


def test_a_sweep_whose_reader_has_gone_ends_quietly_and_is_gone_on_with(tmp_path):
    """Gone at once, before anything is solved; and as of `| head -2`, before the last lines, when all is stored."""
    command = [sys.executable, "-c", "from lora_flow.cli import main; raise SystemExit(main())", "sweep"]
    small = ["--alpha", "1e-2", "--seeds", "4", "--rank", "1", "--t1", "2", "--saves", "3", "--batch-size", "2"]
    small += ["--m", "4", "--n", "5", "--h", "6"]
    for name, lines in (("early", 0), ("late", 2)):
        run = [*command, "--out", str(tmp_path / name), *small]
        with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            told = [process.stdout.readline() for _ in range(lines)]
            process.stdout.close()
            said = process.stderr.read()
        assert process.returncode == 141
        assert bool(said) == bool(lines)
        assert all(line.startswith(("compiling: ", "solving: ")) for line in said.splitlines())
        assert lines == 0 or told[1].startswith("4 runs to t = 2")
    late = load_run(tmp_path / "late")["loss"]
    assert np.all(np.isfinite(late))
    assert main(["sweep", "--out", str(tmp_path / "early"), "--resume"]) == 0
    assert load_run(tmp_path / "early")["loss"].equals(late)


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

"""What is built can be installed without the checkout, and runs: with the lowest versions asked for, and the newest.

Each environment is made anew, so that these tests need a package index and minutes.
"""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHONS = [name for name in ("python3.11", "python3.12", "python3.13") if shutil.which(name)] or [sys.executable]
ENVIRONMENTS = [(PYTHONS[0], "constraints-lowest.txt"), *((python, "constraints.txt") for python in PYTHONS[:2])]
SMALL = ["--m", "3", "--n", "3", "--h", "4", "--rank", "1", "--t1", "1", "--saves", "5"]
COMMANDS = [
    ["-c", "import lora_flow, lora_flow.coordinates.canonical; assert callable(lora_flow.canonical)"],
    ["-m", "lora_flow", "--version"],
    ["-m", "lora_flow", "--help"],
    ["-m", "lora_flow", "inits"],
    ["-m", "lora_flow", "sweep", "--alpha", "1e-3", *SMALL, "--out", "run"],
    ["-m", "lora_flow", "figure", "1", "--seeds", "2", "--out", "figure1"],
    ["-m", "lora_flow", "vision", "--seeds", "1", "--steps", "5", "--limit", "64", "--out", "vision"],
]
SCRIPT = """
import jax
from lora_flow import Trajectory, aligned_problem, gaussian_init, solve, sweep

problem = aligned_problem(jax.random.key(0), m=3, n=3, h=4)
run: Trajectory = solve(problem, gaussian_init(jax.random.key(1), problem, rank=1, alpha=1e-3), t1=1.0)
print(run.observables["loss"][-1])
dataset = sweep(problem, alpha=(1e-3, 1e-4), rank=1, t1=1.0)
print(dataset["loss"].isel(time=-1))
"""

pytestmark = [pytest.mark.package, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist, built from the checkout in an environment of their own."""
    folder = tmp_path_factory.mktemp("built")
    python = environment(folder / "env", sys.executable, "build")
    subprocess.run([python, "-m", "build", "--outdir", folder, ROOT], check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def environment(folder, python, *installed):
    subprocess.run([python, "-m", "venv", folder], check=True)
    made = folder / "bin/python"
    run(folder, [made, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *installed])
    return made


def run(folder, words):
    done = subprocess.run(list(map(str, words)), cwd=folder, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_a_wheel_holds_two_packages_and_the_marker_of_types(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"lora_flow", "lora_flow_vision"}
    stubs = {"lora_flow/__init__.pyi", "lora_flow/figures/__init__.pyi"}
    assert stubs | {"lora_flow/py.typed", "lora_flow_vision/py.typed"} <= set(names)


@pytest.mark.parametrize(("python", "constraints"), ENVIRONMENTS)
def test_an_installed_wheel_runs(built, python, constraints, tmp_path):
    made = environment(tmp_path / "env", python, "-c", ROOT / constraints, f"{built[0]}[vision]")
    for words in COMMANDS:
        run(tmp_path, [made, *words])
    assert (tmp_path / "figure1/figures").is_dir()


def test_types_of_the_installed_package_are_seen(built, tmp_path):
    made = environment(tmp_path / "env", sys.executable, "-c", ROOT / "constraints.txt", built[0], "mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    run(tmp_path, [made, "-m", "mypy", "--strict", "script.py"])
    (tmp_path / "wrong.py").write_text(SCRIPT + "\nsolve(problem, t2=1.0)\n")
    with pytest.raises(AssertionError, match="t2"):
        run(tmp_path, [made, "-m", "mypy", "wrong.py"])
    run(tmp_path, [made, "script.py"])


def test_an_sdist_can_run_its_tests(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    made = environment(tmp_path / "env", sys.executable, "-c", ROOT / "constraints.txt", f"{folder}[vision,dev]")
    run(folder, [made, "-m", "pytest", "--collect-only"])
    run(folder, [made, "-m", "pytest", "tests/test_house.py", "tests/dynamics/test_observables.py"])

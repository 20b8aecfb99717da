"""What is built can be installed without the checkout, and runs: with the lowest versions asked for, and the newest.

Each environment is made anew, so that these tests need a package index and minutes.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYENV = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()


def found(version):
    """A Python of that version on the path, or one that pyenv has installed; pyenv's shims may lead to neither."""
    name = f"python{version}"
    folders = [folder for folder in os.get_exec_path() if not Path(folder).is_relative_to(PYENV / "shims")]
    folders += map(str, sorted(PYENV.glob(f"versions/{version}*/bin")))
    return shutil.which(name, path=os.pathsep.join(folders))


PYTHONS = list(filter(None, map(found, ("3.11", "3.12", "3.13", "3.14")))) or [sys.executable]
ENVIRONMENTS = [(PYTHONS[0], "constraints-lowest.txt"), *((python, "constraints.txt") for python in PYTHONS)]
SMALL = ["--m", "3", "--n", "3", "--h", "4", "--rank", "1", "--t1", "1", "--saves", "5"]
NAMES = """
import importlib, pkgutil, types
import lora_flow

for module in pkgutil.walk_packages(lora_flow.__path__, "lora_flow."):
    importlib.import_module(module.name)
modules = [name for name in lora_flow.__all__ if isinstance(getattr(lora_flow, name), types.ModuleType)]
assert modules == ["oracles"], modules
"""
OPENED = """
import warnings
import xarray, zarr
from lora_flow import load_run

warnings.simplefilter("error")
assert xarray.open_zarr("run/results.zarr")["loss"].notnull().all()
assert load_run("run")["loss"].notnull().all()
"""
COMMANDS = [
    ["python", "-c", "import lora_flow.coordinates.canonical, lora_flow; assert callable(lora_flow.canonical)"],
    ["python", "-c", NAMES],
    ["lora-flow", "--help"],
    ["lora-flow", "inits"],
    ["lora-flow", "sweep", "--alpha", "1e-3", *SMALL, "--out", "run"],
    ["python", "-c", OPENED],
    ["lora-flow", "sweep", "--alpha", "1e-3", *SMALL, "--cluster", "local:1", "--out", "on-a-worker"],
    ["lora-flow", "sweep", "--alpha", "1e-4", *SMALL, "--out", "from-kept-programs"],
    ["lora-flow", "figure", "1", "--seeds", "2", "--out", "figure1"],
    ["lora-flow", "vision", "--seeds", "1", "--steps", "5", "--limit", "64", "--out", "vision"],
    ["python", "-m", "lora_flow", "--version"],
    ["python", "-m", "lora_flow_vision", "--help"],
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
    run(folder, [python, "-m", "build", "--outdir", folder, ROOT])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def environment(folder, python, *installed):
    run(folder.parent, [python, "-m", "venv", folder])
    made = folder / "bin/python"
    run(folder, [made, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *installed])
    return made


def run(folder, words):
    """The words' output, in a process to which the checkout is unknown."""
    words, alone = list(map(str, words)), {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=folder, env=alone, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_a_wheel_holds_two_packages_and_the_marker_of_types(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"lora_flow", "lora_flow_vision"}
    stubs = {"lora_flow/__init__.pyi", "lora_flow/figures/__init__.pyi"}
    assert stubs | {"lora_flow/py.typed", "lora_flow_vision/py.typed"} <= set(names)


def test_the_page_of_a_package_index_needs_no_files_beside_it(built):
    archive = zipfile.ZipFile(built[0])
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    told = Parser().parsestr(archive.read(name).decode())
    assert told["Description-Content-Type"] == "text/markdown"
    assert re.findall(r"\]\((?!https?:)[^)]*\)", told.get_payload()) == []
    assert "see problems (docs/problems.md)" in told.get_payload()


@pytest.mark.parametrize(("python", "constraints"), ENVIRONMENTS)
def test_an_installed_wheel_runs(built, python, constraints, tmp_path):
    made = environment(tmp_path / "env", python, "-c", ROOT / constraints, f"{built[0]}[vision,cluster,remote]")
    for program, *words in COMMANDS:
        run(tmp_path, [made.with_name(program), *words])
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
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # Python 3.11.4
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    made = environment(tmp_path / "env", sys.executable, "-c", ROOT / "constraints.txt", f"{folder}[vision,dev]")
    run(folder, [made, "-m", "pytest", "--collect-only"])
    run(folder, [made, "-m", "pytest", "tests/test_house.py", "tests/dynamics/test_observables.py"])

"""What the README and the docs show is run as it stands, and is what is printed and drawn; all names are documented."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from picture_faults import faults
from printed import differences, shown
from stored import STORED, check_agrees

import lora_flow
from lora_flow.claims.frame import ENTERED
from lora_flow.cli import main
from lora_flow.dynamics.analysis import DETAILS
from lora_flow.dynamics.observables import OBSERVABLES
from lora_flow.experiments.table import EXPERIMENTS
from lora_flow.figures import over_time, written
from lora_flow.problems.update import OF_THE_UPDATE
from lora_flow.recipes.kinds import KINDS
from lora_flow.results import report
from lora_flow.runtime.compiling import forget

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/tutorial.md",
    "docs/vision.md",
    "docs/peft.md",
    "docs/contributing.md",
    *(
        pytest.param(f"docs/{name}.md", marks=pytest.mark.long)
        for name in (
            "initialisations",
            "descent",
            "lora-one",
            "networks",
            "problems",
            "models",
            "scaling",
            "sensitivities",
            "learned",
            "fits",
            "advise",
            "symmetric",
            "spectral",
            "continual",
            "attention",
        )
    ),
]

TABLES = (ENTERED, EXPERIMENTS, KINDS, OBSERVABLES.entries, DETAILS.entries)


@pytest.fixture
def tables():
    """The tables by name as they are, whatever a page adds to them; other pages share their programs."""
    held = [(table, dict(table)) for table in TABLES]
    yield
    changed = [(table, entries) for table, entries in held if table != entries]
    for table, entries in changed:
        table.clear()
        table.update(entries)
    if changed:
        forget()  # programs with observables of a page


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_runs(page, tables, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    namespace = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    plt.close("all")
    told = {"docs/sensitivities.md": "[ 0.   0.5 -1. ]", "docs/peft.md": "layers.1.q_proj: rank 4, alpha"}
    told["docs/advise.md"] = "comes to 0.1 of the loss"
    assert told.get(page, "success after") in capsys.readouterr().out
    if page == "docs/tutorial.md":  # the tutorial holds a formula against a measurement: they agree as it says
        assert float(abs(namespace["predicted"] - namespace["measured"]).max()) < 0.15


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_local_commands_and_scripts_of_large_sweeps_run(tmp_path):
    page = (ROOT / "docs/large-sweeps.md").read_text()
    for name, script in re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(script)
    commands = re.findall(r"^```sh\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PBS_"))}
    for command in commands:
        subprocess.run(["bash", "-ec", command], cwd=tmp_path, env=environment | {"PATH": path}, check=True)
    runs = {run.name: lora_flow.load_run(run) for run in (tmp_path / "runs").iterdir()}
    assert sorted(runs) == ["local", "one", "parts", "python"]
    assert all(np.array_equal(run["loss"], runs["one"]["loss"]) for run in runs.values())


DRAWN = ("lora-flow theory", *(f"lora-flow figure {name}" for name in EXPERIMENTS if name != "1"))  # 1: in make test


@pytest.mark.long
@pytest.mark.timeout(1800)  # theory takes three minutes of two cores, which other tests may have as well
@pytest.mark.parametrize("command", dict.fromkeys((*DRAWN, *shown())))
def test_the_docs_show_what_commands_print_and_draw(command, tmp_path, capsys, monkeypatch):
    program, *words = command.split()
    found = {}

    def checked(figure, folder, name):
        found[name] = faults(figure)
        return written.write(figure, folder, name)

    monkeypatch.setattr(over_time, "write", checked)
    if program == "python":
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True)
        output = done.stdout
    else:
        out = tmp_path / "out"
        assert main([*words, "--out", str(out)]) == 0
        output = capsys.readouterr().out + "".join(path.read_text() for path in sorted(out.glob("*.md")))
        for path in sorted(out.glob("figures/*.json")):
            check_agrees(json.loads((STORED / path.name).read_text()), json.loads(path.read_text()))
    for page, texts in shown().get(command, {}).items():
        assert not [*differences(texts, output)], page
    assert not any(found.values()), found


def test_a_number_of_the_docs_that_a_command_prints_otherwise_is_told():
    printed = "seen:\n\n| a | b | b |\n| --- | --- | --- |\n| x 1 | 0.25 ± 0.1 | 1e-15 |\n\nholds   3    for r = 4\n"
    table = "| a | b |\n| --- | --- |\n| x 1 | {} |\n"
    block = "```text\n{} 3 for r = 4\n```\n"
    for told, number in (
        (0, "0.25 ± 0.1"),
        (0, "0.24 ± 0.1"),
        (1, "0.28 ± 0.1"),
        (1, "-0.25 ± 0.1"),
        (1, "at rounding"),
        (1, "0.25"),
    ):
        assert len([*differences([table.format(number)], printed)]) == told, number
    assert len([*differences([table.format("0.25 ± 0.1"), table.format("0.25 ± 0.1")], printed)]) == 1, "a row more"
    assert len([*differences(["| a | c |\n| --- | --- |\n| x 1 | 0.25 |\n"], printed)]) == 1, "another column"
    assert len([*differences(["| b | b |\n| --- | --- |\n| 0.25 ± 0.1 | 4e-15 |\n"], printed)]) == 0
    assert len([*differences([block.format("holds")], printed)]) == 0
    assert len([*differences([block.format("fails")], printed)]) == 1


def test_every_public_name_has_a_docstring_and_a_place_in_the_api_page():
    page = (ROOT / "docs/api.md").read_text()
    for name in lora_flow.__all__:
        value = getattr(lora_flow, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name
            assert f".{name}\n" in page, name


def test_the_list_of_observables_is_that_of_the_tables():
    header, rows = ["name", "meaning", "computed from"], []
    for observables, state in ((OBSERVABLES, "measurements"), (DETAILS, "saved adapters")):
        for one in observables.entries.values():
            names = [f"`{name}`" for name, _ in one.told(2)]
            rows.append([", ".join([*names, *["..."] * one.each]), one.about.replace("{i}", "i"), state])
    network = lora_flow.LinearNetwork(np.eye(2))
    own = network.observe(lora_flow.zero_adapters(network.layers, 1))
    rows += [[f"`{name}`", OF_THE_UPDATE[name], "saved adapters of a `Factorization`"] for name in OF_THE_UPDATE]
    rows += [[f"`{name}`", network.meanings()[name], "adapters of a `LinearNetwork`"] for name in own]
    told = report.table(header, [[cell.replace("|", r"\|") for cell in row] for row in rows])
    assert told in (ROOT / "docs/api.md").read_text(), f"docs/api.md must have this list:\n\n{told}"


def test_every_picture_says_what_it_shows_and_is_in_the_gallery():
    gallery = (ROOT / "docs/gallery.md").read_text()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for about, picture in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text()):
            assert len(about.split()) >= 4, f"{page.name}: {picture}"
    for page in (ROOT / "docs").glob("notebook-*.md"):
        assert f"({page.name})" in gallery, page.name
    for picture in {*(ROOT / "docs/images").glob("*.png")} - {*(ROOT / "docs/images").glob("notebook-*.png")}:
        assert f"(images/{picture.name})" in gallery, picture.name


def test_linked_pages_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"

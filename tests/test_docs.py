"""What the README and the tutorial show is run as it stands, in order, and every public name is documented."""

import inspect
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import lora_flow
from lora_flow.claims.frame import ENTERED
from lora_flow.dynamics.analysis import DETAILS
from lora_flow.dynamics.observables import OBSERVABLES
from lora_flow.experiments.table import EXPERIMENTS
from lora_flow.problems.update import OF_THE_UPDATE
from lora_flow.recipes.kinds import KINDS
from lora_flow.results import report
from lora_flow.runtime.compiling import forget

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/tutorial.md",
    "docs/vision.md",
    "docs/contributing.md",
    *(
        pytest.param(f"docs/{name}.md", marks=pytest.mark.long)
        for name in ("initialisations", "descent", "lora-one", "networks", "problems")
    ),
]

TABLES = (ENTERED, EXPERIMENTS, KINDS, OBSERVABLES.entries, DETAILS.entries)


@pytest.fixture
def tables():
    """The tables by name as they are, whatever a page adds to them."""
    held = [(table, dict(table)) for table in TABLES]
    yield
    for table, entries in held:
        table.clear()
        table.update(entries)
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
    assert "success after" in capsys.readouterr().out
    if page == "docs/tutorial.md":  # the tutorial holds a formula against a measurement: they agree as it says
        assert float(abs(namespace["predicted"] - namespace["measured"]).max()) < 0.15


def test_every_public_name_has_a_docstring_and_a_place_in_the_api_page():
    page = (ROOT / "docs/api.md").read_text()
    for name in lora_flow.__all__:
        value = getattr(lora_flow, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name
            assert f".{name}\n" in page, name


def test_the_list_of_observables_is_that_of_the_tables():
    header, rows = ["name", "meaning", "computed from"], []
    for observables in (OBSERVABLES, DETAILS):
        for one in observables.entries.values():
            names = [f"`{name}`" for name, _ in one.told(2)]
            rows.append([", ".join([*names, *["..."] * one.each]), one.about.replace("{i}", "i"), observables.needs])
    network = lora_flow.LinearNetwork(np.eye(2))
    own = network.observe(lora_flow.zero_adapters(network.layers, 1))
    rows += [[f"`{name}`", OF_THE_UPDATE[name], "saved adapters of a `Factorization`"] for name in OF_THE_UPDATE]
    rows += [[f"`{name}`", network.meanings()[name], "adapters of a `LinearNetwork`"] for name in own]
    told = report.table(header, [[cell.replace("|", r"\|") for cell in row] for row in rows])
    assert told in (ROOT / "docs/api.md").read_text(), f"docs/api.md must have this list:\n\n{told}"


def test_linked_pages_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"

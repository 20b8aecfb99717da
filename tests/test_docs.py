"""What the README and the tutorial show is run as it stands, in order, and every public name is documented."""

import inspect
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import lora_flow
from lora_flow.claims.frame import ENTERED
from lora_flow.experiments.table import EXPERIMENTS
from lora_flow.recipes.kinds import KINDS

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


@pytest.fixture
def tables():
    """The tables by name as they are, whatever a page adds to them."""
    held = [(table, dict(table)) for table in (ENTERED, EXPERIMENTS, KINDS)]
    yield
    for table, entries in held:
        table.clear()
        table.update(entries)


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


def test_linked_pages_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"

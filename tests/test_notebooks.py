"""The notebooks run, and their pages in the docs have their code and what they show."""

import json
import re
import warnings
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from printed import agree
from stored import STORED, check_agrees

marimo = pytest.importorskip("marimo", reason="marimo is not installed")

from lora_flow.figures.shown import shown  # noqa: E402
from notebooks.page import NOTEBOOKS, executed, page  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs"


def blocks(text):
    """The kinds and lines of a page's blocks."""
    return [
        (kind, body.split("\n")) for kind, body in re.findall(r"^```(\w+)\n(.*?)\n```", text, re.MULTILINE | re.DOTALL)
    ]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_shows_what_its_page_does(name):
    mpl.use("Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of marimo's own
        outputs = executed(name)
    text, pictures = page(name, outputs)
    stored = (DOCS / f"notebook-{name}.md").read_text()
    outside = re.compile(r"^```text\n.*?^```", re.MULTILINE | re.DOTALL)
    assert outside.sub("", stored) == outside.sub("", text), f"python -m notebooks.page {name} writes the page anew"
    for (kind, old), (_, new) in zip(blocks(stored), blocks(text), strict=True):
        assert kind != "text" or (len(old) == len(new) and all(map(agree, old, new))), "\n".join(new)
    for picture, figure in pictures.items():
        check_agrees(json.loads((STORED / f"{picture}.json").read_text()), shown(figure))
    plt.close("all")


def test_every_notebook_has_its_page():
    here = {path.stem for path in (DOCS.parent / "notebooks").glob("*.py")} - {"page"}
    assert here == set(NOTEBOOKS)

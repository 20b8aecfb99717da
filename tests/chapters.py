"""What tests of claims share: that the lines of some chapters hold, fail when broken, and stand in the docs."""

import re
from pathlib import Path

import pytest

from lora_flow.claims.table import CLAIMS

PAGE = Path(__file__).parents[1] / "docs" / "theory.md"


class Chapters:
    """The lines of these modules of claims, from runs with so many seeds, each made once."""

    def __init__(self, seeds, modules):
        self.seeds, names = seeds, {module.__name__ for module in modules}
        self.lines = {name: one(seeds) for name, one in CLAIMS.items() if one.__module__ in names}

    def hold(self, count, failing=()):
        """All so many lines hold, but for those that are meant to fail."""
        assert len(self.lines) == count
        for name, line in self.lines.items():
            verdict = "fails" if name.endswith("as_printed") or name in failing else "holds"
            assert line.verdict.split()[0] == verdict, f"{name}: {line.cases}"

    def fail(self, *names):
        """These lines have held, and computed anew they fail."""
        for name in names:
            assert self.lines[name].verdict.split()[0] == "holds", name
            assert CLAIMS[name](self.seeds).verdict.startswith("fails"), name

    def stand_in_the_docs(self):
        """The page has each line in its place, with its verdict."""
        rows = [row.split(" | ") for row in PAGE.read_text().splitlines() if re.match(r"\| \d+ \|", row)]
        assert len(rows) == len(CLAIMS)
        for i, (row, name) in enumerate(zip(rows, CLAIMS, strict=True), start=1):
            if line := self.lines.get(name):
                assert row[:3] == [f"| {i}", line.source, line.statement.replace("|", "\\|")]
                assert row[5].split()[0] == line.verdict.split()[0]


def chapters_of(seeds, *modules):
    """The same as a fixture: what a test breaks then is whole while the lines are made."""
    return pytest.fixture(scope="module", name="chapters")(lambda: Chapters(seeds, modules))

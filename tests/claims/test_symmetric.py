"""What theory says of symmetric factorisations: every line from runs, every formula broken once."""

import re
from pathlib import Path

import pytest

from lora_flow.claims import symmetric
from lora_flow.claims.table import CLAIMS
from lora_flow.theory import symmetric as theory

pytestmark = pytest.mark.long

SEEDS = 3
NAMES = [name for name, claim in CLAIMS.items() if claim.__module__ == symmetric.__name__]


@pytest.fixture(scope="module")
def lines():
    return {name: CLAIMS[name](SEEDS) for name in NAMES}


def test_every_line_holds(lines):
    assert len(lines) == 11
    for name, line in lines.items():
        assert line.verdict == "holds", f"{name}: {line.cases}"


spectrum, tail = theory.spectrum, theory.tail
BROKEN = {
    "symmetric_spectra": (theory, "spectrum", lambda values, rank, chosen: spectrum(1.001 * values, rank, chosen)),
    "symmetric_saddles": (theory, "unstable_directions", lambda values, rank, chosen: rank - len(chosen)),
    "symmetric_noise": (theory, "noise_limit", lambda: 0.499),
    "symmetric_tail": (theory, "tail", lambda values, rank: 2 * tail(values, rank)),
    "symmetric_rates": (theory, "final_rate", lambda values, rank: 2.0),
    "balanced_tail": (theory, "balanced_tail", lambda shape, task_rank, rank: rank / 8),
    "tie_breaks": (theory, "untying_rate", lambda values: 1.0),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_formula_makes_its_line_fail(lines, monkeypatch, name):
    module, formula, wrong = BROKEN[name]
    assert lines[name].verdict == "holds"
    monkeypatch.setattr(module, formula, wrong)
    assert CLAIMS[name](SEEDS).verdict.startswith("fails")


def test_lines_fail_where_the_runs_disobey(lines, monkeypatch):
    """The measured side broken: lanes exchanged, LoRA's starts taken for balanced ones, a closed form a bit off."""
    measured, closed = symmetric.staged()
    off = [one._replace(tilt=(1 + 1e-6) * one.tilt) for one in closed]
    monkeypatch.setattr(symmetric, "staged", lambda: (measured, off))
    long = symmetric.long()
    exchanged = long._replace(noise=long.noise[::-1], excess=long.excess[::-1])
    monkeypatch.setattr(symmetric, "long", lambda: exchanged)
    monkeypatch.setattr(symmetric, "STARTS", (*symmetric.STARTS[3:6], *symmetric.STARTS[:3], symmetric.STARTS[6]))
    names = ("symmetric_exact", "symmetric_noise", "symmetric_tail", "symmetric_rates", "balanced_tail", "no_tail")
    for name in (*names, "columns_stay", "symmetric_cascade"):
        assert CLAIMS[name](SEEDS).verdict.startswith("fails"), name


def test_the_docs_page_has_every_line_with_its_verdict(lines):
    page = (Path(__file__).parents[2] / "docs" / "theory.md").read_text()
    rows = [row.split(" | ") for row in page.splitlines() if re.match(r"\| \d+ \|", row)]
    assert len(rows) == len(CLAIMS)
    for i, (row, name) in enumerate(zip(rows, CLAIMS, strict=True), start=1):
        if name in lines:
            line = lines[name]
            assert row[:3] == [f"| {i}", line.source, line.statement.replace("|", "\\|")]
            assert row[5].split()[0] == line.verdict.split()[0]

"""What theory says of LoRA's scaling: every line from runs, every formula broken once."""

import re
from pathlib import Path

import numpy as np
import pytest

from lora_flow.claims import layer_scaling
from lora_flow.claims.table import CLAIMS
from lora_flow.theory import scaling as theory

pytestmark = pytest.mark.long

SEEDS = 4
NAMES = [name for name, claim in CLAIMS.items() if claim.__module__ == layer_scaling.__name__]


@pytest.fixture(scope="module")
def lines():
    return {name: CLAIMS[name](SEEDS) for name in NAMES}


def test_every_line_holds(lines):
    assert len(lines) == 9
    for name, line in lines.items():
        assert line.verdict.split()[0] == "holds", f"{name}: {line.cases}"


first_step, largest_alpha = theory.first_step, theory.largest_alpha


def linear(step, std, inputs, rank):
    return rank * largest_alpha(step, std, inputs, 1)


BROKEN = {
    "scaling_of_flow": ("effective", lambda s, std, step, optimizer: (std, s * step)),
    "first_step_signal": ("first_step", lambda *about: (1.1 * first_step(*about)[0], 1.0)),
    "first_step_noise": ("first_step", lambda *about: (1.0, 1.1 * first_step(*about)[1])),
    "edge_of_alpha": ("largest_alpha", linear),
    "exponent_of_the_edge": ("largest_alpha", linear),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_formula_makes_its_line_fail(lines, monkeypatch, name):
    formula, wrong = BROKEN[name]
    assert lines[name].verdict.split()[0] == "holds"
    layer_scaling.first_steps.cache_clear()
    monkeypatch.setattr(theory, formula, wrong)
    assert CLAIMS[name](SEEDS).verdict.startswith("fails")
    layer_scaling.first_steps.cache_clear()


def test_lines_fail_where_the_runs_disobey(lines, monkeypatch):
    """The measured side broken: s taken for eta, alpha for the step size."""
    shares = layer_scaling.second_order(SEEDS)
    monkeypatch.setattr(layer_scaling, "second_order", lambda seeds: shares[::-1])
    raised = layer_scaling._raised
    other = {"lora_alpha": "step size", "step size": "lora_alpha"}
    monkeypatch.setattr(layer_scaling, "_raised", lambda name, moved, by: raised(name, other[moved], by))
    for name in ("drift_knows_no_alpha", "drift_knows_the_rate", "layers_bear", "layers_blow_up"):
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
            assert np.isfinite([case.predicted for case in line.cases]).all()

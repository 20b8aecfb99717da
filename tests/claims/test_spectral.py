"""What theory says of flows by singular values and from balanced factors: every line from runs, each broken once."""

import re
from pathlib import Path

import numpy as np
import pytest

from lora_flow.claims import layer_balanced, layer_spectral
from lora_flow.claims.table import CLAIMS
from lora_flow.theory import spectral_flows as theory

pytestmark = pytest.mark.long

SEEDS = 3
MODULES = {layer_spectral.__name__, layer_balanced.__name__}
NAMES = [name for name, claim in CLAIMS.items() if claim.__module__ in MODULES]


@pytest.fixture(scope="module")
def lines():
    return {name: CLAIMS[name](SEEDS) for name in NAMES}


def test_every_line_holds(lines):
    assert len(lines) == 20
    for name, line in lines.items():
        assert line.verdict.split()[0] == "holds", f"{name}: {line.cases}"


right = {name: getattr(theory, name) for name in ("lora_muon_movement", "least_condition_number", "lora_muon_time")}
BROKEN = {
    "muon_growth": ("muon_values", lambda sigma, t, a=0, b=0: np.minimum(sigma, t)),
    "muon_aligned": ("muon_values", lambda sigma, t, a=0, b=0: np.minimum(sigma, t**2)),
    "muon_finishes": ("muon_finish", lambda sigma: sigma),
    "lora_muon_growth": ("lora_muon_values", lambda sigma, t: np.minimum(sigma, t**2)),
    "lora_muon_finishes": ("lora_muon_finish", np.sqrt),
    "lora_muon_moves": ("lora_muon_movement", lambda *given: 2 * right["lora_muon_movement"](*given)),
    "lora_muon_transfers": ("lora_muon_time", lambda *given: 1.05 * right["lora_muon_time"](*given)),
    "imbalanced_rates": ("imbalanced_rate", lambda one, other, imbalance: one + other),
    "one_sided_rates": ("one_sided_rate", lambda sigma, imbalance: sigma),
    "balanced_conditioning": ("condition_number", lambda a, b: 9.9),
    "hessian_conditioning": ("least_condition_number", lambda s: right["least_condition_number"](s) / 2),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_formula_makes_its_line_fail(lines, monkeypatch, name):
    formula, wrong = BROKEN[name]
    assert lines[name].verdict.startswith("holds")
    monkeypatch.setattr(theory, formula, wrong)
    assert CLAIMS[name](SEEDS).verdict.startswith("fails")


def test_lines_of_muon_fail_where_the_runs_disobey(lines, monkeypatch):
    """Flows exchanged, and a loss that stops elsewhere."""
    runs = {name: layer_spectral.grown(name) for name in ("muon, early", "muon", "lora-muon", "plain")}
    others = {"muon, early": "plain", "muon": "lora-muon", "lora-muon": "muon", "plain": "muon"}
    apart = {name: layer_spectral.stepped(name) for name in ("muon", "lora-muon")}
    monkeypatch.setattr(layer_spectral, "grown", lambda name: runs[others[name]])
    monkeypatch.setattr(layer_spectral, "stepped", lambda name: apart["muon" if name == "lora-muon" else "lora-muon"])
    monkeypatch.setattr(layer_spectral, "ends", lambda seeds: {(0.2, 4): np.array([1e-12, 1e-3])})
    names = ("muon_equal_rates", "muon_growth", "muon_finishes", "plain_finishes", "lora_muon_growth")
    for name in (*names, "lora_muon_finishes", "lora_muon_invariant", "muon_variant", "muon_converges"):
        assert CLAIMS[name](SEEDS).verdict.startswith("fails"), name


def test_lines_of_balanced_factors_fail_where_the_runs_disobey(lines, monkeypatch):
    """Starts that are not projected, a closed form a bit off, steps exchanged, gradient flow taken for BaLoRA."""
    plain = layer_balanced.decays("plain")
    run, closed = layer_balanced.flowing(SEEDS)
    off = layer_balanced.off_the_flow(SEEDS)
    monkeypatch.setattr(layer_balanced, "balance", lambda adapters: adapters)
    monkeypatch.setattr(layer_balanced, "flowing", lambda seeds: (run, closed + 1e-7))
    monkeypatch.setattr(layer_balanced, "off_the_flow", lambda seeds: off[::-1])
    monkeypatch.setattr(layer_balanced, "decays", lambda flow: plain)
    for name in ("balora_projection", "balora_closed_form", "balora_descent", "balora_rates", "hessian_conditioning"):
        assert CLAIMS[name](SEEDS).verdict.startswith("fails"), name


@pytest.mark.parametrize(
    ("formula", "arguments", "by_hand"),
    [
        (theory.muon_values, (np.array([4.0, 1.0]), 1.0, 0.5, 0.0), [1.5, 1.0]),
        (theory.muon_finish, (4.0,), 2.0),
        (theory.muon_finish, (2.0, 1.0, 0.0), 1.0),
        (theory.lora_muon_values, (np.array([4.0, 1.0]), 2.0, 0.5), [2.5, 1.0]),
        (theory.lora_muon_finish, (2.0, 0.5), 1.5),
        (theory.lora_muon_time, (np.array([1.0]), 0.25), 0.5),
        (theory.squared_sizes, (2.0, 3.0), (4.0, 1.0)),
        (theory.squared_sizes, (2.0, -3.0), (1.0, 4.0)),
        (theory.imbalanced_rate, (2.0, 0.0, 3.0), 4.0),
        (theory.imbalanced_rate, (2.0, 1.0, 0.0), 3.0),
        (theory.one_sided_rate, (2.0, 3.0), 1.0),
        (theory.condition_number, (np.diag([2.0, 1.0]) @ np.eye(2, 3), np.eye(3, 2)), 5.0),
        (theory.condition_number, (np.diag([2.0, 1.0]), np.eye(2)), 2.5),
        (theory.least_condition_number, (np.array([3.0, 2.0]),), 3.0),
        (theory.msign, (np.diag([3.0, -4.0]), 0.0), np.diag([1.0, -1.0])),
        (theory.msign, (np.diag([3.0, 0.0]), 4.0), np.diag([0.6, 0.0])),
        (theory.lora_muon_movement, (np.eye(2), np.diag([5.0, 7.0]), np.diag([1.0, 0.0])), np.diag([1.0, 0.5])),
    ],
)
def test_formulas_by_hand(formula, arguments, by_hand):
    np.testing.assert_allclose(formula(*arguments), by_hand, rtol=1e-4 if formula is theory.lora_muon_time else 1e-12)


def test_unbalanced_factors_can_condition_a_square_layer_of_full_rank_better():
    """The bound needs r < min(m, n): of diag(1, 1/100) by I and itself the Hessian has 1 + 1 over 1 + 1e-4."""
    values = np.array([1.0, 0.01])
    assert theory.condition_number(np.diag(values), np.eye(2)) == pytest.approx(2 / (1 + 1e-4))
    assert theory.condition_number(np.diag(np.sqrt(values)), np.diag(np.sqrt(values))) == pytest.approx(100)


def test_the_docs_page_has_every_line_with_its_verdict(lines):
    page = (Path(__file__).parents[2] / "docs" / "theory.md").read_text()
    rows = [row.split(" | ") for row in page.splitlines() if re.match(r"\| \d+ \|", row)]
    assert len(rows) == len(CLAIMS)
    for i, (row, name) in enumerate(zip(rows, CLAIMS, strict=True), start=1):
        if name in lines:
            line = lines[name]
            assert row[:3] == [f"| {i}", line.source, line.statement.replace("|", "\\|")]
            assert row[5].split()[0] == line.verdict.split()[0]

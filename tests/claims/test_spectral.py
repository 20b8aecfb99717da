"""What theory says of flows by singular values and from balanced factors: every line from runs, each broken once."""

import numpy as np
import pytest
from chapters import chapters_of

from lora_flow.claims import layer_balanced, layer_spectral
from lora_flow.theory import spectral_flows as theory

pytestmark = pytest.mark.long

chapters = chapters_of(3, layer_spectral, layer_balanced)


def test_every_line_holds(chapters):
    chapters.hold(20)


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
def test_a_broken_formula_makes_its_line_fail(chapters, monkeypatch, name):
    monkeypatch.setattr(theory, *BROKEN[name])
    chapters.fail(name)


def test_lines_of_muon_fail_where_the_runs_disobey(chapters, monkeypatch):
    """Flows exchanged, and a loss that stops elsewhere."""
    runs = {name: layer_spectral.grown(name) for name in ("muon, early", "muon", "lora-muon", "plain")}
    runs["slower"] = runs["plain"]._replace(times=runs["plain"].times / 100)
    runs["two"] = runs["lora-muon"]._replace(values=runs["lora-muon"].values[:2])
    others = {"muon, early": "slower", "muon": "two", "lora-muon": "muon", "plain": "muon"}
    apart = {name: layer_spectral.stepped(name) for name in ("muon", "lora-muon")}
    monkeypatch.setattr(layer_spectral, "grown", lambda name: runs[others[name]])
    monkeypatch.setattr(layer_spectral, "stepped", lambda name: apart["muon" if name == "lora-muon" else "lora-muon"])
    monkeypatch.setattr(layer_spectral, "ends", lambda seeds: {(0.2, 4): np.array([1e-12, 1e-3])})
    chapters.fail(
        "muon_equal_rates",
        "muon_growth",
        "muon_finishes",
        "plain_finishes",
        "lora_muon_growth",
        "lora_muon_finishes",
        "lora_muon_invariant",
        "muon_variant",
        "muon_converges",
    )


def test_lines_of_balanced_factors_fail_where_the_runs_disobey(chapters, monkeypatch):
    """Starts that are not projected, a closed form a bit off, steps exchanged, gradient flow taken for BaLoRA."""
    plain = layer_balanced.decays("plain")
    run, closed = layer_balanced.flowing(chapters.seeds)
    off = layer_balanced.off_the_flow(chapters.seeds)
    monkeypatch.setattr(layer_balanced, "balance", lambda adapters: adapters)
    monkeypatch.setattr(layer_balanced, "flowing", lambda seeds: (run, closed + 1e-7))
    monkeypatch.setattr(layer_balanced, "off_the_flow", lambda seeds: off[::-1])
    monkeypatch.setattr(layer_balanced, "decays", lambda flow: plain)
    chapters.fail("balora_projection", "balora_closed_form", "balora_descent", "balora_rates", "hessian_conditioning")


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


def test_the_docs_page_has_every_line_with_its_verdict(chapters):
    chapters.stand_in_the_docs()

"""What theory says of LoRA's scaling: every line from runs, every formula broken once."""

import pytest
from chapters import chapters_of

from lora_flow.claims import layer_exponents, layer_scaling
from lora_flow.theory import scaling as theory

pytestmark = pytest.mark.long

chapters = chapters_of(4, layer_scaling, layer_exponents)


def test_every_line_holds_but_one(chapters):
    """Where A is free the loss is flat over decades of lora_alpha, and the place of its least value no power."""
    chapters.hold(11, failing=["exponent_where_a_is_free"])


def test_the_exponent_fails_where_the_learning_rates_are_exchanged(chapters, monkeypatch):
    logs = layer_exponents.last_losses()
    monkeypatch.setattr(layer_exponents, "last_losses", lambda: logs.assign_coords(step=logs["step"].values[::-1]))
    chapters.fail("exponent_where_a_is_frozen")


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
def test_a_broken_formula_makes_its_line_fail(chapters, monkeypatch, name):
    layer_scaling.first_steps.cache_clear()
    monkeypatch.setattr(theory, *BROKEN[name])
    chapters.fail(name)
    layer_scaling.first_steps.cache_clear()


def test_lines_fail_where_the_runs_disobey(chapters, monkeypatch):
    """The measured side broken: s taken for eta, alpha for the step size."""
    shares = layer_scaling.second_order(chapters.seeds)
    monkeypatch.setattr(layer_scaling, "second_order", lambda seeds: shares[::-1])
    raised = layer_scaling._raised
    other = {"lora_alpha": "step size", "step size": "lora_alpha"}
    monkeypatch.setattr(layer_scaling, "_raised", lambda name, moved, by: raised(name, other[moved], by))
    chapters.fail("drift_knows_no_alpha", "drift_knows_the_rate", "layers_bear", "layers_blow_up")


def test_the_docs_page_has_every_line_with_its_verdict(chapters):
    chapters.stand_in_the_docs()

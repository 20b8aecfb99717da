"""What theory says of LoRA on an attention head: every line from runs, every formula broken once."""

import pytest
from chapters import chapters_of

from lora_flow.claims import attention, attention_softmax
from lora_flow.problems.attention import AttentionLoRA
from lora_flow.theory import attention as theory
from lora_flow.theory import softmax_attention as softmax

pytestmark = pytest.mark.long

chapters = chapters_of(3, attention, attention_softmax)


@pytest.fixture
def anew():
    """Nothing of theory is kept from before the test, nor after."""
    kept = (attention.pretrained, attention.told, attention.told_of_fitted, attention_softmax.told)
    for one in kept:
        one.cache_clear()
    yield
    for one in kept:
        one.cache_clear()


def test_every_line_holds(chapters):
    chapters.hold(14)


one, fine_tune, error = theory.Pretraining, theory.fine_tune, theory.generalisation_error
thresholded, noise = theory.thresholded, one.effective_noise


def with_more_noise(noise, *rest, **how):
    return fine_tune(2 * noise, *rest, **how)


right_softmax = softmax.fine_tune, softmax.generalisation_error
BROKEN = {
    "attention_map": (theory, "thresholded", lambda delta, eps, kappa0: thresholded(delta, 1.1 * eps, kappa0)),
    "attention_overlap": (theory, "fine_tune", with_more_noise),
    "attention_elsewhere": (theory, "fine_tune", with_more_noise),
    "attention_test_error": (theory, "generalisation_error", lambda noise, *rest: error(1.1 * noise, *rest)),
    "attention_noise": (AttentionLoRA, "characteristics", lambda self: {"effective_noise": 1.4}),
    "attention_rescaling": (one, "best_beta", lambda self: 0.5),
    "attention_rescaled": (one, "effective_noise", lambda self, beta=1.0: noise(self, 1.0)),
    "attention_selected": (one, "selected_noise", lambda self, kept: noise(self)),
    "attention_reused": (one, "reused_noise", noise),
    "attention_mismatch": (one, "reused_noise", noise),
    "softmax_overlap": (softmax, "fine_tune", lambda law, ratio, ridge: right_softmax[0](law, 0.7 * ratio, ridge)),
    "softmax_test_error": (softmax, "generalisation_error", lambda law, tuned: 1.1 * right_softmax[1](law, tuned)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_formula_makes_its_line_fail(chapters, anew, monkeypatch, name):
    monkeypatch.setattr(*BROKEN[name])
    chapters.fail(name)


def test_lines_fail_where_the_flow_disobeys(chapters, monkeypatch):
    """As if the loss had fallen by a twentieth when the overlap rises, and the flow had ended beside its minimum."""
    run = attention.flow()
    loss = run.loss.copy()
    loss[:, 1:] *= 0.95
    monkeypatch.setattr(attention, "flow", lambda: run._replace(loss=loss, least=run.least - 0.002))
    chapters.fail("attention_phases", "attention_flow")


def test_the_docs_page_has_every_line_with_its_verdict(chapters):
    chapters.stand_in_the_docs()

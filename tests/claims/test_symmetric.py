"""What theory says of symmetric factorisations: every line from runs, every formula broken once."""

import pytest
from chapters import chapters_of

from lora_flow.claims import symmetric
from lora_flow.theory import symmetric as theory

pytestmark = pytest.mark.long

chapters = chapters_of(3, symmetric)


def test_every_line_holds(chapters):
    chapters.hold(11)


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
def test_a_broken_formula_makes_its_line_fail(chapters, monkeypatch, name):
    monkeypatch.setattr(*BROKEN[name])
    chapters.fail(name)


def test_lines_fail_where_the_runs_disobey(chapters, monkeypatch):
    """The measured side broken: lanes exchanged, LoRA's starts taken for balanced ones, a closed form a bit off."""
    measured, closed = symmetric.staged()
    off = [one._replace(tilt=(1 + 1e-6) * one.tilt) for one in closed]
    monkeypatch.setattr(symmetric, "staged", lambda: (measured, off))
    long = symmetric.long()
    exchanged = long._replace(noise=long.noise[::-1], excess=long.excess[::-1])
    monkeypatch.setattr(symmetric, "long", lambda: exchanged)
    monkeypatch.setattr(symmetric, "STARTS", (*symmetric.STARTS[3:6], *symmetric.STARTS[:3], symmetric.STARTS[6]))
    chapters.fail(
        "symmetric_exact",
        "symmetric_noise",
        "symmetric_tail",
        "symmetric_rates",
        "balanced_tail",
        "no_tail",
        "columns_stay",
        "symmetric_cascade",
    )


def test_the_docs_page_has_every_line_with_its_verdict(chapters):
    chapters.stand_in_the_docs()

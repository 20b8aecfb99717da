"""What theory says of Stable-LoRA: every line from runs, every formula and every run broken once."""

import numpy as np
import pytest
from chapters import chapters_of

from lora_flow.claims import layer_stable
from lora_flow.theory import lora_one, stable_lora

pytestmark = pytest.mark.long

chapters = chapters_of(3, layer_stable)


def test_every_line_holds(chapters):
    chapters.hold(8)


@pytest.mark.parametrize(
    ("formula", "arguments", "by_hand"),
    [
        # k = 1, m = 1, n = 2, ||A_0|| = 5, G A_0^T = 3
        (stable_lora.switch_off_time, (np.array([[1.0, 0.0]]), np.array([[3.0, 4.0]]), 1.0), np.log(1 + 5 / 6)),
        (stable_lora.switch_off_time_of_gaussian, (2 * np.eye(4), 8.0), np.log(1 + 8 * 4 / (2 * 4)) / 8),
        (stable_lora.norms_left, ((40, 80),), 0.75),
        # one input: B's part is (2 + 3 * .1 * 3)/(4 * .1 * 3) of A's
        (
            stable_lora.share_of_b,
            (np.eye(1), np.ones((1, 3)), np.array([[2.0, 0, 0]]), np.ones((3, 1)), 0.1, 4),
            2.9 / 1.2,
        ),
    ],
)
def test_formulas_by_hand(formula, arguments, by_hand):
    assert float(formula(*arguments)) == pytest.approx(by_hand, rel=1e-12)


BROKEN = {
    "stable_lora_stops": (stable_lora, "switch_off_time", lambda task, a, rate: 1.1 * RIGHT_TIME(task, a, rate)),
    "stable_lora_leaves": (stable_lora, "norms_left", lambda layer: 1 - layer[0] / layer[1]),
    "stable_lora_balances": (lora_one, "imbalance", lambda a, b: a @ a.mT + b.mT @ b),
    "sign_steps_over_the_width": (stable_lora, "STEP_EXPONENTS", (-2.0, -1.0)),
    "sign_steps_share": (stable_lora, "share_of_b", lambda sb, sa, a, z, eta, t: RIGHT_SHARE(sb, sa, a, z, eta, 2 * t)),
}
RIGHT_TIME, RIGHT_SHARE = stable_lora.switch_off_time, stable_lora.share_of_b


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_formula_makes_its_line_fail(chapters, monkeypatch, name):
    monkeypatch.setattr(*BROKEN[name])
    sign_steps = layer_stable.sign_steps.__wrapped__  # whose predictions are kept with the runs
    monkeypatch.setattr(layer_stable, "sign_steps", sign_steps)
    chapters.fail(name)


def test_lines_fail_where_the_runs_disobey(chapters, monkeypatch):
    """The measured side broken: the shrunk runs and those without shrinking exchanged, sizes and factors exchanged."""
    right = layer_stable.long

    def exchanged(rate, seeds):
        return right(0.0 if rate else 5.0, seeds)

    monkeypatch.setattr(layer_stable, "long", exchanged)
    chapters.fail("stable_lora_saves", "stable_lora_costs", "stable_lora_balances", "stable_lora_needs_shrinking")
    stopped = layer_stable.stopped

    def later(*which):
        run = stopped(*which)
        return run._replace(until=1.1 * run.until, b=1.01 * run.b)

    monkeypatch.setattr(layer_stable, "stopped", later)
    chapters.fail("stable_lora_stops", "stable_lora_leaves")


def test_the_docs_page_has_every_line_with_its_verdict(chapters):
    chapters.stand_in_the_docs()

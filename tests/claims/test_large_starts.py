"""What theory says of large starts: every line from runs, the closed form and the runs broken once."""

import numpy as np
import pytest
from chapters import chapters_of

from lora_flow import oracles
from lora_flow.claims import layer_large

pytestmark = pytest.mark.long

chapters = chapters_of(3, layer_large)


def test_every_line_holds(chapters):
    chapters.hold(7)


@pytest.mark.parametrize("name", ["large_start", "large_start_at_two"])
def test_another_clock_of_the_closed_form_makes_its_line_fail(chapters, monkeypatch, name):
    right = oracles.large_start
    monkeypatch.setattr(oracles, "large_start", lambda y, rows, a, t: right(y, rows, 1.1 * a, t))
    chapters.fail(name)


def test_lines_fail_where_the_runs_disobey(chapters, monkeypatch):
    """The measured side broken: other clocks, orthonormal rows taken for Gaussian ones, sizes exchanged."""
    runs = layer_large.runs()
    clocks = {(a, s): (np.sqrt(a) * times, loss) for (a, s), (times, loss) in runs.orthonormal.items() if s == 1}
    changed = runs._replace(
        orthonormal=runs.orthonormal | clocks,
        gaussian={4.0: runs.orthonormal[4.0, 1.0], 8.0: runs.gaussian[8.0]},
        random_b=dict(zip(runs.random_b, [*runs.random_b.values()][::-1], strict=True)),
    )
    monkeypatch.setattr(layer_large, "runs", lambda: changed)
    chapters.fail(
        "large_start_time", "small_start_time", "large_starts_collapse", "scaling_cancels", "random_b_reverses"
    )


def test_the_docs_page_has_every_line_with_its_verdict(chapters):
    chapters.stand_in_the_docs()

"""What theory says of large starts: every line from runs, the closed form and the runs broken once."""

import numpy as np
import pytest

from lora_flow import oracles
from lora_flow.claims import layer_large
from lora_flow.claims.table import CLAIMS

pytestmark = pytest.mark.long

SEEDS = 3
NAMES = [name for name, claim in CLAIMS.items() if claim.__module__ == layer_large.__name__]


@pytest.fixture(scope="module")
def lines():
    return {name: CLAIMS[name](SEEDS) for name in NAMES}


def test_every_line_holds(lines):
    assert len(lines) == 7
    for name, line in lines.items():
        assert line.verdict == "holds", f"{name}: {line.cases}"


@pytest.mark.parametrize("name", ["large_start", "large_start_at_two"])
def test_another_clock_of_the_closed_form_makes_its_line_fail(lines, monkeypatch, name):
    right = oracles.large_start
    monkeypatch.setattr(oracles, "large_start", lambda y, rows, a, t: right(y, rows, 1.1 * a, t))
    assert CLAIMS[name](SEEDS).verdict.startswith("fails")


def test_lines_fail_where_the_runs_disobey(lines, monkeypatch):
    """The measured side broken: other clocks, orthonormal rows taken for Gaussian ones, sizes exchanged."""
    runs = layer_large.runs()
    clocks = {(a, s): (np.sqrt(a) * times, loss) for (a, s), (times, loss) in runs.orthonormal.items() if s == 1}
    changed = runs._replace(
        orthonormal=runs.orthonormal | clocks,
        gaussian={4.0: runs.orthonormal[4.0, 1.0], 8.0: runs.gaussian[8.0]},
        random_b=dict(zip(runs.random_b, [*runs.random_b.values()][::-1], strict=True)),
    )
    monkeypatch.setattr(layer_large, "runs", lambda: changed)
    names = ("large_start_time", "small_start_time", "large_starts_collapse", "scaling_cancels", "random_b_reverses")
    for name in names:
        assert CLAIMS[name](SEEDS).verdict.startswith("fails"), name

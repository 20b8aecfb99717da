"""What a line of theory says: verdicts and their intervals, runs that count, identities."""

import csv

import numpy as np
import pytest

from lora_flow.claims.check import markdown, terminal_line, write_csv
from lora_flow.claims.frame import at_least, at_most, between, by_construction, estimate, near
from lora_flow.claims.lora_runs import Evidence
from lora_flow.claims.table import CLAIMS, Case, Line

WIDE = np.array([0.9, 1.1, 0.9, 1.1])  # its 95% interval is 1 +- 0.18
NARROW = 1 + 1e-3 * np.array([-1.0, 1.0, -1.0, 1.0])


def test_the_interval_is_students():
    """t(0.975, 3) = 3.1824, standard deviation 0.11547 of four values, over the square root of four."""
    assert estimate(WIDE) == (pytest.approx(1.0), pytest.approx(3.18244630528 * 0.11547005384 / 2))


@pytest.mark.parametrize(
    ("case", "verdict"),
    [
        (near("", 1.0, NARROW, 0.01), "yes"),
        (near("", 1.02, NARROW, 0.01), "no"),
        (near("", 1.0, WIDE, 0.2), "yes"),
        (near("", 1.0, WIDE, 0.1), "undecided"),  # within the tolerance, which is narrower than the interval
        (near("", 1.15, WIDE, 0.1), "undecided"),  # beyond it, by less than the interval
        (near("", 2.0, WIDE, 0.1), "no"),
        (between("", 1.0, WIDE, 0.6, 1.1), "yes"),
        (between("", 1.0, WIDE, 0.98, 1.1), "undecided"),
        (at_least("", 0.8, WIDE), "yes"),
        (at_least("", 0.9, WIDE), "undecided"),
        (at_least("", 1.1, WIDE), "undecided"),
        (at_least("", 1.2, WIDE), "no"),
        (at_most("", 1.2, WIDE), "yes"),
        (at_most("", 1.1, WIDE), "undecided"),
        (at_most("", 0.8, WIDE), "no"),
        (Case("", 1.0, 1.0, None, None), "not applicable"),
    ],
)
def test_a_case_is_decided_only_by_an_interval_that_can(case, verdict):
    assert case.verdict == verdict


def line(*cases, **more):
    return Line("source", "statement", "gaussian", cases, **more)


YES, NO = near("", 1.0, NARROW, 0.01), near("", 2.0, NARROW, 0.01)
MAYBE, NONE = near("", 1.0, WIDE, 0.1), Case("", 1.0, np.nan, None, None)


@pytest.mark.parametrize(
    ("told", "verdict"),
    [
        (line(YES, YES), "holds"),
        (line(YES, MAYBE, MAYBE), "undecided (2 of 3)"),
        (line(YES, MAYBE, NO), "fails (1 of 3)"),
        (line(YES, NONE), "holds"),
        (line(NONE), "not applicable"),
        (line(YES, identity=True), "holds (identity)"),
        (line(NO, identity=True), "fails (1 of 1)"),
    ],
)
def test_the_verdict_of_a_line(told, verdict):
    assert told.verdict == verdict
    assert terminal_line(told).startswith(f"{verdict} ")


def test_a_line_says_how_many_runs_stand_behind_it(tmp_path):
    counted = line(Case("x", 1.0, 1.0, None, True, counted=(3, 42)), Case("y", 1.0, 1.0, None, True, counted=(7, 42)))
    assert terminal_line(counted).endswith("source: statement (10 of 84 runs count)")
    assert "| gaussian; 10 of 84 runs count |" in markdown([counted])
    every = line(Case("x", 1.0, 1.0, None, True, counted=(42, 42)), YES)
    assert "count" not in terminal_line(every) + markdown([every])
    write_csv([counted, line(MAYBE)], tmp_path / "theory.csv")
    rows = list(csv.DictReader((tmp_path / "theory.csv").read_text().splitlines()))
    assert [(row["holds"], row["runs_counted"], row["runs_in_all"]) for row in rows] == [
        ("yes", "3", "42"),
        ("yes", "7", "42"),
        ("undecided", "", ""),
    ]


def test_identities_are_marked_and_keep_their_names():
    marked = by_construction(lambda evidence: line(YES))
    assert marked(Evidence(seeds=3)).verdict == "holds (identity)"
    assert {"exact_split", "conservation", "step_rule", "one_step_product", "scaled_moves"} <= set(CLAIMS)
    assert CLAIMS["step_rule"].__module__ == "lora_flow.claims.layer_descent"

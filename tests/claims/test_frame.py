"""What a line of theory says: verdicts and their intervals, runs that count, identities."""

import csv

import numpy as np
import pytest

from lora_flow.claims import check
from lora_flow.claims.check import markdown, terminal_line, write_csv
from lora_flow.claims.frame import Case, Line, Tried, claim, estimate, judge
from lora_flow.claims.table import CLAIMS

WIDE = np.array([0.9, 1.1, 0.9, 1.1])  # its 95% interval is 1 +- 0.18
NARROW = 1 + 1e-3 * np.array([-1.0, 1.0, -1.0, 1.0])


def test_the_interval_is_students():
    """t(0.975, 3) = 3.1824, standard deviation 0.11547 of four values, over the square root of four."""
    assert estimate(WIDE) == (pytest.approx(1.0), pytest.approx(3.18244630528 * 0.11547005384 / 2))


def test_a_number_by_itself_has_no_interval():
    assert estimate(2.0) == (2.0, None)


@pytest.mark.parametrize(
    ("predicted", "values", "how", "verdict"),
    [
        (1.0, NARROW, {"within": 0.01}, "yes"),
        (1.02, NARROW, {"within": 0.01}, "no"),
        (1.0, WIDE, {"within": 0.2}, "yes"),
        (1.0, WIDE, {"within": 0.1}, "undecided"),  # within the tolerance, which is narrower than the interval
        (1.15, WIDE, {"within": 0.1}, "undecided"),  # beyond it, by less than the interval
        (2.0, WIDE, {"within": 0.1}, "no"),
        (1.0, WIDE, {"within": (0.4, 0.1)}, "yes"),
        (1.0, WIDE, {"within": (0.02, 0.1)}, "undecided"),
        (1.3, NARROW, {"within": (0.4, 0.1)}, "yes"),
        (0.8, NARROW, {"within": (0.4, 0.1)}, "no"),
        (100.0, 100 * NARROW, {"within": 0.01, "relative": True}, "yes"),
        (0.01, 0.01 * NARROW + 0.001, {"within": 0.01, "relative": True}, "no"),
        (0.8, WIDE, {"relation": ">="}, "yes"),
        (0.9, WIDE, {"relation": ">="}, "undecided"),
        (1.1, WIDE, {"relation": ">="}, "undecided"),
        (1.2, WIDE, {"relation": ">="}, "no"),
        (1.2, WIDE, {"relation": "<="}, "yes"),
        (1.1, WIDE, {"relation": "<="}, "undecided"),
        (0.8, WIDE, {"relation": "<="}, "no"),
        (1.0, 1.0, {"relation": "<="}, "yes"),  # a number by itself, the worst of all runs
        (1.0, 1.1, {"relation": "<="}, "no"),
        (1.0, 1 + 1e-10, {"relation": "<=", "within": 1e-9}, "yes"),
        (1.0, 1 - 1e-10, {"relation": ">=", "within": 1e-9}, "yes"),
        (0.0, 1e-10, {}, "no"),
        *((1.0, np.nan, {"relation": relation}, "no") for relation in ("=", ">=", "<=")),
    ],
)
def test_a_case_is_decided_only_by_an_interval_that_can(predicted, values, how, verdict):
    assert judge(Tried("", predicted, values), **how).verdict == verdict


def test_a_case_may_not_apply_or_ask_for_more():
    assert judge(Tried("", 1.0, 1.0, applies=False)).verdict == "not applicable"
    assert judge(Tried("", 1.0, 1.0, also=False)).verdict == "no"
    assert judge(Tried("", 1.0, WIDE, also=False), within=0.1).verdict == "no"
    assert judge(Tried("", 1.0, 1.0, also=True, counted=(3, 42))) == Case("", 1.0, 1.0, None, True, True, (3, 42))


def line(*cases, **more):
    return Line("source", "statement", "gaussian", cases, **more)


YES, NO = (judge(Tried("", predicted, NARROW), within=0.01) for predicted in (1.0, 2.0))
MAYBE, NONE = judge(Tried("", 1.0, WIDE), within=0.1), judge(Tried("", 1.0, np.nan, applies=False))


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


def test_a_claim_is_a_generator_whose_docstring_is_the_statement(monkeypatch):
    entered = {}
    monkeypatch.setattr("lora_flow.claims.frame.ENTERED", entered)

    @claim("somewhere", "{seeds} runs", "<=", within=0.1, identity=True)
    def small(seeds):
        """
        it is small, and its
        statement two lines long
        """
        yield "here", 1, 1.05
        yield "there", 1, np.ones(seeds), False

    told = small(3)
    assert entered == {"small": small}
    assert told == Line(
        "somewhere",
        "it is small, and its statement two lines long",
        "3 runs",
        (Case("here", 1.0, 1.05, None, True), Case("there", 1.0, 1.0, 0.0, None)),
        "<=",
        identity=True,
    )
    assert told.verdict == "holds (identity)"


def test_identities_keep_their_names():
    assert {"exact_split", "conservation", "step_rule", "one_step_product", "scaled_moves"} <= set(CLAIMS)
    assert CLAIMS["step_rule"].__module__ == "lora_flow.claims.layer_descent"
    assert CLAIMS["step_rule"].__name__ == "step_rule"


def test_lines_of_both_processes_come_in_the_order_of_the_claims(monkeypatch):
    """Two quick ones, the first of them from the second process."""
    names = ("balanced_conditioning", "sampling_angle")
    monkeypatch.setattr(check, "CLAIMS", {name: CLAIMS[name] for name in names})
    for name, line in zip(names, check.check(3), strict=True):
        assert line.statement == " ".join(CLAIMS[name].__doc__.split())
        assert not line.verdict.startswith("fails")

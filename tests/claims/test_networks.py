"""What theory says of linear networks that are trained from scratch: every line from runs, broken formulas and runs."""

import numpy as np
import pytest
from chapters import chapters_of

from lora_flow.claims import (
    network_bias,
    network_descent,
    network_descent_runs,
    network_flow,
    network_local,
    network_runs,
    network_weights,
)
from lora_flow.claims.network_bias import WIDTHS
from lora_flow.claims.network_descent_runs import ADAPTIVE, FIXED, GROWING, RULES
from lora_flow.claims.network_runs import SHAPES, STARTS
from lora_flow.theory import linear_descent, linear_flow, linear_local

pytestmark = pytest.mark.long

SEEDS = 4
chapters = chapters_of(SEEDS, network_flow, network_bias, network_weights, network_descent, network_local)


def test_right_readings_hold_and_misprints_fail(chapters):
    chapters.hold(27)


def test_the_misprint_is_right_for_square_products(chapters):
    holds = {case.where[:12]: case.holds for case in chapters.lines["alpha_below_tau_as_printed"].cases}
    assert holds == {"n = 4, m = 4": True, "n = 3, m = 5": False, "n = 6, m = 2": False}


def test_every_line_covers_its_shapes_starts_and_rules(chapters):
    cases = {name: len(line.cases) for name, line in chapters.lines.items()}
    for name in ("network_imbalance", "imbalance_decay", "instantaneous_decay", "global_decay"):
        assert cases[name] == len(SHAPES) * len(STARTS)
    for name in ("descent_rate", "local_descent_lemma", "local_pl"):
        assert cases[name] == len(SHAPES) * len(RULES)
    assert cases["descent_rate_bound"] == len(SHAPES) * (len(FIXED) + len(ADAPTIVE))
    assert cases["adaptive_rates"] == len(SHAPES) * len(ADAPTIVE)
    assert cases["growing_rate"] == cases["growing_drift"] == len(SHAPES) * len(GROWING)
    assert cases["width_distance_bound"] == cases["width_imbalance"] == 2 * len(WIDTHS)


def test_what_is_out_of_reach_is_not_applicable(chapters):
    """A balanced start has no imbalance; Lemma 1 asks for wide networks, Theorem 3.3 for wider ones as p nears 1/2."""
    tried = {name: [case for case in line.cases if case.holds is None] for name, line in chapters.lines.items()}
    assert [case.where for case in tried.pop("imbalance_decay")] == [
        f"{shape}, balanced: a rate of 0" for shape in SHAPES
    ]
    narrow = [case.where for case in tried.pop("width_imbalance")]
    assert narrow == [f"p = {p:g}, h = {h}: not wide enough" for p in (0.5, 0.4) for h in (50, 100)]
    solutions = [case.where.split(", b2")[0] for case in tried.pop("width_condition")]
    assert solutions == ["||W*||_F = 1, p = 0.475"] + [f"||W*||_F = 10, p = {p:g}" for p in network_local.POWERS]
    assert not any(tried.values())


def test_pretraining_is_told_for_three_ratios_of_each_start(chapters):
    measured = [
        [case.measured for case in chapters.lines[f"trained_gains_{kind}"].cases] for kind in ("spectral", "gaussian")
    ]
    assert list(map(len, measured)) == [3, 3]
    assert min(measured[1]) > 1e3 * max(measured[0]), "only modes that do not meet are told exactly"


def test_bounds_are_not_empty(chapters):
    """How near they come: the rates of the flow within a factor of three, those of descent of ten."""
    for name in ("imbalance_decay", "instantaneous_decay", "global_decay"):
        assert all(case.measured < 3 for case in chapters.lines[name].cases if case.holds is not None)
    for name in ("descent_rate_bound", "adaptive_rates", "growing_rate", "largest_step_rate"):
        assert all(case.measured > 0.1 for case in chapters.lines[name].cases)


def test_runs_are_what_the_lines_need():
    """Adaptive steps that the cap does not bind, growing ones that 1/K_t does, and losses that come down."""
    near = {rule: network_descent_runs.descents(SEEDS)["n = m = 4", "near", rule] for rule in RULES}
    for rate in ("rho", "current"):
        assert np.all(near[rate].at.step > 2 * near["eta_max"].at.step)
    last = near["1/K_t, d = 1.01"].at
    np.testing.assert_allclose(last.step[:, -1] * last.smooth.at(last.step)[:, -1], 1.0, rtol=1e-9)
    assert np.all(near["1/K_t, d = 1.01"].after[:, -1] < 1e-16 * last.loss[:, 0])
    for run in network_runs.flows(SEEDS).values():
        assert np.all(run.loss[:, -1] < 1e-16 * run.loss[:, 0])


def _bound(right, **factors):
    """rate_bound with coefficients multiplied."""

    def wrong(*arguments):
        bound = right(*arguments)
        return bound._replace(**{name: by * getattr(bound, name) for name, by in factors.items()})

    return wrong


RHOBAR, DRIFT_BOUND = linear_local.Schedule.rhobar.fget, linear_local.Schedule.imbalance_drift_bound
BROKEN = {
    "imbalance_decay": (linear_flow, "loss_bound", lambda rate, t, excess: np.exp(-2 * rate * t) * excess),
    "global_decay": (linear_flow, "loss_bound", lambda rate, t, excess: np.exp(-2 * rate * t) * excess),
    "scalar_decay": (linear_flow, "scalar_rate", lambda d, w, s: 2 * s * np.sqrt(d**2 + 2 * w**2)),
    "width_distance_bound": (linear_flow, "width_bound", lambda h, a, *rest: h ** (0.5 - 3 * a)),
    "width_imbalance": (linear_flow, "width_imbalance", lambda h, a: 2 * h ** (1 - 2 * a)),
    "descent_rate_bound": (linear_descent, "rate_bound", _bound(linear_descent.rate_bound, a1=2.0, a2=0.1)),
    "largest_step_rate": (linear_descent, "rate_bound", _bound(linear_descent.rate_bound, a1=20.0)),
    "adaptive_rates": (linear_descent, "rate_bound", _bound(linear_descent.rate_bound, a1=2.0, a2=0.1)),
    "largest_step_drift": (
        linear_descent,
        "imbalance_drift_bound",
        lambda start, eta, c1, c2: 1e-2 * eta**2 * start.K * start.beta * start.loss,
    ),
    "growing_rate": (linear_local.Schedule, "rhobar", property(lambda schedule: RHOBAR(schedule) ** 4)),
    "growing_drift": (linear_local.Schedule, "imbalance_drift_bound", lambda schedule: DRIFT_BOUND(schedule) / 20),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_formula_makes_its_line_fail(chapters, monkeypatch, name):
    monkeypatch.setattr(*BROKEN[name])
    chapters.fail(name)


RUNS = {
    "flows": network_runs,
    "widths": network_bias,
    "spectra": network_weights,
    "descents": network_descent_runs,
    "condition": network_local,
}


def _change(monkeypatch, kind, **changes):
    """Makes these runs others: some of their fields are changed, each by a function of its value."""
    right = getattr(RUNS[kind], kind)

    def changed(found):
        if isinstance(found, dict):
            return {key: changed(run) for key, run in found.items()}
        return found._replace(**{name: by(getattr(found, name)) for name, by in changes.items()})

    monkeypatch.setattr(RUNS[kind], kind, lambda *arguments: changed(right(*arguments)))


def _at(**changes):
    """The same of the points of descents."""
    return lambda at: at._replace(**{name: by(getattr(at, name)) for name, by in changes.items()})


WRONG_RUNS = {
    "network_imbalance": ("flows", {"drift": lambda drift: drift + 1e-9}),
    "imbalance_decay": ("flows", {"times": lambda times: 2 * times}),
    "instantaneous_decay": ("flows", {"speed": lambda speed: speed / 2}),
    "global_decay": ("flows", {"loss": lambda loss: np.sqrt(loss * loss[:, :1])}),
    "invariant_set": ("flows", {"distance": lambda distance: distance + 1e-7}),
    "invariant_set_halves": ("flows", {"distance": lambda distance: 1e-3 * distance}),
    "width_distance": ("widths", {"distance": lambda distance: np.sqrt(distance)}),
    "width_distance_bound": ("widths", {"distance": lambda distance: 1e4 * distance}),
    "alpha_below_tau": ("spectra", {"lowest": lambda lowest: 0.9 * lowest}),
    "imbalance_of_descent": ("descents", {"at": _at(change_error=lambda error: error + 1e-11)}),
    "descent_rate": ("descents", {"after": lambda after: 1.01 * after}),
    "descent_rate_bound": ("descents", {"at": _at(rho=_bound(lambda rho: rho, a1=0.2))}),
    "largest_step_keeps_tau": ("descents", {"at": _at(lowest=lambda lowest: 0.4 * lowest)}),
    "largest_step_rate": ("descents", {"after": lambda after: 1.01 * after}),
    "largest_step_drift": ("descents", {"at": _at(drift=lambda drift: 1e3 * drift)}),
    "adaptive_rates": ("descents", {"after": lambda after: 1.01 * after}),
    "local_descent_lemma": ("descents", {"at": _at(gradient2=lambda gradient2: 2 * gradient2)}),
    "local_pl": ("descents", {"at": _at(gradient2=lambda gradient2: gradient2 / 2)}),
    "growing_rate": ("descents", {"after": lambda after: np.sqrt(np.sqrt(after))}),
    "growing_drift": ("descents", {"at": _at(drift=lambda drift: 1e3 * drift)}),
    "width_condition": ("condition", {"ratio": lambda ratio: 1 - np.sqrt(1 - ratio)}),
}


@pytest.mark.parametrize("name", WRONG_RUNS)
def test_a_line_fails_where_the_runs_disobey(chapters, monkeypatch, name):
    kind, changes = WRONG_RUNS[name]
    _change(monkeypatch, kind, **changes)
    chapters.fail(name)


def test_other_lines_fail_where_the_runs_disobey(chapters, monkeypatch):
    """One layer that moves alone, and starts with sigma = 1 taken for others."""
    scalar = network_flow.scalar(SEEDS)
    alone = scalar._replace(u=scalar.u[:, :1] + 0 * scalar.u)
    monkeypatch.setattr(network_flow, "scalar", lambda seeds: alone)
    chapters.fail("scalar_decay")
    published = network_descent.published()
    monkeypatch.setattr(network_descent, "published", lambda: dict.fromkeys(published, published[1]))
    chapters.fail("published_conditions")


def test_a_run_that_does_not_come_to_a_solution_is_no_evidence(chapters, monkeypatch):
    _change(monkeypatch, "flows", loss=lambda loss: loss + 1e-10 * loss[:, :1])
    chapters.fail("invariant_set", "invariant_set_halves")


def test_the_docs_page_has_every_line_with_its_verdict(chapters):
    chapters.stand_in_the_docs()

"""What theory says of continual learning: every line from runs, every formula and every rule broken once."""

import jax.numpy as jnp
import numpy as np
import pytest
from chapters import chapters_of

from lora_flow import Adapter, Protected
from lora_flow.algebra.subspaces import without
from lora_flow.claims import continual
from lora_flow.claims.table import CLAIMS
from lora_flow.theory import continual as theory

pytestmark = pytest.mark.long

chapters = chapters_of(3, continual)


def test_every_line_holds(chapters):
    chapters.hold(12)


exact_motion, optimum, floor = theory.exact_motion, theory.constrained_optimum, theory.floor
BROKEN = {
    "safe_motion": ("exact_motion", lambda g, a, b, basis: exact_motion(g, a, b, basis[:, :-1])),
    "safe_optimum": ("constrained_optimum", lambda g, a, b, basis: (1 + 1e-6) * optimum(g, a, b, basis)),
    "safe_rank": ("rank_outside", lambda rank, blocked: rank - (blocked + 1) // 2),
    "safe_gradients_violate": ("violation", lambda motion, basis: np.linalg.norm(motion @ basis)),
    "safe_floor": ("floor", lambda shift, basis, covariance=None: 1.05 * floor(shift, basis, covariance)),
    "plain_forgets": ("forgetting", lambda change, basis: np.sum((change @ basis) ** 2)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_formula_makes_its_line_fail(chapters, monkeypatch, name):
    monkeypatch.setattr(theory, *BROKEN[name])
    chapters.fail(name)


def test_the_floor_of_white_inputs_is_not_that_of_correlated_ones(chapters, monkeypatch):
    monkeypatch.setattr(theory, "floor", lambda shift, basis, covariance=None: floor(shift, basis))
    assert CLAIMS["safe_floor"](chapters.seeds).verdict == "fails (1 of 9)"


class Leaky(Protected):
    """The exact rule without Pi, and project-A without N."""

    def velocity(self, descent, adapter):
        moved = super().velocity(descent, adapter)
        return Adapter(moved.a, descent.b) if self.exact else Adapter(descent.a, moved.b)


def test_lines_fail_where_the_rules_leak(chapters, monkeypatch):
    monkeypatch.setattr(continual, "Protected", Leaky)
    monkeypatch.setattr(continual, "SHAPES", ((11, 8, 6, 4),))  # one program for each
    monkeypatch.setattr(continual, "SMALL", ((11, 8, 6, 4),))
    chapters.fail("safe_motion", "safe_optimum", "safe_flow", "safe_descent", "safe_rank")


def test_lines_fail_where_the_runs_disobey(chapters, monkeypatch):
    """Rules exchanged: plain for projected, projected for safe, safe for plain."""
    single, turns = continual.single, continual.turns
    other = {"plain": "safe-start", "projected": "plain", "exact": "plain", "safe-start": "plain"}
    monkeypatch.setattr(continual, "single", lambda name, seeds: single(other[name], seeds))
    instead = {"plain": "safe-start", "exact": "safe-start", "safe-start": "exact"}
    monkeypatch.setattr(continual, "turns", lambda name: turns(instead[name]))
    chapters.fail(
        "projected_forgets",
        "safe_floor",
        "plain_forgets",
        "safe_start_in_turn",
        "orthogonal_tasks_are_forgotten",
        "exact_loses_plasticity",
    )


def test_the_leak_is_one():
    """`Leaky` differs from `Protected` where it says, so the test above tests what it says."""
    rng = np.random.default_rng(0)
    one = Adapter(jnp.asarray(rng.normal(size=(2, 5))), jnp.asarray(rng.normal(size=(4, 2))))
    basis = jnp.eye(5, 1)
    assert np.abs(np.asarray(Leaky(basis).velocity(one, one).a - without(one.a, basis))).max() > 0.1


def test_the_docs_page_has_every_line_with_its_verdict(chapters):
    chapters.stand_in_the_docs()

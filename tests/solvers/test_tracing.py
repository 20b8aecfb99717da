"""A program of `solve` traces its step once; what it computes, and its derivatives, the other tests of `solve` say."""

import jax
import jax.numpy as jnp
import pytest

from lora_flow import SingleLayer, gaussian_init, solve
from lora_flow.solvers.automatic import Automatic
from lora_flow.solvers.chebyshev import RungeKuttaChebyshev


@pytest.mark.parametrize(("solver", "kind"), [("auto", Automatic), ("RKC", RungeKuttaChebyshev)])
def test_a_solve_traces_its_step_once(solver, kind, monkeypatch):
    traced = []
    step = kind.step
    monkeypatch.setattr(kind, "step", lambda *arguments: traced.append(True) or step(*arguments))
    problem = SingleLayer(jnp.diag(jnp.array([3.0, 2.0, 1.0])))
    start = gaussian_init(jax.random.key(0), problem, rank=2, alpha=0.1)
    jax.make_jaxpr(lambda start: solve(problem, start, t1=1.0, saves=2, solver=solver).observables)(start)
    assert len(traced) == 1

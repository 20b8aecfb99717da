"""Constant and adaptive steps: the recipe as published, and on small networks what is computed, said and drawn."""

import numpy as np
import pytest

from lora_flow.experiments import adaptive_step as adaptive
from lora_flow.theory import linear_descent as theory

SIZES = {"iteration": 41, "seed": 2}


@pytest.mark.parametrize("name", adaptive.SIGMAS)
def test_the_authors_draws_have_the_published_ratio(name):
    """The titles of Figure 2 of Xu et al. 2023, at the seeds 1 to 3 of the authors' code."""
    ratios = []
    for seed in range(1, adaptive.EXPERIMENT.seeds + 1):
        problem, start = adaptive.draw_problem(name, seed)
        constants = theory.constants(*problem.network(start))
        ratios.append(float(constants.alpha / constants.beta))
    assert np.mean(ratios) == pytest.approx(adaptive.PUBLISHED[name], abs=0.0015)


def test_the_balanced_start_is_balanced_and_near_the_solution():
    problem, ((a, b),) = adaptive.draw_problem("balanced", 1)
    np.testing.assert_allclose(a @ a.T, b.T @ b, atol=1e-12)
    off = np.linalg.norm(problem.solution - (b @ a).T)
    assert off == pytest.approx(adaptive.NOISE * np.sqrt(adaptive.SIDE), rel=0.4)
    assert np.linalg.norm(problem.solution) == pytest.approx(0.5 * np.sqrt(adaptive.SIDE), rel=0.4)


@pytest.mark.long
def test_a_small_run_of_adaptive_steps(small, check_pictures):
    found = small(adaptive, SIDE=4, WIDTH=60, BALANCED_WIDTH=9, STEPS=40)
    assert dict(found["loss"].sizes) == {"experiment": 4, "rule": 7, **SIZES}
    for name in ("loss", "step", "bound"):
        assert bool(found[name].sel(rule=list(adaptive.ADAPTIVE)).notnull().all()), name
    others = found["loss"].sel(rule=["Arora", "Du"])
    assert bool(others.sel(experiment="balanced").notnull().all())
    assert bool(others.drop_sel(experiment="balanced").isnull().all())
    assert not bool((found["loss"] > found["bound"] * (1 + 1e-9) + adaptive.rounding(found)).any())
    assert bool((found["step"].sel(rule=list(adaptive.ADAPTIVE)) <= found["largest_step"] * (1 + 1e-12)).all())
    by_rho = found.sel(rule="rho")
    cap = np.minimum(by_rho["free_step"], by_rho["largest_step"])
    np.testing.assert_allclose(by_rho["step"], cap.transpose(*by_rho["step"].dims), rtol=1e-12)
    told = adaptive.notes(found)
    assert "beyond rounding: 0." in told
    assert told.count("\n| ") == 2 + 7 + 3 * 5
    check_pictures(adaptive.draw(found))

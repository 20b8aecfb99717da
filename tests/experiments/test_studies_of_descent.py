"""The studies of step sizes: their recipes as published, and on small networks what they compute, say and draw."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from lora_flow.experiments import adaptive_step as adaptive
from lora_flow.experiments import growing_step as growing
from lora_flow.theory import linear_descent as theory

SIZES = {"iteration": 41, "seed": 2}


def quietly(items):
    return items


def small(monkeypatch, module, **sizes):
    for name, value in sizes.items():
        monkeypatch.setattr(module, name, value)
    return module.run(2, quietly)


def check_pictures(figure):
    """Eight panels with a letter, something to see in each, and one legend for all."""
    figure.draw_without_rendering()
    assert [ax.get_title(loc="left")[:3] for ax in figure.axes] == [f"({letter})" for letter in "abcdefgh"]
    assert all(ax.lines for ax in figure.axes)
    assert len(figure.legends) == 1
    plt.close(figure)


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


@pytest.mark.parametrize("name", [growing.PANELS[0], growing.FIGURE_5])
def test_the_growing_steps_start_where_sigma_says(name):
    setting = growing.SETTINGS[name]
    problem, start = growing.draw_problem(setting, 0)
    values = np.linalg.svd(problem.inputs, compute_uv=False)
    assert np.all(values >= setting.values[0] * (1 - 1e-12))
    assert np.all(values <= setting.values[1] * (1 + 1e-12))
    noise = np.sqrt(2 * float(problem.loss(start)))  # X is square, so that all of it can be learned
    assert noise == pytest.approx(setting.sigma**2 * setting.side, rel=0.3)
    norm = np.linalg.norm(start[0].a)
    assert norm == pytest.approx(np.sqrt(setting.side * (1 if setting.scaled else setting.width)), rel=0.1)


@pytest.mark.long
def test_the_study_of_adaptive_steps(monkeypatch):
    found = small(monkeypatch, adaptive, SIDE=4, WIDTH=60, BALANCED_WIDTH=9, STEPS=40)
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


@pytest.mark.long
def test_the_study_of_growing_steps(monkeypatch):
    settings = {name: one._replace(side=3, width=60 + one.width // 10) for name, one in growing.SETTINGS.items()}
    found = small(monkeypatch, growing, SETTINGS=settings, STEPS=40, SHOWN=30)
    assert dict(found["loss"].sizes) == {"setting": 7, "rule": 5, **SIZES}
    assert bool(found.notnull().all().to_array().all())
    ratios = growing.fall(found)
    assert int(ratios.notnull().sum()) > 500
    assert not bool((ratios > found["rate"] * (1 + 1e-6)).any())
    bound = np.maximum(found["rhobar"] ** found["iteration"], growing.RESOLVED)
    relative = found["loss"].sel(rule=growing.GROWING) / found["loss"].isel(iteration=0).sel(rule="constant")
    assert bool((relative <= bound * (1 + 1e-9)).all())
    first = found["step"].isel(iteration=0)
    np.testing.assert_allclose(first.sel(rule="K_t"), found["first_step"], rtol=1e-9)
    assert bool((found["step"].sel(rule="K_t").diff("iteration") > 0).isel(iteration=0).all())
    told = growing.notes(found)
    assert "0 to L <= L_0 rhobar_0^t, 0 to" in told
    assert told.count("\n| ") == 2 + 7
    check_pictures(growing.draw(found))

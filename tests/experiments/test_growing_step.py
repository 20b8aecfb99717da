"""Steps that grow: their starts, and on small networks what is computed, said and drawn."""

import numpy as np
import pytest

from lora_flow.experiments import growing_step as growing

SIZES = {"iteration": 41, "seed": 2}


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
def test_a_small_run_of_growing_steps(small, check_pictures):
    settings = {name: one._replace(side=3, width=60 + one.width // 10) for name, one in growing.SETTINGS.items()}
    found = small(growing, SETTINGS=settings, STEPS=40, SHOWN=30)
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

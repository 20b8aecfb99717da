"""One adapted layer on data: how it is drawn."""

import jax
import numpy as np
import pytest

from lora_flow import InputError, Regression, SingleLayer, regression_problem

KEY = jax.random.key(0)


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0])
def test_the_shift_has_the_singular_values_and_the_angle_asked_for(angle):
    problem = regression_problem(KEY, m=12, n=9, target_rank=3, kappa=100.0, angle=angle)
    u, sigma, vt = np.linalg.svd(problem.shift)
    np.testing.assert_allclose(sigma[:4], [1.0, 0.1, 0.01, 0.0], atol=1e-14)
    left, _, right = np.linalg.svd(problem.weight)
    for mine, theirs in ((u[:, :3], left[:, :3]), (vt[:3].T, right[:3].T)):
        cosines = np.linalg.svd(mine.T @ theirs, compute_uv=False)
        np.testing.assert_allclose(cosines, np.cos(np.deg2rad(angle)), atol=1e-12)


def test_inputs_have_the_covariance_asked_for_or_a_sample_of_it():
    infinite = regression_problem(KEY, m=5, n=6, input_kappa=10.0)
    covariance = np.asarray(infinite.features).T @ infinite.features
    right = np.linalg.svd(infinite.weight)[2]
    np.testing.assert_allclose(right @ covariance @ right.T, np.diag(np.geomspace(1, 0.1, 6)), atol=1e-14)
    sampled = regression_problem(KEY, m=5, n=6, input_kappa=10.0, samples=200_000)
    np.testing.assert_allclose(np.asarray(sampled.features).T @ sampled.features, covariance, atol=0.02)
    assert type(regression_problem(KEY)) is SingleLayer
    assert type(regression_problem(KEY, samples=30, activation="relu")) is Regression


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kappa": 0.5}, "kappa must be at least 1, got 0.5"),
        ({"angle": 91.0}, "angle must lie between 0 and 90 degrees, got 91.0"),
        ({"target_rank": 6, "angle": 5.0}, "target_rank must be at most 5, half the smallest dimension"),
        ({"samples": -1}, "samples must be at least 0"),
        ({"activation": "relu"}, "samples must be at least 1 with activation relu, got 0"),
        ({"activation": "tanh"}, "activation must be 'linear' or 'relu', got 'tanh'"),
    ],
)
def test_a_bad_draw_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        regression_problem(KEY, **arguments)

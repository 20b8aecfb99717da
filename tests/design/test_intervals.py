"""Profile likelihood on sums of squares whose profiles are known."""

import numpy as np
from scipy.stats import norm

from lora_flow.design.intervals import MOST, Better, profiles

THRESHOLD = norm.ppf(0.95) ** 2


def of_quadratic(matrix):
    """Minimises x^T M x over what is free."""

    def solve(points, free):
        found = points.copy()
        for row, at in zip(found, free, strict=True):
            held = ~at
            row[at] = -np.linalg.pinv(matrix[np.ix_(at, at)]) @ matrix[np.ix_(at, held)] @ row[held]
        return found, np.einsum("li,ij,lj->l", found, matrix, found)

    return solve


def test_of_a_quadratic_the_ends_are_standard_errors_times_the_quantile():
    matrix = np.array([[40.0, 30.0, 2.0], [30.0, 50.0, 1.0], [2.0, 1.0, 3.0]])
    errors = np.sqrt(np.diag(np.linalg.inv(matrix)))
    for factor in (1.0, 0.02, 30.0):  # a bad first step is found out
        found = profiles(of_quadratic(matrix), np.zeros(3), 0.0, factor * errors[:2], THRESHOLD)
        for one, error in zip(found, errors, strict=False):
            np.testing.assert_allclose([one.low, one.high], [-1.645 * error, 1.645 * error], rtol=0.012)
            assert np.all(np.diff(one.values) > 0)


def test_what_the_squares_do_not_depend_on_is_open():
    direction = np.array([1.0, -0.5])  # along which alone the squares grow
    found = profiles(of_quadratic(100 * np.outer(direction, direction)), np.zeros(2), 0.0, np.ones(2), THRESHOLD)
    for one in found:
        assert (one.low, one.high) == (-np.inf, np.inf)
        assert abs(one.values).max() == MOST


def test_one_end_may_be_open():
    def solve(points, free):
        return points, np.maximum(points[:, 0], 0.0) ** 2

    (found,) = profiles(solve, np.zeros(1), 0.0, np.ones(1), THRESHOLD)
    assert found.low == -np.inf
    np.testing.assert_allclose(found.high, 1.645, rtol=0.012)


def test_a_better_fit_on_the_way_is_handed_back():
    def solve(points, free):
        return points, (points[:, 0] - 1.0) ** 2

    found = profiles(solve, np.zeros(1), 1.0, np.array([0.5]), THRESHOLD)
    assert isinstance(found, Better)
    assert found.point[0] > 0

"""The symmetric factorisation's equilibria and rates, by hand; claims hold them against runs."""

import numpy as np
import pytest

from lora_flow.theory import symmetric

VALUES = np.array([2.0, 1.0, 0.0, -0.5])


def test_the_spectrum_by_hand():
    """r = 2 at J = {1}: -2, 0 once; towards the others -1, -3, -3.5 without -2; and unused 2, 0, -.5."""
    expected = sorted([-2.0, 0.0, 1.0, -1.0, -1.5, 2.0, 0.0, -0.5])
    np.testing.assert_allclose(symmetric.spectrum(VALUES, 2, (1,)), expected)
    assert symmetric.unstable_directions(VALUES, 2, (1,)) == 2
    assert symmetric.least_loss(VALUES, (1,)) == pytest.approx(4.25 / 4)


def test_every_spectrum_is_whole_and_only_the_best_is_stable():
    for rank in range(1, 6):
        for chosen in symmetric.equilibria(VALUES, rank):
            spectrum = symmetric.spectrum(VALUES, rank, chosen)
            assert len(spectrum) == 4 * rank
            unstable = symmetric.unstable_directions(VALUES, rank, chosen)
            assert np.sum(spectrum > 0) == unstable
            assert (unstable == 0) == (chosen == (0, 1)[:rank])
    assert [len(list(symmetric.equilibria(VALUES, rank))) for rank in (1, 2, 3)] == [3, 4, 4]


def test_repeated_eigenvalues_leave_directions_at_rest():
    assert symmetric.unstable_directions(np.array([1.0, 1.0, 0.0]), 1, (1,)) == 0


def test_eigenvalues_that_are_rounding_are_none():
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(7, 7)))
    values = np.linalg.eigvalsh(basis * np.array([2.0, 1.0, 1.0, 0.0, 0.0, 0.0, -0.5]) @ basis.T)
    assert np.any(values[1:4] != 0), "as eigenvalues of a matrix are"
    assert symmetric.positive_count(values) == 3
    assert len(list(symmetric.equilibria(values, 3))) == 8
    assert [symmetric.tail(values, rank) for rank in (3, 4, 9)] == [0.0, 1 / 16, 3 / 16]
    assert [symmetric.final_rate(values, rank) for rank in (1, 2, 3)] == pytest.approx([2.0, 2.0, 2.0])
    assert [symmetric.unstable_directions(values, 2, (6, one)) for one in (4, 5)] == [0, 0]
    assert symmetric.untying_rate(values[1:]) == 0.0


@pytest.mark.parametrize(
    ("values", "rank", "rate", "tail"),
    [
        ((2, 1, 0, 0, 0, 0), 2, 2.0, 0.0),
        ((2, 1, 0, 0, 0, 0), 3, 0.0, 1 / 16),
        ((2, 1, 0, 0, 0, 0), 8, 0.0, 4 / 16),
        ((2, 1, 0.6, 0.3, 0, 0), 2, 0.8, 0.0),
        ((2, 1, -0.2, -0.5), 4, 0.4, 0.0),
        ((2, 1, 0, -0.5), 4, 0.0, 1 / 16),
        ((-0.5, 2, -0.2, 1), 2, 2.4, 0.0),
    ],
)
def test_rates_and_tails(values, rank, rate, tail):
    assert symmetric.final_rate(np.array(values), rank) == pytest.approx(rate)
    assert symmetric.tail(np.array(values), rank) == pytest.approx(tail)


def test_of_lora():
    assert symmetric.balanced_tail((9, 12), 2, 6) == 0.5
    assert symmetric.balanced_tail((3, 12), 2, 6) == 0.125
    assert symmetric.balanced_tail((9, 12), 2, 1) == 0.0
    assert symmetric.untying_rate(VALUES) == 0.5
    assert symmetric.noise_limit() == 0.5

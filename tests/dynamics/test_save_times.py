"""The times at which a run is saved."""

import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from solves import SQUARE, START, swept

from lora_flow import InputError, gaussian_init, save_times, solve


class TestSaveTimes:
    @pytest.mark.parametrize("t1", [0.1, 3.0, 5.0, 123.4, 2000.0])
    def test_logarithmic_times_end_exactly_at_t1_and_are_accepted_as_times(self, t1):
        times = save_times(t1, 30, "log")
        assert times[-1] == t1
        np.testing.assert_array_equal(save_times(t1, times), times)

    def test_numbers_and_arrays(self):
        np.testing.assert_allclose(save_times(2.0, 3), [0.0, 1.0, 2.0])
        np.testing.assert_allclose(save_times(1e4, 6, "log"), [0.0, 1.0, 10.0, 100.0, 1e3, 1e4])
        np.testing.assert_allclose(save_times(2.0, [0.5, 1.5]), [0.5, 1.5])

    def test_trajectories_are_saved_there(self, figure1_problem):
        start = gaussian_init(jax.random.key(0), figure1_problem, rank=4, alpha=1e-2)
        equal = solve(figure1_problem, start, t1=1.0)
        shared = np.array([0, *range(30, 81), 100])
        times = np.sort([*equal.times[shared], *np.linspace(0.302, 0.768, 48)])
        listed = solve(figure1_problem, start, t1=1.0, saves=times)
        np.testing.assert_array_equal(listed.times, times)
        again = np.isin(times, equal.times[shared])
        np.testing.assert_allclose(listed.observables["loss"][again], equal.observables["loss"][shared], rtol=1e-9)

    @pytest.mark.parametrize(
        ("t1", "saves", "message"),
        [
            (0.0, 11, "t1 must be positive and finite, got 0.0"),
            (float("nan"), 11, "t1 must be positive and finite, got nan"),
            (1.0, 1, "saves must be at least 2, or an array of times, got 1"),
            (1.0, 2.5, "saves must be .* two times, got 2.5"),
            (1.0, [0.0, 0.5, 0.5], "saves must increase, got 0.5 after 0.5"),
            (1.0, [0.0, 0.2, 0.1, 0.3], "saves must increase, got 0.1 after 0.2"),
            (1.0, [-0.1, 0.5], "saves must be at least 0, got -0.1"),
            (1.0, [0.0, 2.0], "saves must be at most t1 = 1.0, got 2.0"),
            (0.3, [0.0, 0.3000000001], "saves must be at most t1 = 0.3, got 0.3000000001"),
            (1.0, [0.0, np.nan, 1.0], "saves must be finite, got nan"),
            (1.0, [0.5], "saves must be a whole number, or an array of at least two times, got [0.5]"),
            (1.0, np.zeros((2, 2)), "saves must be .* two times, got shape (2, 2) of float64"),
            (1.0, [[0.0, 0.5], [1.0]], "saves must be .* two times, got [[0.0, 0.5], [1.0]]"),
            (1.0, "all", "saves must be .* two times, got 'all'"),
            (1.0, True, "saves must be .* two times, got True"),
            (1.0, [0.0, 1.0j], "saves must be .* two times, got [0.0, 1j]"),
            (1.0, {0.0, 1.0}, "saves must be .* two times, got a set"),
            ("1", 11, "t1 must be positive and finite, got '1'"),
            (np.ones(1), 11, "t1 must be positive and finite, got shape (1,) of float64"),
        ],
    )
    def test_bad_times_are_named(self, t1, saves, message, monkeypatch):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
        exactly = re.escape(message).replace(r"\.\*", ".*")
        with pytest.raises(InputError, match=f"^{exactly}$"):
            save_times(t1, saves)

    def test_a_last_time_that_rounding_puts_beyond_the_end_is_the_end(self):
        problem, start, saves = SQUARE, START, np.arange(0, 0.43, 0.021)
        assert saves[-1] > 0.42, "one unit of rounding beyond"
        np.testing.assert_array_equal(save_times(0.42, saves), [*saves[:-1], 0.42])
        seen = solve(problem, start, t1=0.42, saves=saves, solver="Tsit5")
        assert seen.status == 0
        assert float(seen.times[-1]) == 0.42
        assert np.all(np.isfinite(seen.observables["loss"]))
        np.testing.assert_array_equal(swept(problem, t1=0.42, saves=saves)["time"], seen.times)
        with jax.enable_x64(False):
            end, beyond = jnp.asarray(0.3), float(np.nextafter(np.float32(0.3), np.float32(1)))
            assert save_times(end, [0.0, beyond])[-1] == end < beyond

    def test_unknown_spacing(self):
        with pytest.raises(InputError, match=r"spacing must be 'linear' or 'log', got 'lin' \(did you mean 'linear'"):
            save_times(1.0, 5, "lin")

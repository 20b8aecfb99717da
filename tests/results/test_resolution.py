"""What the saved times resolve."""

import numpy as np
import pytest
import xarray as xr

from lora_flow.results.resolution import advice, bound, hides_less

TIME = np.array([0.0, 0.3, 0.6, 0.9, 1.2, 1.5])


@pytest.mark.parametrize(
    ("found", "limit"),
    [(0.0, None), (0.17, 0.3), (0.3, 0.3), (0.31, 0.6), (0.89, 0.9), (0.9, None), (1.3, None), (np.inf, None)],
)
def test_an_event_before_the_third_save_after_the_first_is_told_as_a_bound(found, limit):
    assert bound(found, TIME) == pytest.approx(np.nan if limit is None else limit, nan_ok=True)


@pytest.mark.parametrize(
    ("values", "hidden"),
    [
        ([1.0, 0.01, 0.02, 0.03, 0.04, 0.05], True),  # the least among the first saves
        ([1.0, 0.9, 0.8, 0.5, 0.04, 0.03], False),
        ([1.0, 0.9, 0.8, 0.5, 0.04, 0.5], True),  # a decade less than a value beside it
        ([1.0, 0.9, 0.8, 0.004, 0.003, 0.5], True),
        ([1.0, 0.9, 0.8, 0.003, 0.003, 0.003], False),  # which then stays
        ([1.0, 0.9, 0.8, 0.5, 0.4, 0.003], False),  # still falling at the end
        ([1e-3, 0.9, 0.8, 0.5, 0.4, 0.3], False),  # at the start, where it is known
        ([1.0, 0.9, 0.8, 0.5, 1e-31, 0.5], False),  # rounding
        ([np.nan] * 6, False),
        ([1.0, 0.9, 0.8, 0.5, 0.4, np.nan], False),
    ],
)
def test_a_needle_may_be_hidden_between_saves(values, hidden):
    assert hides_less(np.array([values, values]), TIME, 1e-29).tolist() == [hidden] * 2


def test_a_spacing_is_advised_that_the_run_has_not():
    def dataset(time):
        return xr.Dataset(coords={"time": time})

    assert advice(dataset(TIME)) == "--spacing log, more --saves than 6 or a shorter --t1"
    assert advice(dataset(np.geomspace(1e-4, 1, 5))) == "more --saves than 5 or a shorter --t1"

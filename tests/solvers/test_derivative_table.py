"""Every derivative of every way to run, against central differences of a run that is far more exact."""

import functools

import jax
import numpy as np
import pytest
from derivative_cases import (
    CASES,
    END,
    LEVELS,
    case_of,
    derivative,
    differences,
    flowed,
    jit,
    points,
    stepped,
    steps_of,
    times_of,
)

RTOL = {"auto": 1e-6, "Tsit5": 1e-6, "RKC": 1e-7, "Dopri8": 1e-5}
RIGHT = 1e-4  # relative


ORDER = {"reverse": 1, "forward": 1, "forward over reverse": 2}


@functools.cache
def exact(order):
    """Of each case its times, and its derivatives, by Dopri8 at rtol 1e-11."""
    how = {"solver": "Dopri8", "rtol": 1e-11, "derivatives": "forward"}
    find = jit(times_of)
    values = jit(jax.vmap(lambda case, times, x: flowed(case, times, x, **how), in_axes=(None, None, 0)))
    found = {}
    for name in CASES:
        times = find(case_of(name), END[name])
        near = values(case_of(name), times, points(name, order))
        np.testing.assert_allclose(near[0], LEVELS, atol=1e-3)
        found[name] = times, differences(name, order, near)
    return found


def check(got, known):
    assert np.all(np.abs(got / known - 1) < RIGHT), (got / known - 1, known)


def cells(names, quick):
    """All combinations with modes; one is tried by default."""
    pairs = [(name, mode) for name in names for mode in ORDER]
    return [pytest.param(*one, marks=() if one == quick else pytest.mark.long) for one in pairs]


@pytest.mark.parametrize(("solver", "mode"), cells(RTOL, ("auto", "reverse")))
def test_derivatives_of_a_flow(solver, mode):
    choice = "forward" if mode == "forward" else "reverse"
    how = {"solver": solver, "rtol": RTOL[solver], "derivatives": choice}
    found = jit(lambda case, times: derivative(lambda x: flowed(case, times, x, **how), mode)(np.zeros(5)))
    for name, (times, known) in exact(ORDER[mode]).items():
        check(found(case_of(name), times), known)


@pytest.mark.parametrize(("name", "mode"), cells(CASES, ("aligned", "reverse")))
def test_derivatives_of_gradient_descent(name, mode):
    """Against differences of the same loop, which has no error but rounding."""
    choice = "forward" if mode == "forward" else "reverse"
    run = functools.partial(stepped, case_of(name), steps_of(case_of(name), END[name]))
    values = jit(jax.vmap(functools.partial(run, derivatives="forward")))(points(name, ORDER[mode]))
    np.testing.assert_allclose(values[0], LEVELS, atol=0.1)
    got = jit(derivative(functools.partial(run, derivatives=choice), mode))(np.zeros(5))
    check(got, differences(name, ORDER[mode], values))

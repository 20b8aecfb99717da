"""An initialisation of one's own in a sweep: a function or a `Scheme`, alone and beside names."""

import dataclasses
import functools

import jax
import jaxtyping
import matplotlib.pyplot as plt
import numpy as np
import pytest

from lora_flow import (
    INITIALIZATIONS,
    Adapter,
    Factorization,
    InputError,
    Offset,
    Scheme,
    gaussian_init,
    phases,
    pissa_init,
    solve,
    sweep,
)
from lora_flow.experiments.inits import INITS, draw, inits_dataset, notes
from lora_flow.initialization import as_scheme, find_scheme, initialize
from lora_flow.sweeps.grid import Grid, Problems

RNG = np.random.default_rng(2)
PROBLEM = Factorization(*(RNG.standard_normal(shape) for shape in ((6, 5), (6, 6), (6, 5))))
KEY = jax.random.key(0)
HOW = {"alpha": 0.3, "rank": 2, "t1": 0.5, "saves": 5, "solver": "Tsit5", "batch_size": 1, "progress": False}


def halves(key, problem, *, rank, alpha, side):
    """Twice the Gaussian start, of the side asked for."""
    return tuple(Adapter(2 * a, 2 * b) for a, b in gaussian_init(key, problem, rank=rank, alpha=alpha, side=side))


def mine(key, problem, *, rank, alpha):
    return pissa_init(key, problem, rank=rank, alpha=alpha)


def test_a_function_and_a_scheme_sweep_beside_names():
    own = Scheme(mine, offset=True, name="my pissa")
    both = sweep(PROBLEM, init=("gaussian", halves, own, "pissa"), side="B", **(HOW | {"alpha": (0.3, 0.6)}))
    assert list(both["init"].values) == ["gaussian", "halves", "my pissa", "pissa"]
    assert list(both["offset"].values) == [0, 0, 1, 1]
    for name in ("loss", "loss_floor", "dead_directions"):
        np.testing.assert_array_equal(both[name].sel(init="my pissa"), both[name].sel(init="pissa"))
    losses = both["loss"].squeeze()
    np.testing.assert_allclose(losses.sel(init="halves", alpha=0.3), losses.sel(init="gaussian", alpha=0.6), rtol=1e-9)
    start = initialize(own, KEY, PROBLEM, rank=2, alpha=0.3, side="A")
    solved = solve(Offset(PROBLEM, start), start, t1=0.5, saves=5, solver="Tsit5")
    np.testing.assert_allclose(losses.sel(init="my pissa", alpha=0.3), solved.observables["loss"], rtol=1e-6)
    spans = phases(both)
    assert spans["t1"].sel(init=["my pissa", "pissa"]).isnull().all(), "their B A is no update"
    phases(both.assign_coords(init=["a", "b", "c", "d"]))  # whatever they are called, as of older runs
    phases(both.drop_vars("offset").assign_coords(init=["a", "b", "c", "d"]))


def test_one_by_itself_is_swept_as_in_a_list():
    how = {"side": "B", "alpha": 0.3, "rank": 2, "seeds": 1}
    alone, listed = (Grid.of(Problems.of(PROBLEM), init=init, **how) for init in (halves, [halves]))
    assert alone == listed
    assert alone.init == ("halves",)


def test_the_figure_of_initialisations_takes_own_ones():
    small = dataclasses.replace(
        INITS, m=12, n=14, saves=61, solver="Tsit5", batch_size=1, init=("gaussian", "pissa"), seeds=1, t1=2.0
    )
    dataset = inits_dataset(halves, settings=small, progress=False)
    figure = draw(dataset)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    plt.close(figure)
    assert shown == ["gaussian", "pissa", "halves"]
    assert notes(dataset).count("| halves |") == 4


def wrong(change):
    def odd(key, problem, *, rank, alpha):
        return change(gaussian_init(key, problem, rank=rank, alpha=alpha))

    return odd


def lost(key, problem, *, rank, alpha):
    return tuple(Adapter(a / (alpha - alpha), b) for a, b in gaussian_init(key, problem, rank=rank, alpha=alpha))


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (wrong(lambda drawn: drawn[:1]), "init 'odd' must return one Adapter(a, b) for each of 2 layers, got"),
        (wrong(lambda drawn: None), "init 'odd' must return one Adapter(a, b) for each of 2 layers, got None"),
        (wrong(lambda drawn: drawn[0]), "init 'odd' must return one Adapter(a, b) for each of 2 layers, got"),
        (wrong(lambda drawn: (drawn[0], drawn[1].a)), "init 'odd' must return an Adapter(a, b) for layer 2, got shape"),
        (wrong(lambda drawn: (drawn[0], (drawn[1].b, drawn[1].a))), "init 'odd' must return A_2 of shape (2, 6), got"),
        (wrong(lambda drawn: (drawn[0], (drawn[1].a, "x"))), "init 'odd' must return B_2 of real numbers, got 'x'"),
        (
            wrong(lambda drawn: np.asarray(drawn[0].a)),
            "init 'odd' must be written in jax.numpy and jax.random, got an operation of NumPy on an array",
        ),
        (
            wrong(lambda drawn: drawn if drawn[0].a[0, 0] > 0 else None),
            "init 'odd' must be written in jax.numpy and jax.random, got a condition of Python on an array",
        ),
        (
            wrong(lambda drawn: np.random.default_rng(int(drawn[0].a[0, 0]))),
            "init 'odd' must be written in jax.numpy and jax.random, got a number of Python made from an array",
        ),
        (lost, "init 'lost' must return adapters with finite entries, got NaN or infinite ones at side A, alpha 0.3"),
        ((halves, halves), "init must name each value once, own ones as in Scheme(init, name='mine'), got"),
        (Scheme(mine, name="pissa"), "init must have a name that is not one of INITIALIZATIONS"),
        (Scheme(mine, name="gaussian-both:4"), "init must have a name that is not one of INITIALIZATIONS"),
        (3, "init must be a name, a Scheme, or a function init(key, problem, rank, alpha) or (..., side), got 3"),
        (None, "init must be a name, a Scheme, or a function init(key, problem, rank, alpha) or (..., side), got None"),
        ({"pissa": 1}, "init must be one value, or several in a flat list, got a dict"),
    ],
)
def test_what_is_no_initialisation_is_told_in_one_line(init, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    with pytest.raises(InputError) as caught:
        sweep(PROBLEM, init=init, **HOW)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_names_of_functions():
    partial = functools.partial(mine)
    labels = [initialize_name(init) for init in (mine, partial, Scheme(partial, name="x"), INITIALIZATIONS["eva"])]
    assert labels == ["mine", "mine", "x", "eva"]
    assert initialize_name(find_scheme("gaussian-both:25")) == "gaussian-both:25"


def initialize_name(init):
    return as_scheme(init).name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": "1e-3"}, "alpha must be positive and finite, got '1e-3'"),
        ({"alpha": [[1e-3], [1e-4]]}, "alpha must be one value, or several in a flat list, got [0.001]"),
        ({"alpha": True}, "alpha must be positive and finite, got True"),
        ({"alpha": None}, "alpha must be positive and finite, got None"),
        ({"rank": 2.0}, "rank must be an integer, got 2.0"),
        ({"rank": True}, "rank must be an integer, got True"),
        ({"rank": "2"}, "rank must be an integer, got '2'"),
        ({"seeds": True}, "seeds must be "),
        ({"seeds": "3"}, "seeds must be "),
        ({"seeds": 2.5}, "seeds must be "),
        ({"seeds": None}, "seeds must be "),
        ({"side": None}, "side must be 'A' or 'B', got None"),
        ({"side": 1}, "side must be 'A' or 'B', got 1"),
        ({"t1": "1"}, "t1 must be positive and finite, got '1'"),
        ({"t1": [1.0]}, "t1 must be positive and finite, got [1.0]"),
    ],
)
def test_values_of_a_wrong_kind_are_told_in_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    with pytest.raises(InputError) as caught:
        sweep(PROBLEM, **(HOW | arguments))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)

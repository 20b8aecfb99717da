"""What an experiment may be made of, and what is done with its parts."""

import dataclasses

import pytest
import xarray as xr

from lora_flow import InputError
from lora_flow.experiments.base import Experiment
from lora_flow.settings import Settings

SWEEP = Settings(seeds=3)


def function(seeds, progress):
    return xr.Dataset({"x": ("seed", list(progress(range(seeds))))})


def build(parts, seeds=None):
    return Experiment("about", parts, lambda datasets: {}, lambda datasets: "", seeds)


def test_sweeps_take_another_number_of_seeds():
    runs = build({"a": SWEEP, "b": dataclasses.replace(SWEEP, t1=2.0)})
    assert runs.function is None
    assert runs.runs() == runs.parts
    assert [(run.seeds, run.t1) for run in runs.runs(5).values()] == [(5, SWEEP.t1), (5, 2.0)]


def test_a_function_is_no_sweep():
    whole = build({"": function}, seeds=4)
    assert whole.function is function
    assert whole.runs(5) == {}


@pytest.mark.parametrize(
    ("parts", "seeds", "message"),
    [
        ({"a": function}, 2, "parts must be settings, or one function, \"\", got \\['a'\\]"),
        ({"": function, "a": SWEEP}, 2, "parts must be settings, or one function"),
        ({"": function}, None, "seeds must be given with a function only, got None"),
        ({"": SWEEP}, 2, "seeds must be given with a function only, got 2"),
    ],
)
def test_other_parts_are_refused(parts, seeds, message):
    with pytest.raises(InputError, match=message):
        build(parts, seeds)


def test_functions_of_an_only_part_take_its_dataset():
    one = Experiment.of_one("about", function, lambda dataset: dict(dataset.sizes), lambda dataset: "told", seeds=2)
    datasets = {"": function(2, iter)}
    assert one.draw(datasets) == {"": {"seed": 2}}
    assert one.notes(datasets) == "told"
    assert one.seeds == 2

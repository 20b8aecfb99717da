"""Sensitivities against differences of runs, exact scalings, and whole gradients; what is not known is NaN."""

import jax
import numpy as np
import pytest
import xarray as xr

from lora_flow import (
    Factorization,
    InputError,
    SingleLayer,
    aligned_problem,
    misaligned,
    noisy,
    phases,
    sensitivity,
    sweep,
)
from lora_flow.sensitivities.told import leading_pairs, lines, report

KEY = jax.random.key(0)
OBSERVABLES = ("log10 loss", "log10 alignment_error", "time to 1e-3", "t_align", "t1")
AT = {"delta_w": 0.8, "angle": 20.0, "noise": 0.05}
HOW = {"observable": OBSERVABLES, "at": 0.8, "t1": 2.0, "rank": 2, "alpha": 1e-2, "rtol": 1e-6, "progress": False}


def family(delta_w, angle, noise):
    problem = aligned_problem(KEY, m=3, n=3, h=4, delta_w=delta_w)
    return noisy(misaligned(problem, jax.random.key(1), angle=angle), jax.random.key(2), noise=noise)


@pytest.fixture(scope="module")
def found():
    names = ("alpha", *AT, "shift_scale")
    return sensitivity(family, parameters=AT, with_respect_to=names, **HOW)


@pytest.mark.parametrize("parameter", ["alpha", *AT])
def test_derivatives_are_those_of_differences(found, parameter):
    step = 1e-3 * AT.get(parameter, HOW["alpha"])

    def value(moved):
        at, how = dict(AT), dict(HOW)
        (how if parameter == "alpha" else at)[parameter] = moved
        return sensitivity(family, parameters=at, with_respect_to=("alpha", *AT, "shift_scale"), **how)["value"]

    centre = AT.get(parameter, HOW["alpha"])
    difference = (value(centre + step).squeeze() - value(centre - step).squeeze()) / (2 * step)
    derivative = found["derivative"].sel(parameter=parameter).squeeze()
    np.testing.assert_allclose(derivative, difference.values, rtol=2e-3, atol=1e-5 * abs(derivative).max())


def test_values_are_those_of_a_sweep_and_its_phases(found):
    run = sweep(family(**AT), alpha=1e-2, rank=2, t1=2.0, saves=4001, rtol=1e-6, progress=False).squeeze()
    value = found["value"].squeeze()
    at = run.sel(time=0.8, method="nearest")
    assert float(value.sel(observable="log10 loss")) == pytest.approx(np.log10(float(at["loss"])), abs=1e-4)
    aligned = np.log10(float(at["alignment_error"]))
    assert float(value.sel(observable="log10 alignment_error")) == pytest.approx(aligned, abs=1e-3)
    times = phases(run)
    for name in ("t_align", "t1"):
        assert float(value.sel(observable=name)) == pytest.approx(float(times[name]), rel=1e-3)


def test_elasticities_are_relative(found):
    loss, time = (found.sel(observable=name, parameter="delta_w").squeeze() for name in ("log10 loss", "t1"))
    assert float(loss["elasticity"]) == pytest.approx(float(loss["derivative"]) * 0.8 * np.log(10))
    assert float(time["elasticity"]) == pytest.approx(float(time["derivative"]) * 0.8 / float(time["value"]))


@pytest.fixture(scope="module")
def layer():
    left, _, right = np.linalg.svd(np.random.default_rng(0).standard_normal((4, 3)), full_matrices=False)
    shift = left * np.array([[3.0, 2.0, 1.0]]) @ right
    observables = ("t_align", "log10 loss", "time to 1e-3", "time to 1e-40", "time to 0.2")
    names = ("alpha", "shift_scale", "scaling", "shift")
    how = {"alpha": (1e-1, 1e-2), "rank": (2, 3), "seeds": 2, "t1": 20.0, "at": 2.0, "rtol": 1e-6, "progress": False}
    return sensitivity(SingleLayer(shift), with_respect_to=names, observable=observables, **how), shift


def test_scaling_the_task_scales_time(layer):
    """Factors of sqrt(c) A and sqrt(c) B learn c times the shift in 1/c of the time: E_shift + E_alpha/2 = -1."""
    elasticity = layer[0]["elasticity"].sel(observable="t_align")
    shift, alpha = (elasticity.sel(parameter=name) for name in ("shift_scale", "alpha"))
    np.testing.assert_allclose(shift + alpha / 2, -1, rtol=1e-3)
    assert abs(alpha).max() > 1e-3  # so that the identity says something of both


def test_a_scaling_is_a_larger_start_and_a_faster_time(layer):
    """s B A with factors A, B is B A with factors sqrt(s) A, sqrt(s) B, in s times the time."""
    dataset = layer[0].sel(observable="log10 loss")
    by = {name: dataset["derivative"].sel(parameter=name) for name in ("alpha", "scaling")}
    expected = by["alpha"] * dataset["alpha"] / 2 + dataset["slope"] * dataset["at"]
    np.testing.assert_allclose(by["scaling"], expected.transpose(*by["scaling"].dims), rtol=2e-3)


def test_a_whole_gradient_along_the_shift_is_the_derivative_by_its_size(layer):
    dataset, shift = layer
    along = (dataset["by_shift"] * xr.DataArray(shift, dims=("shift_0", "shift_1"))).sum(
        ["shift_0", "shift_1"], skipna=False
    )
    by_size = dataset["derivative"].sel(parameter="shift_scale")
    for name in ("t_align", "log10 loss", "time to 0.2"):
        np.testing.assert_allclose(along.sel(observable=name), by_size.sel(observable=name), rtol=2e-3)
    pairs = leading_pairs(dataset, "shift").isel(pair=0)
    np.testing.assert_allclose(
        pairs["singular_value"].sel(observable="log10 loss").values,
        np.linalg.norm(dataset["by_shift"].sel(observable="log10 loss").values, 2, axis=(-2, -1)),
    )


def test_arrays_are_told_apart_in_whatever_order_they_are_named():
    """Also where all are of one shape, and where nothing but arrays is asked for."""
    numbers = np.random.default_rng(0).normal(size=(3, 4, 4))
    problem = Factorization(w1=numbers[0], w2=numbers[1], shift=numbers[2])
    how = {"alpha": 1e-2, "rank": 2, "t1": 0.5, "progress": False}
    found = sensitivity(problem, with_respect_to=("w2", "w1"), **how).squeeze()
    one = {name: sensitivity(problem, with_respect_to=name, **how).squeeze()[f"by_{name}"] for name in ("w1", "w2")}
    for name, alone in one.items():
        np.testing.assert_allclose(found[f"by_{name}"], alone, rtol=1e-9, atol=1e-12)
    assert not np.allclose(one["w1"], one["w2"])


def test_what_no_lane_reaches_or_rounding_hides_has_no_derivative(layer):
    dataset = layer[0]
    lost = dataset.sel(observable="time to 1e-40")
    assert np.isinf(lost["value"]).all()
    assert np.isnan(lost["derivative"]).all()
    short = dataset.sel(observable="time to 1e-3", rank=2)  # the loss of rank 2 stops above it
    assert np.isinf(short["value"]).all()
    assert np.isnan(short["by_shift"]).all()
    assert np.isnan(leading_pairs(dataset, "shift").sel(observable="time to 1e-3", rank=2)).to_array().all()
    assert np.isfinite(dataset["derivative"].sel(observable="time to 1e-3", rank=3)).all()


def test_the_report_says_what_matters_most(layer):
    told = lines(layer[0])
    assert told[0].startswith("t_align: shift_scale matters most: 1 % more of shift_scale makes -")
    assert told[3] == "time to 1e-40: no lane has it, or all are at rounding."
    assert "4 of 8 lanes do not have it" in told[2]
    text = report(layer[0], ["figures/sensitivity.png"])
    assert "| t_align | gaussian |" in text
    assert "Most that a change of shift of norm 1 does" in text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"observable": "log10 los"}, r"observable must be .* got 'log10 los' \(did you mean 'log10 loss'\?\)"),
        ({"observable": "time to nothing"}, "observable must name a positive loss after 'time to '"),
        ({"observable": ()}, "observable must hold at least one name, got none"),
        ({"observable": "t1"}, "observable must be another than t1, which a Factorization has, got SingleLayer"),
        ({"with_respect_to": "alpa"}, r"with_respect_to must be .* got 'alpa' \(did you mean 'alpha'\?\)"),
        ({"with_respect_to": ("alpha", "alpha")}, "with_respect_to must name each parameter once"),
        ({"at": 2.0}, "at must be a time after 0 and up to t1 = 1, got 2"),
        ({"parameters": {"delta_w": 1.0}}, "parameters must be left out with a problem"),
        ({"init": "pissa"}, "init must leave the frozen weights as they are, for derivatives, got pissa"),
        ({"solver": "Euler"}, "solver must be .*, got 'Euler'"),
    ],
)
def test_bad_input_is_refused_by_name(changed, message):
    with pytest.raises(InputError, match=message):
        sensitivity(SingleLayer(np.eye(3)[:, :2] + 1, weight=np.ones((3, 2))), rank=1, t1=1.0, **changed)


def test_a_family_that_leaves_jax_is_refused_by_the_parameter():
    def made(size):
        return SingleLayer(np.eye(3) * float(size))

    with pytest.raises(InputError, match="problem must use size in jax"):
        sensitivity(made, parameters={"size": 2.0}, with_respect_to="size", rank=1, t1=1.0)

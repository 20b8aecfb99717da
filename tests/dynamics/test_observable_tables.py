"""One entry of a table of observables is all that trajectories, sweeps and labels need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import DeepLinear, InputError, SingleLayer, analyse, gaussian_init, solve, sweep
from lora_flow.dynamics.analysis import DETAILS
from lora_flow.dynamics.observable_tables import Observables
from lora_flow.dynamics.observables import OBSERVABLES
from lora_flow.runtime.compiling import forget


@pytest.fixture
def tables():
    """The two tables, which lose what a test has entered."""
    held = [(table, dict(table.entries)) for table in (OBSERVABLES, DETAILS)]
    yield
    for table, entries in held:
        table.entries.clear()
        table.entries.update(entries)
    forget()


def test_names_say_which_layer_and_the_first_may_go_by_the_bare_name():
    table = Observables()
    table.of_each_layer("size", "|x_{i}|")(abs)
    table.of_each_layer("twice_{i}", "2 x_{i}")(lambda x: 2 * x)
    table.of_all_layers("total", "sum of all x")(sum)
    assert table.values([-1, 2, -3]) == {
        "size": 1,
        "size_2": 2,
        "size_3": 3,
        "twice_1": -2,
        "twice_2": 4,
        "twice_3": -6,
        "total": -2,
    }
    assert table.meanings(1) == {"size": "|x_1|", "twice_1": "2 x_1", "total": "sum of all x"}
    assert list(table.meanings(3)) == list(table.values([-1, 2, -3]))
    assert table.meanings(3)["size_3"] == "|x_3|"


@pytest.mark.parametrize("name", ["loss", "status", "size_2"])
def test_a_name_that_something_else_has_is_refused(name):
    """ "size" is "size_2" for the second layer."""
    table = Observables()
    table.of_each_layer("size", "|x_{i}|")(abs)
    with pytest.raises(InputError, match=f"name of an observable must be its own, got {name}$"):
        table.of_all_layers(name, "sum")(sum)
    table.of_each_layer("size", "x_{i}^2")(lambda x: x * x)
    assert table.values([3]) == {"size": 9}


def test_an_entry_is_recorded_by_runs_that_were_compiled_before(tables):
    problem = SingleLayer(np.diag([2.0, 1.0, 0.5]))
    start = gaussian_init(jax.random.key(0), problem, rank=2, alpha=0.1)
    before = solve(problem, start, t1=1.0, saves=3, save_adapters=True)

    @OBSERVABLES.of_each_layer("norm_a{i}", "Frobenius norm of A_{i}")
    def norm_a(layer):
        gram = layer.measured.gram_a
        return gram.size * jnp.sqrt(jnp.trace(gram.matrix, axis1=-2, axis2=-1))

    @DETAILS.of_all_layers("total", "sum of all entries of B")
    def total(layers):
        return np.sum([layer.adapter.b.sum(axis=(-2, -1)) for layer in layers], axis=0)

    after = solve(problem, start, t1=1.0, saves=3, save_adapters=True)
    norms = np.linalg.norm(after.history[0].a, axis=(-2, -1))
    np.testing.assert_allclose(after.observables["norm_a1"], norms, rtol=1e-14)
    assert set(after.observables) == {*before.observables, "norm_a1"}
    np.testing.assert_allclose(analyse(problem, after.history)["total"], after.history[0].b.sum(axis=(-2, -1)))

    swept = sweep(problem, alpha=0.1, rank=2, t1=1.0, saves=3, details=True, progress=False)
    np.testing.assert_allclose(swept["norm_a1"].values.ravel(), norms, rtol=1e-10)
    assert np.all(np.isfinite(swept["total"]))
    assert (swept["norm_a1"].long_name, swept["total"].long_name) == (
        "Frobenius norm of A_1",
        "sum of all entries of B",
    )


def test_three_layers_have_the_observables_of_each():
    rng = np.random.default_rng(3)
    problem = DeepLinear([rng.normal(size=shape) for shape in ((5, 4), (3, 5), (6, 3))], shift=rng.normal(size=(6, 4)))
    start = gaussian_init(jax.random.key(0), problem, rank=2, alpha=0.1)
    run = solve(problem, start, t1=0.02, saves=3, save_adapters=True)
    found = {name: values[-1] for name, values in run.observables.items()}
    for i, (adapter, task) in enumerate(zip(run.adapters, problem.linearised_task(), strict=True), start=1):
        (a, b), (u, _, vt) = map(np.asarray, adapter), np.linalg.svd(task)
        gamma, z = np.concatenate([u[:, 0], vt[0]]) / np.sqrt(2), np.concatenate([b, a.T])
        error = 1 - abs(gamma @ np.linalg.svd(z)[0][:, 0])
        told = {
            "alignment_error" + f"_{i}" * (i > 1): error,
            f"norm_z{i}": np.linalg.norm(z, 2),
            f"norm_b{i}a{i}": np.linalg.norm(b @ a, 2),
            f"norm_along{i}": np.linalg.norm(gamma @ z),
            f"norm_across{i}": np.linalg.norm(z - np.outer(gamma, gamma @ z)),
            f"overlap_{i}": u[:, 0] @ b @ a @ vt[0],
        }
        assert {name: found.pop(name) for name in told} == pytest.approx(told, rel=1e-9)
    assert set(found) == {"loss", "drift"}
    details = analyse(problem, run.history)
    assert set(details) == {f"{n}{i}" for n in ("growth_rate_", "alignment_error_") for i in (1, 2, 3)} - {
        "alignment_error_1"
    } | {"alignment_error", "gradient_norm"}

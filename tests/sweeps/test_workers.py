"""Boxes solved by other processes: the same bits, and a line for a worker that would give others."""

import concurrent.futures
import dataclasses
import multiprocessing
import sys
import threading
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import xarray as xr

from lora_flow import InputError, Plain, aligned_problem, load_run, sweep
from lora_flow.sweeps import workers
from lora_flow.sweeps.executors import OnExecutor
from lora_flow.sweeps.plan import plan_sweep
from lora_flow.sweeps.workers import WorkersLost, order_of, solve_box

HOW = {"alpha": (1e-1, 1e-2), "rank": 1, "seeds": 7, "t1": 0.5, "saves": 3, "batch_size": 2}
PLAN = {"init": "gaussian", "side": "A", "solver": "auto", "rtol": 5e-4, "max_steps": 100_000}


@pytest.fixture(scope="module")
def problem():
    return aligned_problem(jax.random.key(0), m=4, n=5, h=6)


@pytest.fixture(scope="module")
def whole(problem):
    return sweep(problem, **HOW)


@pytest.fixture(scope="module")
def order(problem):
    return order_of(plan_sweep(problem, **PLAN, **HOW), None)


@pytest.fixture(scope="module")
def pool():
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def elsewhere(order, **changed):
    return dataclasses.replace(order, **{"key": str(changed), "process": "another", **changed})


def test_a_process_of_a_pool_solves_to_the_same_bits(problem, whole, pool, tmp_path):
    xr.testing.assert_identical(sweep(problem, **HOW, executor=pool), whole)
    xr.testing.assert_equal(sweep(problem, **HOW, executor=pool, out=tmp_path / "run"), whole)


def test_threads_solve_to_the_same_bits(problem, whole):
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        xr.testing.assert_identical(sweep(problem, **HOW, executor=threads), whole)


def test_a_worker_with_another_version_is_refused_in_one_line(order, pool):
    for name in ("lora_flow", "jax", "jaxlib", "diffrax", "Python"):
        other = elsewhere(order, versions=dict(order.versions) | {name: "0.0.1"})
        with pytest.raises(InputError, match=rf"^{name} must be 0\.0\.1 in the worker \d+ on .*, got \d") as refused:
            pool.submit(solve_box, other, 0).result()
        assert "\n" not in str(refused.value)


def test_a_worker_with_other_numbers_is_refused_in_one_line(order, pool):
    with pytest.raises(InputError, match=r"^platform must be tpu in the worker \d+ on .*, got cpu"):
        pool.submit(solve_box, elsewhere(order, numbers=dict(order.numbers) | {"platform": "tpu"}), 0).result()
    with pytest.raises(InputError, match=r"^dtype must be float32 in the worker .*, got float64"):
        solve_box(dataclasses.replace(order, key="here", numbers=dict(order.numbers) | {"dtype": "float32"}), 0)
    with pytest.raises(InputError, match=r"^problem must be the same in the worker .*, got other arrays"):
        pool.submit(solve_box, elsewhere(order, digest="0"), 0).result()
    single = elsewhere(order, numbers=dict(order.numbers) | {"dtype": "float32"})
    with pytest.raises(InputError, match=r"^problem must be the same"):  # its arrays have lost half their bits
        pool.submit(solve_box, single, 0).result()
    number, values = pool.submit(solve_box, elsewhere(order), 0).result()  # and back again
    assert number == 0
    assert values["loss"].dtype == "float64"


def test_a_sweep_of_the_other_precision_in_between_is_seen(order, monkeypatch):
    solve_box(order, 0)
    monkeypatch.setattr(workers, "_numbers", lambda: dict(order.numbers) | {"dtype": "float32"})
    with pytest.raises(InputError, match=r"^dtype must be float64"):
        solve_box(order, 1)


def test_a_folder_that_a_worker_does_not_see_is_told(order, pool, tmp_path):
    with pytest.raises(InputError, match=r"^out must be on a disk that the workers share, also in the worker"):
        pool.submit(solve_box, elsewhere(order, folder=(str(tmp_path / "run"), "id", 0)), 0).result()


def test_a_pool_that_lost_a_process_is_told_and_goes_on(problem, whole, tmp_path):
    class Dies(concurrent.futures.Executor):
        boxes = 0

        def submit(self, function, *arguments):
            future = concurrent.futures.Future()
            self.boxes += 1
            if self.boxes < 3:
                future.set_result(function(*arguments))
            else:
                future.set_exception(concurrent.futures.process.BrokenProcessPool("a process has died"))
            return future

    message = r"got one that died; solved boxes are stored, continue with: sweep\(\.\.\., out='.*run'\) in Python$"
    with pytest.raises(WorkersLost, match=message):
        sweep(problem, **HOW, out=tmp_path / "run", executor=Dies())
    stored = load_run(tmp_path / "run", partial=True)
    assert 0 < int((stored["status"] == 0).sum()) < whole["status"].size
    xr.testing.assert_equal(sweep(problem, **HOW, out=tmp_path / "run"), whole)


def test_what_is_no_executor_is_refused():
    with pytest.raises(InputError, match=r"^executor must have a method submit, as concurrent.futures has it, got 3"):
        OnExecutor(3)
    with (
        concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as forks,
        pytest.raises(InputError, match=r"^executor must start its processes anew: .*, got one that forks them"),
    ):
        OnExecutor(forks)


class Mine(eqx.Module):
    """Of a module that no worker can import."""

    shift: jax.Array
    decay: float = eqx.field(static=True, default=0.5)

    @property
    def layers(self):
        return (self.shift.shape,)

    def loss(self, adapters):
        ((a, b),) = adapters
        return Mine.half() * jnp.sum((self.shift - b @ a) ** 2) + self.decay * jnp.sum(a**2)

    @staticmethod
    def half():
        return 0.5


def test_a_problem_class_that_workers_cannot_import(pool, monkeypatch):
    cloudpickle = pytest.importorskip("cloudpickle")
    mine, module = Mine(jnp.diag(jnp.array([2.0, 1.0]))), types.ModuleType("nowhere_else")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Mine, "__module__", module.__name__)
    module.Mine = Mine
    with pytest.raises(InputError, match=r"^problem must be of modules that the workers can import, .* 'nowhere_else'"):
        sweep(mine, **HOW, executor=pool)
    cloudpickle.register_pickle_by_value(module)  # as what is defined in a script is
    try:
        xr.testing.assert_identical(sweep(mine, **HOW, executor=pool), sweep(mine, **HOW))
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def test_what_cannot_be_pickled_is_told_in_one_line(problem, pool):
    class Locked(Plain):
        lock: Any = dataclasses.field(default_factory=threading.Lock)

    with pytest.raises(InputError, match=r"^a plan for workers must be such that pickle takes it, got TypeError: "):
        sweep(problem, **HOW, executor=pool, flow=Locked())

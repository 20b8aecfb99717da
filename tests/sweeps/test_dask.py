"""Sweeps on Dask's workers: the same bits, whoever dies."""

import dataclasses
import logging
import os
import signal

import jax
import pytest
import xarray as xr

from lora_flow import InputError, aligned_problem, load_run, sweep
from lora_flow.sweeps import dask, from_python
from lora_flow.sweeps.plan import plan_sweep
from lora_flow.sweeps.run import open_runs
from lora_flow.sweeps.workers import ORDERS, WorkersLost

distributed, config = pytest.importorskip("distributed"), pytest.importorskip("dask.config")

HOW = {"alpha": (1e-1, 1e-2), "rank": 1, "seeds": 7, "t1": 0.5, "saves": 3, "batch_size": 2}
PLAN = {"init": "gaussian", "side": "A", "solver": "auto", "rtol": 5e-4, "max_steps": 100_000}
CLUSTER = {"threads_per_worker": 1, "memory_limit": 0, "dashboard_address": ":0", "silence_logs": logging.CRITICAL}


@pytest.fixture(scope="module")
def problem():
    return aligned_problem(jax.random.key(0), m=4, n=5, h=6)


@pytest.fixture(scope="module")
def plan(problem):
    return plan_sweep(problem, **PLAN, **HOW)


@pytest.fixture(scope="module")
def whole(problem):
    return sweep(problem, **HOW)


@pytest.fixture
def client():
    """A cluster in this process, with one worker."""
    with (
        config.set({"distributed.comm.timeouts.connect": "1 s"}),  # for so long a lost scheduler is looked for
        distributed.LocalCluster(n_workers=1, processes=False, **CLUSTER) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def test_values_come_back_or_are_stored_by_the_worker(problem, whole, client, tmp_path):
    xr.testing.assert_identical(sweep(problem, **HOW, client=client), whole)
    xr.testing.assert_equal(sweep(problem, **HOW, out=tmp_path / "run", client=client), whole)
    assert ORDERS == {}
    assert dask.OnDask(client).workers() == " on 1 worker"


def test_a_worker_with_another_version_is_refused_in_one_line(problem, client, monkeypatch):
    def other(*arguments):
        asked = order_of(*arguments)
        return dataclasses.replace(asked, versions=asked.versions | {"jax": "0.0.1"})

    order_of = dask.order_of
    monkeypatch.setattr(dask, "order_of", other)
    with pytest.raises(InputError, match=r"^jax must be 0\.0\.1 in the worker \d+ on .*, got \d"):
        sweep(problem, **HOW, client=client)


def test_a_lost_scheduler_is_told_and_the_run_goes_on_without_it(problem, plan, whole, client, tmp_path):
    with open_runs(tmp_path / "run", {"": (from_python.told(plan), plan)}) as folders:
        boxes = dask.OnDask(client).solve(plan, folders[""], folders[""].pending())
        next(boxes)
        client.cluster.sync(client.cluster.scheduler.close)
        with pytest.raises(WorkersLost, match=r"^the Dask scheduler at .* must stay until .*, got a lost connection$"):
            list(boxes)
    assert (load_run(tmp_path / "run", partial=True)["status"] == -1).any()
    xr.testing.assert_equal(sweep(problem, **HOW, out=tmp_path / "run"), whole)


def test_a_box_that_kills_workers_is_told(problem, client, monkeypatch):
    def dies(*arguments, **named):
        raise distributed.KilledWorker("box", None, 3)

    monkeypatch.setattr(client, "gather", dies)
    with pytest.raises(WorkersLost, match=r"^every box must leave its worker alive, got 4 workers that died of one"):
        sweep(problem, **HOW, client=client)


def test_what_is_no_client_is_refused(client):
    with pytest.raises(InputError, match=r"^client must be a dask\.distributed\.Client, got a LocalCluster"):
        dask.OnDask(client.cluster)


@pytest.mark.long
def test_a_killed_worker_costs_what_it_had_in_hand(problem, plan, whole, tmp_path):
    with (
        distributed.LocalCluster(n_workers=2, **CLUSTER) as cluster,
        distributed.Client(cluster) as client,
        open_runs(tmp_path / "run", {"": (from_python.told(plan), plan)}) as folders,
    ):
        pids = [*client.run(os.getpid).values()]
        assert len({*pids, os.getpid()}) == 3
        boxes = dask.OnDask(client).solve(plan, folders[""], folders[""].pending())
        done = [next(boxes)]
        os.kill(pids[0], signal.SIGKILL)
        done += boxes
    assert sorted(number for number, _ in done) == list(range(plan.layout.boxes.count))
    xr.testing.assert_equal(load_run(tmp_path / "run"), whole)

"""A sweep on a cluster of Dask: any that a `dask.distributed.Client` is connected to. Needs the extra `cluster`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import distributed
from distributed.client import FutureCancelledError

from lora_flow.checks import InputError, require, require_instance
from lora_flow.storage.folder import Folder
from lora_flow.sweeps.executors import Executor, Solved
from lora_flow.sweeps.plan import Plan
from lora_flow.sweeps.workers import ORDERS, Order, WorkersLost, order_of, solve_ordered

RETRIES = 2  # of a box, on whatever worker, where solving or storing it has raised something
OFTEN = 5.0  # seconds between two looks at the number of workers


class OnDask(Executor):
    """Has the boxes solved by the workers of a Dask cluster, which may come and go.

    A worker is given the order once, when it starts or the sweep does. A task is the number of a box, so the scheduler
    carries neither problems nor results. What a lost worker had in hand goes to another one.
    """

    def __init__(self, client: Any):
        require_instance("client", client, distributed.Client, "be a dask.distributed.Client")
        require(not client.asynchronous, "client", "be synchronous", "an asynchronous one")
        self.client = client
        self._looked, self._workers = -OFTEN, ""

    def workers(self) -> str:
        if time.monotonic() - self._looked > OFTEN:
            with contextlib.suppress(OSError):  # of a scheduler that has gone, which is said when a box is waited for
                count = len(self.client.nthreads())
                self._workers = f" on {count} worker{'' if count == 1 else 's'}"
            self._looked = time.monotonic()
        return self._workers

    def solve(self, plan: Plan, folder: Folder | None, pending: Sequence[int]) -> Iterator[Solved]:
        order = order_of(plan, folder)
        try:
            with self._given(order):
                yield from self._solved(order, pending)
        except FutureCancelledError as error:
            address = self.client.scheduler.address if self.client.scheduler else "?"
            must = f"the Dask scheduler at {address} must stay until the sweep is done"
            raise WorkersLost(f"{must}, got a lost connection") from error
        except distributed.KilledWorker as error:
            died = f"{error.allowed_failures + 1} workers that died of one, for want of memory perhaps"
            raise WorkersLost(f"every box must leave its worker alive, got {died}") from error

    def _solved(self, order: Order, pending: Sequence[int]) -> Iterator[Solved]:
        keys = [f"{order.key}-{number}" for number in pending]
        boxes = self.client.map(solve_ordered, [order.key] * len(keys), pending, key=keys, pure=False, retries=RETRIES)
        left = {box.key: box for box in boxes}
        direct = order.folder is None  # values come from the worker itself
        try:
            for box in distributed.as_completed(boxes):
                del left[box.key]
                yield self.client.gather(box, direct=direct)
                box.release()
        finally:
            if self.client.status == "running":
                self.client.cancel(list(left.values()))

    @contextlib.contextmanager
    def _given(self, order: Order) -> Iterator[None]:
        """Within, every worker has the order, also one that comes later."""
        try:
            self.client.register_plugin(Give(order), name=order.key)
        except (ImportError, AttributeError) as error:
            must = f"have the lora_flow of the client, {order.versions['lora_flow']}"
            raise InputError(f"the workers must {must}, got {type(error).__name__}: {error}") from error
        try:
            yield
        finally:
            if self.client.status == "running":
                self.client.unregister_worker_plugin(order.key)


class Give(distributed.WorkerPlugin):
    """Gives each worker an order, as long as a sweep takes."""

    def __init__(self, order: Order):
        self.order = order

    def setup(self, worker: distributed.Worker) -> None:
        ORDERS[self.order.key] = self.order

    def teardown(self, worker: distributed.Worker) -> None:
        ORDERS.pop(self.order.key, None)

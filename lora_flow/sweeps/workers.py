"""Boxes solved in other processes: what a worker is told, and what it does. Nothing here imports JAX before it must."""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import platform
import socket
import threading
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

from lora_flow.checks import InputError, require
from lora_flow.runtime.start import start_worker
from lora_flow.version import __version__

if TYPE_CHECKING:
    from lora_flow.storage.folder import Folder
    from lora_flow.sweeps.plan import Plan
    from lora_flow.sweeps.values import Values

PROCESS = uuid.uuid4().hex  # tells this process from all others
OPEN = 4  # plans that a worker keeps open at a time
_PACKAGES = ("jax", "jaxlib", "diffrax", "equinox", "optax")
_lock = threading.Lock()


class WorkersLost(RuntimeError):
    """Those who solve the boxes have gone, and some boxes are left."""


@dataclasses.dataclass(frozen=True)
class Order:
    """What a worker is told of a sweep, once for all boxes.

    - `key`: tells orders apart.
    - `plan`: pickled, because a worker may open it only once JAX has the right precision: arrays of 64 bits become
      ones of 32 without a word.
    - `folder`: the arguments of the `Folder` that the worker stores its boxes in; None if it is to return the values.
    - `process`: who asks, which may be the worker's own process.
    - `versions`, `numbers`: what must be the same where a box is solved, before JAX starts and after.
    - `digest`: the fingerprint of the problems.
    """

    key: str
    plan: bytes = dataclasses.field(repr=False, compare=False)
    folder: tuple[str, str, int] | None = dataclasses.field(compare=False)
    process: str = dataclasses.field(compare=False)
    versions: Mapping[str, str] = dataclasses.field(compare=False)
    numbers: Mapping[str, str] = dataclasses.field(compare=False)
    digest: str = dataclasses.field(compare=False)


ORDERS: dict[str, Order] = {}  # by their keys: those that this process has been given


def order_of(plan: Plan, folder: Folder | None) -> Order:
    """The order to solve boxes of a plan, which a worker stores in the folder if there is one."""
    from lora_flow.sweeps.pickling import pickled
    from lora_flow.sweeps.plan import digest

    return Order(
        key=f"lora_flow_{uuid.uuid4().hex}",
        plan=pickled("a plan for workers", dataclasses.replace(plan, devices=1)),
        folder=None if folder is None else (str(folder.path.resolve()), folder.run_id, folder.begin),
        process=PROCESS,
        versions=_versions(),
        numbers=_numbers(),
        digest=digest(plan.problems),
    )


def solve_box(order: Order, number: int) -> tuple[int, Values | None]:
    """Solves the box with this number in this process, and stores it; without a folder returns its values too.

    **Raises:** `InputError` where the process cannot give the numbers that the one which asks would.
    """
    with _lock:
        plan, folder = _opened(order)
    _check_same(order.numbers, _numbers())  # another sweep may have come in between
    if folder is not None and not folder.is_pending(number):
        return number, None  # a worker that was lost had stored it
    ((_, values),) = plan.solve([number])
    if folder is None:
        return number, values
    folder.write(number, values)
    return number, None


def solve_ordered(key: str, number: int) -> tuple[int, Values | None]:
    """The same for an order that the worker has been given before."""
    return solve_box(ORDERS[key], number)


@functools.lru_cache(maxsize=OPEN)
def _opened(order: Order) -> tuple[Plan, Folder | None]:
    """The plan and the folder, in a process that computes as the one which asks."""
    _check_same(order.versions, _versions())
    if order.process != PROCESS:
        start_worker("double" if order.numbers["dtype"] == "float64" else "single")
    _check_same(order.numbers, _numbers())
    from lora_flow.storage.folder import RESULTS, Folder
    from lora_flow.storage.remote import run_path
    from lora_flow.sweeps.plan import digest

    try:
        plan = pickle.loads(order.plan)
    except (ImportError, AttributeError) as error:
        must = "be of modules that the workers can import, or of the script itself"
        raise InputError(f"problem must {must}, got {type(error).__name__}: {error}") from error
    require(digest(plan.problems) == order.digest, "problem", f"be the same {_here()}", "other arrays")
    if order.folder is None:
        return plan, None
    path = run_path("out", order.folder[0])
    require((path / RESULTS).is_dir(), "out", f"be on a disk that the workers share, also {_here()}", f"'{path}'")
    return plan, Folder(path, *order.folder[1:])


def _check_same(asked: Mapping[str, str], here: Mapping[str, str]) -> None:
    for name, value in asked.items():
        require(here[name] == value, name, f"be {value} {_here()}, as where the sweep was asked for", here[name])


def _here() -> str:
    return f"in the worker {os.getpid()} on {socket.gethostname()}"


@functools.cache
def _versions() -> dict[str, str]:
    python = ".".join(platform.python_version_tuple()[:2])
    return {"lora_flow": __version__, "Python": python} | {name: version(name) for name in _PACKAGES}


def _numbers() -> dict[str, str]:
    import jax

    return {"dtype": str(jax.numpy.result_type(float)), "platform": jax.local_devices()[0].platform}

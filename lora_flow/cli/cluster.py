"""`lora-flow sweep --cluster`: a run that the workers of a Dask cluster solve, one made here or one that is there."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lora_flow.checks import InputError, one_line, require, require_choice, require_instance, require_integer
from lora_flow.runtime.start import IN_WORKERS
from lora_flow.storage.toml import read_toml

if TYPE_CHECKING:
    from lora_flow.sweeps.executors import Executor

CONFIG = {  # of clusters that are made here
    "distributed.scheduler.allowed-failures": 20,  # workers that may die of a box: batch systems take nodes away
    "distributed.scheduler.worker-ttl": "15 minutes",  # a worker that compiles does not answer
    "distributed.worker.profile.enabled": False,  # which takes some of the time
}
_MUST = "be local:N, a scheduler's address such as tcp://node7:8786, or a TOML file"
_WITHIN = 10.0  # seconds that a scheduler may take to answer, at first and once it is lost
_MOST = 4096  # workers of one machine

Make = Callable[[contextlib.ExitStack], Any]
"""Makes what a Client connects to; the stack closes what was made."""


@contextlib.contextmanager
def executor_of(make: Make | None) -> Iterator[Executor]:
    """Who solves the boxes: this process, or the workers of the cluster, within the context.

    **Raises:** `InputError` where the cluster cannot be had.
    """
    if make is None:
        from lora_flow.sweeps.executors import InProcess

        yield InProcess()
        return
    try:
        import dask
        import distributed

        from lora_flow.sweeps.dask import OnDask
    except ImportError as error:
        raise InputError(f"cluster must have Dask (pip install 'lora-flow[cluster]'), got {error}") from error
    with contextlib.ExitStack() as held:
        held.enter_context(dask.config.set(CONFIG))
        held.enter_context(_quiet(logging.getLogger("distributed")))
        cluster = make(held)
        try:
            client = held.enter_context(distributed.Client(cluster, timeout=_WITHIN))
        except (OSError, ValueError) as error:
            raise InputError(f"cluster must answer, got {cluster}: {one_line(error)}") from error
        if find_spec("bokeh") and client.dashboard_link:
            print(f"dashboard: {client.dashboard_link}")
        yield OnDask(client)


def cluster_of(asked: str) -> Make:
    """How to have the cluster that `--cluster` names. Nothing is made before it is called."""
    local = re.fullmatch(r"local:([0-9]{1,9})", asked)
    if local:
        count = int(local[1])
        require(1 <= count <= _MOST, "cluster", f"have from 1 to {_MOST} local workers", asked)
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # they may share a GPU with this process
        return lambda held: _local(held, count)
    if "://" in asked:
        return lambda held: asked
    require(asked.endswith(".toml"), "cluster", _MUST, asked)
    return _of_table(asked, read_toml(os.path.expanduser(asked)))


def _local(held: contextlib.ExitStack, count: int) -> Any:
    """Workers of this machine: a process each, with one thread."""
    import distributed

    cluster = distributed.LocalCluster(
        n_workers=count,
        threads_per_worker=1,
        memory_limit=0,  # XLA's memory is none that Dask could free
        dashboard_address="127.0.0.1:0",  # any free port, also of the pages that Dask has without bokeh
        silence_logs=logging.CRITICAL,
        env=IN_WORKERS,
    )
    return held.enter_context(cluster)


def _of_table(path: str, table: Mapping[str, Any]) -> Make:
    """A cluster of any class: its `class`, its `arguments`, and the number of `jobs`, or `minimum` and `maximum`."""
    for name in table:
        require_choice(f"a setting in '{path}'", name, ("class", "arguments", "jobs", "minimum", "maximum"))
    named, arguments = table.get("class"), table.get("arguments", {})
    module, _, name = str(named).rpartition(".")
    require(isinstance(named, str) and module, f"class in '{path}'", "be MODULE.CLASS", repr(named))
    require_instance(f"arguments in '{path}'", arguments, dict, "be a table")
    counts = {one: table[one] for one in ("jobs", "minimum", "maximum") if one in table}
    must = "say jobs, or minimum and maximum"
    require(set(counts) in ({"jobs"}, {"minimum", "maximum"}), f"'{path}'", must, ", ".join(counts) or "none of them")
    for one, count in counts.items():
        require_integer(f"{one} in '{path}'", count, "be at least 0", 0)
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        package = module.partition(".")[0].replace("_", "-")
        must = f"be installed and have that class (pip install {package})"
        raise InputError(f"class in '{path}' must {must}, got {named}: {error}") from error

    def make(held: contextlib.ExitStack) -> Any:
        try:
            cluster = held.enter_context(kind(**arguments))
        except Exception as error:  # whatever such a class raises
            told = one_line(f"{type(error).__name__}: {error}")
            raise InputError(f"arguments in '{path}' must be what {named} takes, got {told}") from error
        of_jobs = hasattr(cluster, "job_script")  # dask-jobqueue, of whose jobs each may have several workers
        if "jobs" in counts:
            cluster.scale(**{"jobs" if of_jobs else "n": counts["jobs"]})
        else:
            cluster.adapt(**{f"{one}_jobs" if of_jobs else one: count for one, count in counts.items()})
        return cluster

    return make


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Dask's own account of what a line of ours tells is left out."""
    before = [(handler, handler.level) for handler in logger.handlers]
    for handler, _ in before:
        handler.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for handler, level in before:
            handler.setLevel(level)

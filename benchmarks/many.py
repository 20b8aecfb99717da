"""Job h: many lanes, solved and stored box by box, in this process and on a Dask cluster of this machine."""

from __future__ import annotations

import contextlib
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import jax

import lora_flow
from benchmarks.children import Failed, in_child
from benchmarks.timing import peak_bytes, seconds

ALPHAS = (1e-3, 1e-4, 1e-5)
WORKERS = 2
FIRST = WORKERS  # boxes, one for each worker
SEEDS, QUICK_SEEDS = (334, 3_334, 33_334), (34, 334)
WAYS = {"in process": "benchmarks.many:in_process", f"local:{WORKERS}": "benchmarks.many:on_dask"}


def run(quick: bool) -> dict[str, Any]:
    """Figure 1's problem with more and more seeds, a fresh process for each number of lanes and each way."""
    rows: dict[str, dict[str, Any]] = {}
    for seeds in QUICK_SEEDS if quick else SEEDS:
        for name, function in WAYS.items():
            try:
                row = in_child(function, seeds, timeout=3600)
            except Failed as failure:
                row = {"missing": str(failure)}
            rows[f"{len(ALPHAS) * seeds} lanes, {name}"] = row
    return {"rows": rows}


def in_process(seeds: int) -> dict[str, Any]:
    """Runs in a child: the sweep by the devices of one process, and its share of storing."""
    from lora_flow.storage.folder import Folder
    from lora_flow.sweeps.executors import InProcess

    write, stored = Folder.write, list[float]()

    def timed(self: Folder, *arguments: Any) -> None:
        stored.append(seconds(lambda: write(self, *arguments)))

    Folder.write = timed  # type: ignore[method-assign]
    found = _measured(InProcess(), seeds)
    return found | {"stored_s": sum(stored[FIRST:]), "peak_mb": peak_bytes() / 1e6}


def on_dask(seeds: int) -> dict[str, Any]:
    """Runs in a child: the same by workers with a thread each; the peak is the largest of any process."""
    from distributed import Client

    from lora_flow.cli.cluster import cluster_of
    from lora_flow.sweeps.dask import OnDask

    with contextlib.ExitStack() as held:
        client = held.enter_context(Client(cluster_of(f"local:{WORKERS}")(held)))
        found = _measured(OnDask(client), seeds)
        return found | {"peak_mb": max(peak_bytes(), *client.run(peak_bytes).values()) / 1e6}


def _measured(executor: Any, seeds: int) -> dict[str, Any]:
    """The time of the boxes after the first ones, in which every process compiles."""
    from lora_flow.dynamics.integrator import MAX_STEPS, RTOL
    from lora_flow.sweeps import from_python
    from lora_flow.sweeps.plan import plan_sweep
    from lora_flow.sweeps.run import open_runs

    problem = lora_flow.aligned_problem(jax.random.key(0))
    grid: dict[str, Any] = {"init": "gaussian", "side": "B", "alpha": ALPHAS, "rank": 4, "seeds": seeds}
    how: dict[str, Any] = {"solver": "auto", "rtol": RTOL, "max_steps": MAX_STEPS, "batch_size": 0}
    plan = plan_sweep(problem, **grid, t1=5.0, saves=101, **how)
    with tempfile.TemporaryDirectory() as root, open_runs(root, {"": (from_python.told(plan), plan)}) as folders:
        pending = folders[""].pending()

        def solve(boxes: list[int]) -> float:
            return seconds(lambda: deque(executor.solve(plan, folders[""], boxes), maxlen=0))  # whose values none keeps

        first, took = solve(pending[:FIRST]), solve(pending[FIRST:])
        lanes = sum(map(plan.layout.boxes.size, pending[FIRST:]))
        files = sum(1 for entry in Path(root).rglob("*") if entry.is_file())
        return {"first_s": first, "seconds": took, "lanes": lanes, "boxes": len(pending), "files": files}

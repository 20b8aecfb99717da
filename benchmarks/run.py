"""Measures: `python -m benchmarks.run [--quick] [--gpu] [--jobs a b ...] [--out results.json]`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.children import start_jax

JOBS = {
    "a": "Figure 1: 3 alphas x 30 seeds",
    "b": "stiff tail to T = 1e4",
    "c": "unequal sweep",
    "d": "growth with size",
    "e": "cold start",
    "f": "gradients of the final loss",
    "g": "a Vision Transformer with LoRA",
    "h": "many lanes",
}
GPU_JOBS = "abcd"
LONG = "h"  # takes 24 minutes, and runs where it is named
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, help="which jobs; all but h unless given, a to d with --gpu")
    parser.add_argument("--quick", action="store_true", help="smaller tasks, fewer peers and fewer rounds")
    parser.add_argument("--gpu", action="store_true", help="on a GPU, or one line where there is none")
    parser.add_argument("--out", type=Path, help="the results; benchmarks/results/{cpu,gpu,quick}.json unless given")
    arguments = parser.parse_args()
    start_jax()
    if arguments.gpu and not _on_gpu():
        print("skipped: JAX finds no GPU here")
        return
    usual = GPU_JOBS if arguments.gpu else [name for name in JOBS if arguments.quick or name not in LONG]
    kind = "quick" if arguments.quick else "gpu" if arguments.gpu else "cpu"
    out = arguments.out or RESULTS / f"{kind}.json"
    measure(arguments.jobs or tuple(usual), arguments.quick, out)


def measure(jobs: tuple[str, ...], quick: bool, out: Path) -> None:
    """Runs the jobs and writes the results after each, so that an interruption loses one job only."""
    from benchmarks import machine, tables

    found: dict[str, Any] = {"machine": machine.describe(), "quick": quick, "jobs": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in jobs:
        print(f"{name}. {JOBS[name]}", flush=True)
        began = time.perf_counter()
        found["jobs"][name] = _job(name)(quick)
        found["jobs"][name]["took_s"] = time.perf_counter() - began
        out.write_text(json.dumps(found, indent=1) + "\n")
        print("\n" + tables.TABLES[name](found["jobs"][name]) + "\n", flush=True)


def _job(name: str) -> Callable[[bool], dict[str, Any]]:
    from benchmarks import cold, gradients, many, races, size, training, unequal

    if name in races.RACES:
        return lambda quick: races.run(name, quick)
    return {"c": unequal.run, "d": size.run, "e": cold.run, "f": gradients.run, "g": training.run, "h": many.run}[name]


def _on_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


if __name__ == "__main__":
    main()

"""Job c: 256 lanes that need unequal numbers of steps, by `sweep` and by one flat vmap of the same solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_flow
from benchmarks.peers.jax_peers import over_devices
from benchmarks.tasks import error
from benchmarks.timing import interleaved, seconds

T1, SAVES, KEY = 5.0, 101, 0
SWEEP, FLAT = "lora_flow.sweep", "flat vmap"


def run(quick: bool) -> dict[str, Any]:
    """Four shift scales, eight alphas and eight ranks (two, four and eight if quick), one seed."""
    scales = np.geomspace(0.1, 100.0, 2 if quick else 4)
    alphas, ranks = np.geomspace(1e-6, 1e-1, 4 if quick else 8), tuple(range(1, 9))
    problems = {float(s): lora_flow.aligned_problem(jax.random.key(KEY), shift_scale=float(s)) for s in scales}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems.values())
    starts = [
        lora_flow.pad(lora_flow.gaussian_init(jax.random.key(0), problem, rank=r, alpha=a, side="B"), max(ranks))
        for problem in problems.values()
        for a in alphas
        for r in ranks
    ]
    lanes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    which = jnp.repeat(jnp.arange(len(problems)), len(alphas) * len(ranks))

    def of_sweep(**how: Any) -> np.ndarray:
        found = lora_flow.sweep(
            problems, side="B", alpha=alphas, rank=ranks, seeds=1, t1=T1, saves=SAVES, progress=False, **how
        )
        return found["loss"].transpose("problem", "init", "alpha", "rank", "seed", "time").values.reshape(-1, SAVES)

    def lane(start: tuple[jax.Array, lora_flow.Adapters]) -> jax.Array:
        problem = jax.tree.map(lambda leaf: leaf[start[0]], stacked)
        solved = lora_flow.solve(problem, start[1], t1=T1, saves=SAVES, derivatives="forward")
        return solved.observables["loss"]

    losses: dict[str, np.ndarray] = {}
    compile_s: dict[str, float] = {}

    def compiled(name: str, function: Any) -> Callable[[], None]:
        built: list[Any] = []
        compile_s[name] = seconds(lambda: built.append(jax.jit(function).lower((which, lanes)).compile()))
        return lambda: losses.update({name: np.asarray(built[0]((which, lanes)))})

    reference = of_sweep(solver="Dopri8", rtol=5e-6)  # a method of another order, at a hundredth of the tolerance
    first = seconds(of_sweep)
    calls = {
        SWEEP: lambda: losses.update({SWEEP: of_sweep()}),
        FLAT: compiled(FLAT, over_devices(jax.vmap(lane), len(which))),
    }
    timed = interleaved(calls, 3 if quick else 5, 20.0)
    compile_s[SWEEP] = first - timed[SWEEP]["median_s"]
    rows = {
        name: {"compile_s": compile_s[name], "error": error(losses[name], reference)} | timed[name] for name in calls
    }
    return {"lanes": len(which), "rows": rows}

"""Job c: 256 lanes that need unequal numbers of steps, by `sweep` and by one flat vmap of the same solver."""

from __future__ import annotations

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import lora_flow
from benchmarks.peers.jax_peers import over_devices
from benchmarks.tasks import error
from benchmarks.timing import interleaved, seconds

T1, SAVES, KEY = 5.0, 101, 0


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
        solved = lora_flow.solve(problem, start[1], t1=T1, saves=SAVES, adjoint=diffrax.ForwardMode())
        return solved.observables["loss"]

    flat = jax.jit(jax.vmap(lane))
    shared_out = jax.jit(over_devices(jax.vmap(lane), len(which)))
    calls = {
        "lora_flow.sweep": of_sweep,
        "flat vmap, one device": lambda: np.asarray(flat((which, lanes))),
        "flat vmap, all devices": lambda: np.asarray(shared_out((which, lanes))),
    }
    reference = of_sweep(solver="Dopri8", rtol=5e-6)  # a method of another order, at a hundredth of the tolerance
    losses: dict[str, np.ndarray] = {}
    first = {name: seconds(lambda name=name, call=call: losses.update({name: call()})) for name, call in calls.items()}
    errors = {name: error(found, reference) for name, found in losses.items()}
    timed = interleaved(calls, 3 if quick else 5, 20.0)
    rows = {name: {"first_s": first[name], "error": errors[name]} | timed[name] for name in calls}
    return {"lanes": len(which), "rows": rows}

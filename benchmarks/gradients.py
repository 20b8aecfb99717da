"""Job f: what the gradient of the final loss costs beside the solve itself, in seconds and in memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import lora_flow
from benchmarks.children import in_child
from benchmarks.timing import interleaved, peak_bytes, seconds

T1, ALPHA, RANK = 2.0, 1e-3, 4


def run(quick: bool) -> dict[str, Any]:
    """A forward solve and reverse mode at the default tolerance; memory over tolerances, each in a fresh process."""
    start, final_loss = _case(None)
    forward, reverse = jax.jit(final_loss), jax.jit(jax.value_and_grad(final_loss))
    calls = {
        "forward solve": lambda: jax.block_until_ready(forward(start)),
        "value and gradient": lambda: jax.block_until_ready(reverse(start)),
    }
    first = {name: seconds(call) for name, call in calls.items()}
    timed = interleaved(calls, 5 if quick else 15, 20.0)
    tolerances = (1e-3,) if quick else (1e-3, 1e-6, 1e-9)
    memory = [in_child("benchmarks.gradients:reverse_memory", rtol, timeout=200) for rtol in tolerances]
    return {"rows": {name: {"first_s": first[name]} | timed[name] for name in calls}, "memory": memory}


def reverse_memory(rtol: float) -> dict[str, float]:
    """Runs in a child: steps, and the peak above what the process held once the program was compiled."""
    start, final_loss = _case(rtol)
    problem = lora_flow.aligned_problem(jax.random.key(0))
    steps = int(lora_flow.solve(problem, start, t1=T1, saves=2, rtol=rtol).stats["num_steps"])
    compiled = jax.jit(jax.value_and_grad(final_loss)).lower(start).compile()
    before = peak_bytes()
    jax.block_until_ready(compiled(start))
    planned = compiled.memory_analysis().temp_size_in_bytes
    return {"rtol": rtol, "steps": steps, "run_mb": (peak_bytes() - before) / 1e6, "temporary_mb": planned / 1e6}


def _case(rtol: float | None) -> tuple[lora_flow.Adapters, Any]:
    problem = lora_flow.aligned_problem(jax.random.key(0))
    start = lora_flow.gaussian_init(jax.random.key(0), problem, rank=RANK, alpha=ALPHA, side="B")
    how = {} if rtol is None else {"rtol": rtol}

    def final_loss(adapters: lora_flow.Adapters) -> jax.Array:
        return jnp.log10(lora_flow.solve(problem, adapters, t1=T1, saves=2, **how).observables["loss"][-1])

    return start, final_loss

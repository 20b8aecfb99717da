"""Job f: what derivatives of the final loss cost beside the solve itself, in seconds and in memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import lora_flow
from benchmarks.children import in_child
from benchmarks.timing import interleaved, peak_bytes, seconds

T1, ALPHA, RANK, LANES = 2.0, 1e-3, 4, 32


def run(quick: bool) -> dict[str, Any]:
    """Derivatives at the default tolerance beside the solve; memory over tolerances, each in a fresh process."""
    start, final_loss = _case(None)
    starts = jax.vmap(_start)(jax.random.split(jax.random.key(0), LANES))

    def product(adapters: lora_flow.Adapters) -> Any:
        return jax.jvp(jax.grad(final_loss), (adapters,), (start,))

    gradient = jax.value_and_grad(final_loss)
    programs = {
        "forward solve": (final_loss, start),
        "value and gradient": (gradient, start),
        "gradient, and Hessian times a vector": (product, start),
        f"{LANES} lanes forward": (jax.vmap(final_loss), starts),
        f"{LANES} lanes, value and gradient": (jax.vmap(gradient), starts),
    }
    compiled = {name: (jax.jit(function), at) for name, (function, at) in programs.items()}
    calls = {name: (lambda one=one: jax.block_until_ready(one[0](one[1]))) for name, one in compiled.items()}
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
    how = {} if rtol is None else {"rtol": rtol}

    def final_loss(adapters: lora_flow.Adapters) -> jax.Array:
        return jnp.log10(lora_flow.solve(problem, adapters, t1=T1, saves=2, **how).observables["loss"][-1])

    return _start(jax.random.key(0)), final_loss


def _start(key: Any) -> lora_flow.Adapters:
    problem = lora_flow.aligned_problem(jax.random.key(0))
    return lora_flow.gaussian_init(key, problem, rank=RANK, alpha=ALPHA, side="B")

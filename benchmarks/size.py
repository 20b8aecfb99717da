"""Job d: how the cost of one evaluation of the field grows with the width of the layers, and one large trajectory."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_flow
from benchmarks.children import Failed, in_child
from benchmarks.timing import interleaved, peak_bytes

RANK, REPEATS = 8, 10
WIDTHS, QUICK_WIDTHS = (16, 64, 256, 1000, 1024, 4096), (16, 64, 256, 1000)
LARGE = {"m": 4096, "n": 4096, "h": 8192}


def run(quick: bool) -> dict[str, Any]:
    """Seconds an evaluation, and the exponents of N that fit N = 256 and above."""
    kinds = {"aligned": _aligned, "not aligned": _random}
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, draw in kinds.items():
        for width in QUICK_WIDTHS if quick else WIDTHS:
            for name, row in _evaluation(draw(width), width, kind == "aligned").items():
                rows.setdefault(f"{name}, {kind}", {})[str(width)] = row
    result: dict[str, Any] = {"rows": rows, "exponents": {name: _exponent(row) for name, row in rows.items()}}
    return result if quick else result | {"large": _large()}


def _aligned(width: int) -> lora_flow.Factorization:
    return lora_flow.aligned_problem(jax.random.key(0), m=width, n=width, h=width)


def _random(width: int) -> lora_flow.Factorization:
    return lora_flow.Factorization(*np.random.default_rng(0).standard_normal((3, width, width)) / np.sqrt(width))


def _evaluation(problem: lora_flow.Factorization, width: int, aligned: bool) -> dict[str, dict[str, Any]]:
    """The field, of aligned problems in canonical coordinates as in a sweep, and the gradient of a textbook's loss."""
    start = lora_flow.gaussian_init(jax.random.key(0), problem, rank=RANK, alpha=1e-3)
    inner, state = problem, start
    if aligned:
        turned = lora_flow.canonical(problem, rank=RANK)
        inner, (state, _) = turned.problem, turned.enter(start)
    ours = _repeated(lambda state: inner.field(state))
    calls = {"lora_flow": lambda: ours(state)}
    if width <= 1024:  # O(N^3): its slope is plain by then, and minutes long
        target = jnp.asarray(np.asarray(problem.w2) @ np.asarray(problem.w1) + np.asarray(problem.shift))
        textbook = _repeated(jax.grad(lambda state: -_textbook_loss(problem, target, state)))
        calls["jax.grad of the textbook loss"] = lambda: textbook(start)
    for call in calls.values():
        jax.block_until_ready(call())
    timed = interleaved({name: lambda call=call: jax.block_until_ready(call()) for name, call in calls.items()}, 5, 5.0)
    return {
        name: {key: row[key] / (REPEATS if key.endswith("_s") else 1) for key in row} for name, row in timed.items()
    }


def _repeated(field: Any) -> Any:
    """Several evaluations in one program, each from where the last one led, as a solver asks for them."""

    def step(_: int, state: lora_flow.Adapters) -> lora_flow.Adapters:
        return jax.tree.map(lambda leaf, change: leaf + 1e-9 * change, state, field(state))

    return jax.jit(lambda state: jax.lax.fori_loop(0, REPEATS, step, state))


def _textbook_loss(problem: lora_flow.Factorization, target: jax.Array, state: lora_flow.Adapters) -> jax.Array:
    (a1, b1), (a2, b2) = state
    return 0.5 * jnp.sum((target - (problem.w2 + b2 @ a2) @ (problem.w1 + b1 @ a1)) ** 2)


def _exponent(row: dict[str, dict[str, Any]]) -> float | None:
    widths = [width for width in row if int(width) >= 256]
    if len(widths) < 2:
        return None
    seconds = [row[width]["median_s"] for width in widths]
    return float(np.polyfit(np.log([int(width) for width in widths]), np.log(seconds), 1)[0])


def _large() -> dict[str, Any]:
    try:
        return in_child("benchmarks.size:large_trajectory", timeout=300)
    except Failed as failure:
        return {"missing": str(failure)}


def large_trajectory() -> dict[str, Any]:
    """Runs in a child: an aligned problem of width 4096 and three seeds, from nothing to the losses."""
    began = time.perf_counter()
    problem = lora_flow.aligned_problem(jax.random.key(0), **LARGE)
    found = lora_flow.sweep(problem, side="B", alpha=1e-3, rank=RANK, seeds=3, t1=5.0, progress=False)
    finished = int((found["status"] == 0).sum())
    return {"seconds": time.perf_counter() - began, "peak_mb": peak_bytes() / 1e6, "finished": finished}

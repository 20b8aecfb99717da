"""What a loss curve shows of a random start that nobody knows: two numbers, while the run is along the task.

On an aligned problem whose shift has rank one, `sigma u v^T`, the adapters grow along the task's directions v, g and u
alone, with `W1 v = sigma_W1 g` and `W2^T u = sigma_W2 g`. Along them a layer of any rank has one number for each
factor, and the run is that of a problem of 1 x 1 matrices. A Gaussian draw of rank r starts it at sizes z1 and z2,
whose ratios to alpha are independent and of the chi distribution with r degrees of freedom. All else of the draw
decides what remains of the loss once the task is learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters
from lora_flow.dynamics.flows import Flow, Plain
from lora_flow.dynamics.solve import solve
from lora_flow.initialization import Scheme, gaussian_init
from lora_flow.problems.base import on_host
from lora_flow.problems.factorization import Factorization
from lora_flow.problems.formulas import keeps_all
from lora_flow.runtime.compiling import compiled


def why_not_along(problem: Any, scheme: Scheme, flow: Flow) -> str:
    """Why the draw of a start is more than two numbers; "" where it is not."""
    if scheme.name != "gaussian":
        return f"the draw of '{scheme.name}'"
    if not isinstance(flow, Plain):
        return f"a draw under {type(flow).__name__}"
    if not keeps_all(problem, Factorization):
        return f"a draw on a {type(problem).__name__}"
    spectrum = problem.spectrum()
    if not (spectrum["aligned"] and len(spectrum["sigma_shift"]) == 1 and min(problem.leading_gains()) > 0):
        return "a draw on a problem that is not aligned, or whose shift has a rank above 1"
    return ""


def along_task(problem: Factorization) -> Factorization:
    """The part of an aligned problem along its task, of 1 x 1 matrices."""
    sigma, s1, s2 = problem.leading_gains()
    return Factorization(*(np.full((1, 1), value) for value in (s1, s2, sigma)))


def start_along(sizes: Float[Array, " 2"], side: str) -> Adapters:
    """The start of these sizes on a problem of 1 x 1 matrices, in the factors of this side."""
    drawn, zero = sizes.reshape(2, 1, 1), jnp.zeros((1, 1))
    return tuple(Adapter(one, zero) if side == "A" else Adapter(zero, one) for one in drawn)


def unlikely(log_ratio: Array, rank: int) -> Array:
    """The root of twice the loss of log likelihood, signed, of the logarithm of a number of the chi distribution.

    The distribution has `rank` degrees of freedom. The density of x is `exp(rank x - exp(2 x)/2)`, so its square is
    `rank (exp(2 d) - 1 - 2 d)` at the distance d from the likeliest x, `log(rank)/2`.
    """
    d = log_ratio - 0.5 * jnp.log(rank)
    small = jnp.abs(d) < 1e-3
    far = jnp.where(small, 1.0, jnp.minimum(d, 20.0))
    bend = jnp.where(small, 1 + 2 * d / 3 + d**2 / 3, (jnp.exp(2 * far) - 1 - 2 * far) / (2 * far**2))
    return d * jnp.sqrt(2 * rank * bend)


def directions(problem: Factorization) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The unit vectors v, g and u."""
    host = on_host(problem)
    u, _, vt = np.linalg.svd(host.shift)
    hidden = host.w1 @ vt[0]
    return vt[0], hidden / np.linalg.norm(hidden), u[:, 0]


@compiled()
def with_other_rests(
    how: Mapping[str, Any],
    rank: int,
    side: str,
    problem: Factorization,
    along: tuple[Array, Array, Array],
    alpha: Array,
    sizes: Float[Array, "curve 2"],
    seeds: Array,
    times: Array,
) -> Float[Array, "curve draw time"]:
    """The logarithms of the losses of runs whose starts have these sizes along the task, and are else drawn anew."""
    v, g, u = along

    def one(sizes: Array, seed: Array) -> Array:
        drawn = gaussian_init(jax.random.key(seed), problem, rank=rank, alpha=alpha, side=side)
        if side == "A":
            start = tuple(Adapter(_sized(a.T, x, z).T, b) for (a, b), x, z in zip(drawn, (v, g), sizes, strict=True))
        else:
            start = tuple(Adapter(a, _sized(b, x, z)) for (a, b), x, z in zip(drawn, (g, u), sizes, strict=True))
        run = solve(problem, start, t1=times[-1], saves=times, derivatives="forward", **how)
        return jnp.log(run.observables["loss"])

    return jax.vmap(lambda sizes: jax.vmap(lambda seed: one(sizes, seed))(seeds))(sizes)


def _sized(columns: Array, direction: Array, size: Array) -> Array:
    """Columns whose part along the direction is scaled to this norm."""
    part = direction @ columns
    return columns + jnp.outer(direction, part * (size / jnp.linalg.norm(part) - 1))

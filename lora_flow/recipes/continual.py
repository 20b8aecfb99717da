"""Random tasks for continual learning, whose inputs overlap as much as one asks for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_flow.arrays import require_key
from lora_flow.checks import require, require_integer, require_number
from lora_flow.problems.continual import Tasks


def tasks_problem(
    key: Array,
    *,
    m: int = 24,
    n: int = 24,
    count: int = 3,
    width: int = 4,
    overlap: float = 0.0,
    rank: int = 2,
    samples: int = 0,
) -> Tasks:
    r"""Random tasks whose inputs lie in subspaces with a common part.

    The inputs of task j lie in the span of `width` orthonormal columns, `sqrt(1 - overlap) O_j + sqrt(overlap) C`, with
    O_j of its own and C common to all tasks, all orthogonal. So `overlap` is the cosine between the inputs of two
    tasks. W_j differs from a random weight W0 by a matrix of rank `rank` and Frobenius norm 1 that acts on the inputs
    of task j. The loss of each task at the start is then 1/2 for white inputs.

    **Arguments:** `m` outputs and `n` inputs; `count` tasks; `samples` Gaussian samples for each task, 0 for inputs
    that are white in their span.

    **Returns:** `Tasks`, with a weight `(m, n)`.

    **Raises:** `InputError` for sizes below 1, a `width` with `width (count + 1)` above n, a rank above the width or m,
    or an overlap outside 0 to 1.
    """
    require_key(key)
    for name, value in (("m", m), ("n", n), ("count", count), ("width", width), ("rank", rank)):
        require_integer(name, value, "be at least 1", 1)
    require_integer("samples", samples, "be at least 0", 0)
    require(width * (count + 1) <= n, "width", f"be at most n/(count + 1) = {n // (count + 1)}", width)
    require(rank <= min(width, m), "rank", f"be at most {min(width, m)}, the width or m", rank)
    require_number("overlap", overlap, "lie between 0 and 1", lambda share: 0 <= share <= 1)
    keys = jax.random.split(key, 2 + count)
    columns = jnp.linalg.qr(jax.random.normal(keys[0], (n, width * (count + 1))))[0]
    weight = jax.random.normal(keys[1], (m, n)) / jnp.sqrt(n)
    tasks: list[tuple[Any, Any]] = []
    for j, each in enumerate(keys[2:], start=1):
        own = columns[:, j * width : (j + 1) * width]
        span = jnp.sqrt(1 - overlap) * own + jnp.sqrt(overlap) * columns[:, :width]
        of_change, of_samples = jax.random.split(each)
        drawn = jax.random.normal(of_samples, (samples, width)) if samples else jnp.sqrt(width) * jnp.eye(width)
        tasks.append((weight + _unit_change(of_change, m, span, rank), drawn @ span.T))
    return Tasks(weight, tasks)


def _unit_change(key: Array, m: int, span: Float[Array, "n width"], rank: int) -> Float[Array, "m n"]:
    """A random matrix of that rank and Frobenius norm 1 whose rows lie in the span."""
    of_left, of_right = jax.random.split(key)
    left, right = jax.random.normal(of_left, (m, rank)), jax.random.normal(of_right, (rank, span.shape[1]))
    change = left @ right @ span.T
    return change / jnp.linalg.norm(change)

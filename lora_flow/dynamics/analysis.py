"""Observables that are too expensive at every step: computed afterwards, from saved adapters."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lora_flow.adapter import Adapters, as_adapters
from lora_flow.algebra.angles import one_minus_cosine
from lora_flow.algebra.spectra import norm_on_host
from lora_flow.dynamics.flows import Flow, as_flow
from lora_flow.dynamics.observables import Direction, directions_of
from lora_flow.problems.base import Problem, as_problem, on_host, vector_field
from lora_flow.problems.stale import check_problem
from lora_flow.runtime.compiling import compiled


def analyse(problem: Problem, adapters: Adapters, flow: Flow | str = "plain") -> dict[str, np.ndarray]:
    r"""Further observables of adapters with any leading axes, `Trajectory.history` for instance.

    **Returns:** name -> array with these leading axes; `update_singular_values` has one axis more. NaN where a quantity
    is undefined: the direction of a zero matrix, or adapters at times that were not reached.

    - `gradient_norm`: ||dL/d(A_1, B_1, ...)||; along the plain flow dL/dt is minus its square.
    - `growth_rate_1`, ...: d/dt log ||gamma_i^T Z_i||^2 along the `flow` (Claim 3.1 of arXiv 2503.06982).
    - `alignment_error`, `alignment_error_2`, ...: as in `observables`, but from the singular value decomposition of Z_i
      itself, without a floor.

    For a `Factorization` also:

    - `update_singular_values`: the first min(m, n, 2 r) of F; the others are zero, except for an `Offset`.
    - `update_alignment_error`: 1 - cos of the angle between (u_F; v_F), the top singular pair of F, and (u; v), the
      shift's.
    - `term_1`, `term_2`, `term_12`: Frobenius norms of the update's terms W2 B1 A1, B2 A2 W1 and B2 A2 B1 A1.
    - `loss_signal`, `loss_rest`: the loss split into 1/2 ||U^T E V||_F^2, with U and V the singular vectors of the
      shift, and the rest (equation 79).

    **Raises:** `InputError` for a problem that has changed since it was solved, and for a bad flow or adapters.
    """
    check_problem(problem)
    driven, adapters = as_flow(flow), as_adapters("adapters", adapters, problem.layers)
    lead = adapters[0].a.shape[:-2]
    flat = [np.asarray(leaf).reshape(-1, *leaf.shape[-2:]) for leaf in jax.tree.leaves(adapters)]
    reached = np.all([np.isfinite(leaf).all(axis=(-2, -1)) for leaf in flat], axis=0)
    kept = [np.where(reached[:, None, None], leaf, 0.0) for leaf in flat]
    finite: Any = jax.tree.unflatten(jax.tree.structure(adapters), kept)  # of NumPy's arrays
    directions = on_host(directions_of(problem))
    named = _of_the_flow(problem, driven, finite, directions) | _alignment(finite, directions)
    named |= as_problem(problem).details(finite)
    for values in named.values():
        values[~reached] = np.nan
    return {name: values.reshape((*lead, *values.shape[1:])) for name, values in named.items()}


@compiled()
def _fields(problem: Problem, flow: Flow, adapters: Adapters) -> tuple[Adapters, Adapters]:
    """The negative gradients, and the velocities."""
    with jax.default_matmul_precision("highest"):
        descent = jax.vmap(vector_field(problem))(adapters)
        return descent, jax.vmap(flow)(descent, adapters)


def _of_the_flow(
    problem: Problem, flow: Flow, adapters: Any, directions: tuple[Direction, ...]
) -> dict[str, np.ndarray]:
    descent, field = on_host(_fields(problem, flow, adapters))
    slopes = [norm_on_host(leaf, axis=(-2, -1)) for leaf in jax.tree.leaves(descent)]
    named = {"gradient_norm": norm_on_host(np.stack(slopes), axis=0)}
    for layer, (adapter, change, direction) in enumerate(zip(adapters, field, directions, strict=True), start=1):
        left, right = map(np.asarray, direction.pairs)
        along, growth = (left @ x.b + np.swapaxes(x.a @ right.T, -1, -2) for x in (adapter, change))
        size = norm_on_host(along, axis=(-2, -1))
        unit = np.where(size > 0, size, np.nan)[..., None, None]
        named[f"growth_rate_{layer}"] = 2 * np.sum((along / unit) * (growth / unit), axis=(-2, -1))
    return named


def _alignment(adapters: Any, directions: tuple[Direction, ...]) -> dict[str, np.ndarray]:
    named = {}
    for layer, (adapter, direction) in enumerate(zip(adapters, directions, strict=True), start=1):
        stacked = np.concatenate([adapter.b, np.swapaxes(adapter.a, -1, -2)], axis=-2)
        left, sigma, _ = np.linalg.svd(stacked, full_matrices=False)
        name = "alignment_error" if layer == 1 else f"alignment_error_{layer}"
        named[name] = one_minus_cosine(
            left, sigma, np.concatenate([np.asarray(x) for x in direction.pairs], axis=1) / np.sqrt(2)
        )
    return named

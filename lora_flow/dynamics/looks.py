"""What a run is looked at for: the loss and measurements of each state, and the observables that these make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lora_flow.adapter import Adapters
from lora_flow.algebra.spectra import norm
from lora_flow.checks import require
from lora_flow.dynamics.flows import Flow
from lora_flow.dynamics.integrator import Integrator
from lora_flow.dynamics.measurements import Direction, Measurement, measure
from lora_flow.dynamics.observables import observables
from lora_flow.problems.base import Problem, as_problem, own_observables
from lora_flow.problems.derivatives import probe

KEPT_STATE = 2048  # numbers in a state up to which states are kept, and observables computed after the solve


def looks_later(state: Array, how: Integrator) -> bool:
    """Whether states are saved and looked at together, far cheaper than one after another: where there is room."""
    return how.save_adapters or state.size <= KEPT_STATE


def looks(
    problem: Problem, directions: tuple[Direction, ...], unflatten: Callable[[Array], Adapters]
) -> Callable[[Array], Any]:
    """What observables are made of, of a state: the loss, the measurements, and the problem's own."""

    def look(state: Array) -> Any:
        seen = unflatten(state)
        return problem.loss(seen), measure(seen, directions), own_observables(problem, seen)

    return look


def observed(
    loss: Array,
    measurements: tuple[Measurement, ...],
    own: dict[str, Array],
    reached: Bool[Array, " time"],
    conserved: Float[Array, ""],
) -> dict[str, Float[Array, " time"]]:
    """The observables of a trajectory by name, the problem's `own` among them, NaN at times it did not reach.

    The arguments have t = 0 first, then the saved times; `reached` and the result have the saved times only.
    """
    start = jax.tree.map(lambda leaf: leaf[0], measurements)
    loss, measurements, own = jax.tree.map(lambda leaf: leaf[1:], (loss, measurements, own))
    named = {"loss": loss, **observables(measurements, conserved, start)}
    taken = sorted(({*named, "step_size"}) & set(own))
    require(not taken, "the problem's observables", "have names of their own", ", ".join(taken))
    named |= own
    return {name: jnp.where(reached, values, jnp.nan) for name, values in named.items()}


def conserved_by(problem: Problem, flow: Flow) -> Float[Array, ""]:
    """The flow's `conserves`; NaN for a loss by which the imbalance changes, as by one with weight decay.

    A loss of the products B_i A_i changes none. One that is not known to be of these is tried at one state of rank 2,
    which has an imbalance between its directions beside that of each. The imbalance A A^T - B^T B changes by M + M^T,
    with M = A' A^T - B^T B'.
    """
    asked = as_problem(problem)
    if asked.of_products:
        return flow.conserves
    state = probe(asked.layers, 2)
    changes = jnp.zeros((), bool)
    for (a, b), descent in zip(state, asked.field(state), strict=True):
        change = descent.a @ a.T - b.T @ descent.b
        apart = norm(change + change.T) / 2
        size = norm(a) * norm(descent.a) + norm(b) * norm(descent.b)
        changes |= apart > jnp.sqrt(jnp.finfo(size.dtype).eps) * size
    return jnp.where(changes, jnp.nan, flow.conserves)


def finite(saved: Any) -> Array:
    """The times at which everything is finite: diffrax leaves infinities at times that a failed run did not reach."""
    leaves = [jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(saved)]
    return jnp.all(jnp.stack(leaves), axis=0)


def where(reached: Array, saved: Any, otherwise: Any) -> Any:
    """Replaces what was saved at times that the run did not reach, by a number or by a PyTree without times."""

    def one(other: Any, leaf: Array) -> Array:
        known = reached.reshape(reached.shape + (1,) * (leaf.ndim - 1))
        return jnp.where(known, leaf, jnp.broadcast_to(other, leaf.shape[1:])[None])

    return jax.tree.map(one, jax.tree.broadcast(otherwise, saved), saved)


def prepend(first: Any, rest: Any) -> Any:
    """PyTrees over time, with the values at the start in front."""
    return jax.tree.map(lambda x, leaf: jnp.concatenate([x[None], leaf]), first, rest)

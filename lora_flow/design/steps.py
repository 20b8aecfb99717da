"""The state of a search and its one compiled step, for all restarts at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from lora_flow.adapter import Adapters
from lora_flow.design.objectives import Objective
from lora_flow.design.parametrisations import Parametrisation
from lora_flow.initialization.of_norm import on_sphere
from lora_flow.runtime.compiling import compiled


class State(NamedTuple):
    """Free numbers and the optimiser's memory, and the best that was found; every array over the restarts."""

    free: Any
    memory: Any
    best: Array
    best_free: Any

    def flat(self) -> np.ndarray:
        """All numbers, `(restart, number)`, as they are stored."""
        return np.asarray(jax.vmap(lambda one: ravel_pytree(one)[0])(self))

    def from_flat(self, numbers: np.ndarray) -> State:
        """The state of these numbers, of this one's structure and types."""
        back = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], self))[1]
        state: State = jax.vmap(back)(jnp.asarray(numbers))
        return state


def first_state(
    parametrisation: Parametrisation,
    optimizer: optax.GradientTransformation,
    problem: Any,
    rank: int,
    restarts: int,
    seed: int,
) -> State:
    keys = jax.random.split(jax.random.key(seed), restarts)
    free = jax.vmap(lambda key: parametrisation.first(key, problem, rank))(keys)
    return State(free, jax.vmap(optimizer.init)(free), jnp.full(restarts, jnp.inf), free)


@compiled()
def step(
    parametrisation: Parametrisation,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    rank: int,
    problem: Any,
    radius: Array,
    state: State,
) -> tuple[State, Array, Array, Adapters]:
    """The next state; and of this one the objective, its slope's norm and the adapters."""
    first = objective.first_of(problem)

    def value(free: Any) -> tuple[Array, Adapters]:
        start = on_sphere(parametrisation.adapters(free, first, rank), radius)
        return objective(problem, start), start

    def one(state: State) -> tuple[State, Array, Array, Adapters]:
        (found, start), slope = jax.value_and_grad(value, has_aux=True)(state.free)
        updates, memory = optimizer.update(slope, state.memory, state.free)
        moved = optax.apply_updates(state.free, updates)
        known = jnp.isfinite(found) & jnp.all(jnp.isfinite(ravel_pytree(moved)[0]))
        free, memory = _chosen(known, (moved, memory), (state.free, state.memory))
        better = found < state.best  # never for NaN
        best, best_free = _chosen(better, (found, state.free), (state.best, state.best_free))
        return State(free, memory, best, best_free), found, optax.tree.norm(slope), start

    return jax.vmap(one)(state)


@compiled(quickly=True)
def values_of(
    parametrisation: Parametrisation, objective: Objective, rank: int, problem: Any, radius: Array, free: Any
) -> Array:
    """The objective of every restart."""
    first = objective.first_of(problem)
    return jax.vmap(lambda one: objective(problem, on_sphere(parametrisation.adapters(one, first, rank), radius)))(free)


def _chosen(condition: Array, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda left, right: jnp.where(condition, left, right), one, other)

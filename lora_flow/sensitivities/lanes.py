"""The programs: many lanes, each with its quantities at times of its own, their slopes, and their derivatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_flow.adapter import Adapters
from lora_flow.dynamics.flows import Flow
from lora_flow.dynamics.solve import Trajectory, solve
from lora_flow.dynamics.steps import velocity
from lora_flow.initialization import Scheme, initialize
from lora_flow.runtime.compiling import compiled
from lora_flow.sensitivities.quantities import Quantity, Setting

Aside = tuple[Array, Array, Array]  # what is not differentiated


@dataclasses.dataclass(frozen=True)
class Method:
    """How runs are solved, and what is looked at."""

    setting: Setting
    quantities: tuple[Quantity, ...]
    flow: Flow
    solver: Any
    rtol: float
    max_steps: int

    def solve(self, problem: Any, start: Adapters, times: Array, derivatives: str) -> Trajectory:
        return solve(
            problem,
            start,
            t1=times[-1],
            saves=times,
            flow=self.flow,
            solver=self.solver,
            rtol=self.rtol,
            max_steps=self.max_steps,
            derivatives=derivatives,
            save_adapters=True,
        )


@compiled(quickly=True)
def starts(
    scheme: Scheme, side: str, rank: int, problem: Any, alphas: Array, seeds: Array, pushed: Any, alpha_pushed: Array
) -> tuple[Adapters, Adapters]:
    """The starts of the lanes, and their derivatives `(lane, parameter, ...)` where the problem's are `pushed`."""

    def one(alpha: Array, seed: Array) -> tuple[Adapters, Adapters]:
        def start(problem: Any, alpha: Array) -> Adapters:
            return initialize(scheme, jax.random.key(seed), problem, rank=rank, alpha=alpha, side=side)

        return _pushed(start, (problem, alpha), (pushed, alpha_pushed))[:2]

    return jax.vmap(one)(alphas, seeds)


@compiled()
def curves(method: Method, problem: Any, start: Adapters, times: Array) -> tuple[Array, Array]:
    """Every quantity over common times, `(lane, time, quantity)`, and how the lanes ended."""

    def one(start: Adapters) -> tuple[Array, Array]:
        run = method.solve(problem, start, times, "forward")
        return jax.vmap(lambda state: _values(method, problem, state))(run.history), run.status

    return jax.vmap(one)(start)


@compiled()
def forward(
    method: Method, problem: Any, start: Adapters, times: Array, pushed: Any, start_pushed: Adapters
) -> tuple[Array, Array, Array, Array, Array]:
    """Of each lane the quantities at its times, their derivatives, their slopes, its status and its rounding floor.

    The quantities and slopes are `(lane, quantity)`. The derivatives are `(lane, parameter, quantity)`, where those of
    the problem and of the starts are `pushed`. A slope is the derivative by time.
    """

    def one(start: Adapters, times: Array, start_pushed: Adapters) -> tuple[Array, Array, Aside]:
        def seen(problem: Any, start: Adapters) -> tuple[Array, Aside]:
            return _at_times(method, problem, start, times, "forward")

        return _pushed(seen, (problem, start), (pushed, start_pushed), has_aux=True)

    values, derivatives, aside = jax.vmap(one)(start, times, start_pushed)
    return values, derivatives, *aside


@compiled()
def backward(
    method: Method, names: tuple[str, ...], problem: Any, start: Adapters, times: Array
) -> dict[str, Float[Array, "lane quantity *shape"]]:
    """The derivatives of each lane's quantities by whole arrays of the problem, from starts that stay."""

    def one(start: Adapters, times: Array) -> dict[str, Array]:
        def seen(arrays: dict[str, Array]) -> Array:
            moved = eqx.tree_at(
                lambda tree: [getattr(tree, name) for name in names], problem, [arrays[name] for name in names]
            )
            return _at_times(method, moved, start, times, "reverse")[0]

        found: dict[str, Array] = jax.jacrev(seen)({name: getattr(problem, name) for name in names})
        return found

    return jax.vmap(one)(start, times)


def _at_times(method: Method, problem: Any, start: Adapters, times: Array, derivatives: str) -> tuple[Array, Aside]:
    """Each quantity at its own time; aside their slopes, the status and the rounding floor."""
    order = jnp.argsort(times)
    saves = jnp.concatenate([jnp.zeros(1), times[order]])  # of at least two times
    run = method.solve(problem, start, saves, derivatives)
    places = 1 + jnp.argsort(order)
    values, slopes = [], []
    for index, place in enumerate(places):
        state = jax.tree.map(lambda leaf, place=place: leaf[place], run.history)
        moving = velocity(problem, method.flow)(state)
        value, slope = jax.jvp(lambda state, index=index: _value(method, index, problem, state), (state,), (moving,))
        values.append(value)
        slopes.append(slope)
    return jnp.stack(values), jax.lax.stop_gradient((jnp.stack(slopes), run.status, run.rounding_floor))


def _values(method: Method, problem: Any, state: Adapters) -> Array:
    return jnp.stack([_value(method, index, problem, state) for index in range(len(method.quantities))])


def _value(method: Method, index: int, problem: Any, state: Adapters) -> Array:
    return method.quantities[index].value(method.setting, problem, state)


def _pushed(function: Callable[..., Any], at: Any, along: Any, has_aux: bool = False) -> Any:
    """`jax.jvp` along many tangents, which have a leading axis; what is no floating-point array stays as it is."""
    moving, rest = eqx.partition(at, eqx.is_inexact_array)

    def of(moving: Any) -> Any:
        return function(*eqx.combine(moving, rest))

    def one(tangent: Any) -> Any:
        found = jax.jvp(of, (moving,), (tangent,), has_aux=has_aux)
        return (found[0], found[1], found[2] if has_aux else None)

    return jax.vmap(one, out_axes=(None, 0, None))(along)

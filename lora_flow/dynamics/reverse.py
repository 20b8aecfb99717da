"""The steps of a lane with derivatives in reverse mode: those of the steps taken, whose lengths are held fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_flow.dynamics.phases import Steps
from lora_flow.solvers.counted import counted, or_zeros, turned, walk_back
from lora_flow.solvers.derivatives import fixed
from lora_flow.solvers.recorded import Recorder, again

Functions = tuple[Callable[[Array], Array], Callable[[Array], Any]]  # the field, and what is kept of a state
Differentiated = tuple[Functions, Array, Array, Array]  # with the state at 0, t1 and the times to save at


def reversible(
    field: Callable[[Array], Array],
    keep: Callable[[Array], Any],
    stepping: Any,
    state: Float[Array, " d"],
    t1: Float[Array, ""],
    times: Float[Array, " time"],
) -> Steps:
    """The steps of a `steps.Stepping`; derivatives are by the state, the times and all that both functions hold."""
    functions = eqx.filter_closure_convert(field, state), eqx.filter_closure_convert(keep, state)
    steps: Steps = _reversible((functions, state, t1, times), fixed(stepping))
    return steps


@eqx.filter_custom_vjp
def _reversible(differentiated: Differentiated, stepping: Any) -> Steps:
    functions, *rest = differentiated
    return Steps.of(stepping.integrate(*functions, *rest, diffrax.ForwardMode()))


@_reversible.def_fwd
def _record(perturbed: Any, differentiated: Differentiated, stepping: Any) -> Any:
    functions, *rest = differentiated
    solution = stepping.integrate(*functions, *rest, Recorder(stepping.solver))
    steps = Steps.of(solution)
    return steps, (solution.stats["record"], steps.saved, steps.final)


@_reversible.def_bwd
def _replay(residuals: Any, gradient: Steps, perturbed: Any, differentiated: Differentiated, stepping: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        return _gradient(residuals, gradient, perturbed, differentiated, stepping)


def _gradient(residuals: Any, gradient: Steps, perturbed: Any, differentiated: Differentiated, stepping: Any) -> Any:
    record, saved, final = residuals
    functions, _, _, times = differentiated
    asked, _, by_t1_asked, by_times_asked = perturbed
    moving, held = eqx.partition(functions, asked)
    field = functions[0]
    of_saved = jax.tree.map(or_zeros, saved, gradient.saved, is_leaf=lambda leaf: leaf is None)
    of_final = or_zeros(final, gradient.final)

    def taken_again(moving: Any, number: Array, state: Array, loop: Any) -> dict[str, Array]:
        begin, end, stages = record.of(number)
        return again(stepping.solver, eqx.combine(moving, held)[0], state, end - begin, stages, loop)

    def visit(number: Array, state: Array, carry: Any) -> Any:
        of_end, by_functions, by_times, save = carry
        begin, end, _ = record.of(number)
        dense, pull = jax.vjp(lambda moving, state: taken_again(moving, number, state, counted), moving, state)

        def one_save(carry: Any) -> Any:
            of_dense, by_functions, by_times, save = carry

            def at_time(dense: dict[str, Array]) -> Array:
                return stepping.solver.interpolation_cls(t0=begin, t1=end, **dense).evaluate(times[save])

            seen, pull_dense = jax.vjp(at_time, dense)
            _, pull_keep = jax.vjp(lambda moving, seen: eqx.combine(moving, held)[1](seen), moving, seen)
            by_keep, of_seen = pull_keep(jax.tree.map(lambda leaf: leaf[save], of_saved))
            if by_times_asked:
                by_times = by_times.at[save].set(jnp.sum(of_seen * field(seen)))
            return _add(of_dense, pull_dense(of_seen)[0]), _add(by_functions, by_keep), by_times, save - 1

        of_dense = jax.tree.map(jnp.zeros_like, dense) | {"y1": of_end}
        of_dense, by_functions, by_times, save = jax.lax.while_loop(
            lambda carry: (carry[3] >= 0) & (times[carry[3]] > begin),
            one_save,
            (of_dense, by_functions, by_times, save),
        )
        by_step, of_begin = pull(of_dense)
        return of_begin, _add(by_functions, by_step), by_times, save

    reached = jnp.where(record.number > 0, record.ends[record.number - 1], 0.0)
    last_save = jnp.sum(times <= reached) - 1
    start = of_final, jax.tree.map(jnp.zeros_like, moving), jnp.zeros_like(times), last_save
    of_state, by_functions, by_times, _ = walk_back(
        lambda number, state: taken_again(moving, number, state, turned)["y1"],
        visit,
        record.kept,
        record.number,
        stepping.max_steps,
        final,
        start,
    )
    by_t1 = jnp.sum(of_final * field(final)) if by_t1_asked else None
    return by_functions, of_state, by_t1, by_times if by_times_asked else None


def _add(total: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, total, more)

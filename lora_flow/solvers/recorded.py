"""Steps that are written down while a run takes them, and taken again for its derivatives in reverse mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_flow.solvers.automatic import Automatic
from lora_flow.solvers.chebyshev import RungeKuttaChebyshev
from lora_flow.solvers.counted import Kept, Loop
from lora_flow.solvers.tableaus import Field, tableau_step


class Record(NamedTuple):
    """The accepted steps of a run; what stands beyond their `number` means nothing.

    - `ends`: the times at which each ended, and the next one began.
    - `stages`: those of each stabilised step; 0 for a step of a method with a tableau.
    - `kept`: states before them.
    """

    ends: Float[Array, " step"]
    stages: Int[Array, " step"]
    kept: Kept
    number: Int[Array, ""]

    def of(self, step: Int[Array, ""]) -> tuple[Array, Array, Array]:
        """When it began, when it ended, and its stages."""
        begin = jnp.where(step > 0, self.ends[jnp.maximum(step - 1, 0)], 0.0)
        return begin, self.ends[step], self.stages[step]


def can_be_replayed(solver: Any) -> bool:
    """Whether it is known what a step of the solver is: not of those whose steps a class of the user's makes."""
    explicit = isinstance(solver, diffrax.AbstractERK) and type(solver).step is diffrax.AbstractERK.step
    return explicit or type(solver) in (Automatic, RungeKuttaChebyshev)


class Recorder(diffrax.ForwardMode):
    """Loops with a forward mode, which leave a `Record` among the solution's statistics."""

    solver: Any  # of which `can_be_replayed` holds

    def loop(
        self,
        *,
        solver: Any,
        throw: Any,
        passed_solver_state: Any,
        passed_controller_state: Any,
        **how: Any,
    ) -> Any:
        found = []

        def recording(
            condition: Callable[[Any], Any], body: Callable[[Any], Any], start: Any, *, max_steps: int, buffers: Any
        ) -> Any:
            def write(carry: tuple[Any, Record]) -> tuple[Any, Record]:
                state, record = carry
                after, step = body(state), state.num_accepted_steps
                # a rejected step is written over by the next one, which has its number
                ends = record.ends.at[step].set(state.tnext)
                stages = record.stages.at[step].set(self._stages(state, after))
                kept = record.kept.put(step, state.y, max_steps)
                return after, Record(ends, stages, kept, after.num_accepted_steps)

            record = Record(
                jnp.zeros(max_steps, start.tprev.dtype),
                jnp.zeros(max_steps, jnp.int32),
                Kept.room(start.y, max_steps),
                start.num_accepted_steps,
            )
            last, record = eqxi.while_loop(
                lambda carry: condition(carry[0]),
                write,
                (start, record),
                max_steps=max_steps,
                buffers=lambda carry: [buffers(carry[0]), carry[1].ends, carry[1].stages, carry[1].kept],
                kind="lax",
            )
            found.append(record)
            return last

        if isinstance(solver, diffrax.AbstractERK) and solver.scan_kind is None:
            solver = eqx.tree_at(lambda one: one.scan_kind, solver, "lax", is_leaf=lambda leaf: leaf is None)
        last, told = self._loop(
            solver=solver,
            inner_while_loop=eqx.Partial(eqxi.while_loop, kind="lax"),
            outer_while_loop=recording,
            **how,
        )
        return last, {**told, "record": found[0]}

    def _stages(self, state: Any, after: Any) -> Int[Array, ""]:
        if isinstance(self.solver, diffrax.AbstractERK):
            return jnp.zeros((), jnp.int32)
        automatic = isinstance(self.solver, Automatic)
        solver = self.solver.chebyshev if automatic else self.solver
        before, now = (one.solver_state.chebyshev if automatic else one.solver_state for one in (state, after))
        needed = solver.stages_of(state.tnext - state.tprev, before.radius, now.radius).astype(jnp.int32)
        return jnp.where(state.solver_state.stiff, needed, 0) if automatic else needed


def again(
    solver: Any, field: Field, y0: Float[Array, " d"], dt: Float[Array, ""], stages: Int[Array, ""], loop: Loop
) -> dict[str, Array]:
    """What a step that was taken leaves for its interpolation; "y1" is its end."""
    if isinstance(solver, diffrax.AbstractERK):
        return tableau_step(solver.tableau, field, y0, dt)
    return solver.again(field, y0, dt, stages, loop)

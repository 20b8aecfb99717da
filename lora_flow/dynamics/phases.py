"""A flow with a latch, integrated in phases: each ends where the latched part goes off in a layer, or at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import optimistix
from jaxtyping import Array, Bool, Float

from lora_flow.adapter import Adapters
from lora_flow.dynamics.flow import Flow
from lora_flow.problems.base import Layers

STEPS = ("num_steps", "num_accepted_steps", "num_rejected_steps")
TOLERANCE = 1e3  # in eps: of the time at which a latch goes off, and of the margin then


class Steps(NamedTuple):
    """What is left of a lane's steps, or of those of all its phases.

    - `saved`: what was saved, over time; infinite at times that were not reached. `final`: the last state.
    - `ok`: whether the end was reached. `stopped`: whether the steps were too many.
    - `stats`: the numbers of steps.
    - `until`: when a latched part went off in each layer, infinite where it did not; None for a flow without one.
    """

    saved: Any
    final: Float[Array, " d"]
    ok: Bool[Array, ""]
    stopped: Bool[Array, ""]
    stats: dict[str, Any]
    until: Float[Array, " layer"] | None = None

    @classmethod
    def of(cls, solution: diffrax.Solution) -> Steps:
        saved, final = solution.ys  # type: ignore[misc]
        stats = {name: solution.stats[name] for name in STEPS}
        came = _ended(solution, "successful") | _ended(solution, "event_occurred")
        return cls(saved, final[0], came, _ended(solution, "max_steps_reached"), stats)


Run = Callable[[Array, Array, Bool[Array, " layer"], diffrax.Event], diffrax.Solution]


def in_phases(
    flow: Flow,
    layers: Layers,
    start: Float[Array, " d"],
    unflatten: Callable[[Array], Adapters],
    t1: Float[Array, ""],
    times: Float[Array, " time"],
    run: Run,
    kept: Any,
) -> Steps:
    """A solution in as many phases as the latch may need, with the time until which the part was on in each layer.

    `run(begin, state, on, event)` solves from a time and a state on, to t1 or to the event, and saves `times`, of which
    those before it begins do not count. `kept` has the shapes of what is saved of a state. `layers` has the `(out, in)`
    shapes that the flow's margin counts with. A layer in which the part never goes off has an infinite time.

    A phase that a lane does not need takes no steps. Under `vmap` a phase lasts until all lanes are through with it.
    """

    def margins(state: Array) -> Float[Array, " layer"]:
        return jnp.stack([flow.margin(*one) for one in zip(unflatten(state), layers, strict=True)])

    eps = float(jnp.finfo(start.dtype).eps)
    bisection: Any = optimistix.Bisection
    finder = bisection(rtol=TOLERANCE * eps, atol=TOLERANCE * eps, flip=True)  # from above 0 to below

    def phase(carry: _Carry, _: None) -> tuple[_Carry, None]:
        begin, on, until, before = carry

        def least_margin(t: Any, y: Array, args: Any, **kwargs: Any) -> Array:
            return jnp.min(jnp.where(on, margins(y), 1.0))

        solution = run(begin, before.final, on, diffrax.Event(least_margin, finder, direction=False))
        solved, end = Steps.of(solution), solution.ts[1][0]  # type: ignore[index]
        running = before.ok & (begin < t1)
        event = running & _ended(solution, "event_occurred")
        left = jnp.where(on, margins(solved.final), jnp.inf)
        least = jnp.arange(len(layers)) == jnp.argmin(left)  # which rounding may leave above 0
        goes_off = event & ((left < 0) | least)
        after = Steps(
            saved=_choose(running & (times >= begin), solved.saved, before.saved),
            final=jnp.where(running, solved.final, before.final),
            ok=before.ok & (solved.ok | ~running),
            stopped=before.stopped | (running & solved.stopped),
            stats={name: count + jnp.where(running, solved.stats[name], 0) for name, count in before.stats.items()},
        )
        return _Carry(jnp.where(event, end, t1), on & ~goes_off, jnp.where(goes_off, end, until), after), None

    on = margins(start) >= 0
    until = jnp.where(on, jnp.inf, 0.0)
    begin = jnp.zeros_like(t1)
    nothing = Steps(
        saved=jax.tree.map(lambda leaf: jnp.full((len(times), *leaf.shape), jnp.inf, leaf.dtype), kept),
        final=start,
        ok=jnp.array(True),
        stopped=jnp.array(False),
        stats=dict.fromkeys(STEPS, jnp.zeros((), int)),
    )
    last, _ = jax.lax.scan(phase, _Carry(begin, on, until, nothing), None, length=len(layers) + 1)
    return last.solved._replace(until=last.until)


class _Carry(NamedTuple):
    """When a phase begins, in which layers the part is on, until when it was, and the phases before."""

    begin: Float[Array, ""]
    on: Bool[Array, " layer"]
    until: Float[Array, " layer"]
    solved: Steps


def latch_meanings(flow: Flow, layers: int) -> dict[str, str]:
    """Name -> meaning of the observables that a flow adds by its latch: none for a flow without one."""
    about = "time up to which A_{i} was shrunk: that of the save while A_{i} still shrinks"
    named = {f"shrunk_until{i}": about.replace("{i}", str(i)) for i in range(1, layers + 1)}
    return named if flow.latched else {}


def latch_observables(
    flow: Flow, times: Float[Array, " time"], until: Float[Array, " layer"] | None
) -> dict[str, Float[Array, " time"]]:
    """The values of these observables."""
    if until is None:
        return {}
    return {name: jnp.minimum(times, one) for name, one in zip(latch_meanings(flow, len(until)), until, strict=True)}


def _ended(solution: diffrax.Solution, how: str) -> Bool[Array, ""]:
    return jnp.asarray(solution.result == getattr(diffrax.RESULTS, how))


def _choose(where: Bool[Array, " time"], new: Any, old: Any) -> Any:
    return jax.tree.map(
        lambda one, other: jnp.where(where.reshape(where.shape + (1,) * (one.ndim - 1)), one, other), new, old
    )

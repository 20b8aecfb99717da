"""The steps of one lane: what they follow, and what controls their length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool

from lora_flow.adapter import Adapter, Adapters, zero_adapters
from lora_flow.algebra.spectra import norm
from lora_flow.dynamics.flows import Flow
from lora_flow.dynamics.integrator import Integrator
from lora_flow.dynamics.looks import looks, looks_later
from lora_flow.dynamics.measurements import Direction
from lora_flow.dynamics.phases import Steps, in_phases
from lora_flow.dynamics.reverse import reversible
from lora_flow.problems.base import AbstractProblem, Problem, as_problem, vector_field
from lora_flow.solvers.automatic import Automatic
from lora_flow.solvers.chebyshev import RungeKuttaChebyshev
from lora_flow.solvers.control import ResidualController
from lora_flow.solvers.derivatives import adjoint_of, fixed
from lora_flow.solvers.tracing import TracedOnce


def step_lane(
    problem: Problem, adapters: Adapters, directions: tuple[Direction, ...], t1: Array, times: Array, how: Integrator
) -> Steps:
    """The first half of `solve_lane`: all of its steps."""
    adapters = projected(how, adapters)
    state, unflatten = ravel_pytree(adapters)  # one array: the solver's sums are then one operation each
    look = looks(problem, directions, unflatten)

    def field(state: Array, on: Array | None = None) -> Array:
        return ravel_pytree(velocity(problem, how.flow, on)(unflatten(state)))[0]

    def keep(state: Array) -> Any:
        return state if looks_later(state, how) else look(state)

    with jax.default_matmul_precision("highest"):  # accelerators round products in single precision to less
        stepping = Stepping(
            how.solver, _controller(problem, state, directions, unflatten, how, times), how.dt0, how.max_steps
        )
        if how.replayed:
            return reversible(field, keep, stepping, state, t1, times)
        adjoint = adjoint_of(how.derivatives)
        if how.layers is None:
            return Steps.of(stepping.integrate(field, keep, state, t1, times, adjoint))

        def run(begin: Array, state: Array, on: Array, event: diffrax.Event) -> diffrax.Solution:
            ts = jnp.maximum(times, begin)
            return stepping.integrate(lambda y: field(y, on), keep, state, t1, ts, adjoint, begin=begin, event=event)

        kept = jax.eval_shape(keep, state)
        return in_phases(how.flow, how.layers, state, unflatten, t1, times, run, kept)


class Stepping(eqx.Module):
    """What makes steps, whatever the field that they follow."""

    solver: diffrax.AbstractSolver
    controller: diffrax.AbstractStepSizeController
    dt0: Array | None
    max_steps: int = eqx.field(static=True)

    def integrate(
        self,
        field: Callable[[Array], Array],
        keep: Callable[[Array], Any],
        state: Array,
        t1: Array,
        times: Array,
        adjoint: diffrax.AbstractAdjoint,
        *,
        begin: Array | None = None,
        event: diffrax.Event | None = None,
    ) -> diffrax.Solution:
        """From a state and a time on, 0 unless given, to t1 or to the event; what is to `keep` of states at times."""
        solver = self.solver
        if isinstance(solver, Automatic | RungeKuttaChebyshev):  # whose steps take long to trace
            solver = TracedOnce(solver)
        along = diffrax.SubSaveAt(ts=times, fn=lambda t, state, args: keep(state))
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, state, args: field(state)),
            solver,
            t0=jnp.zeros_like(t1) if begin is None else begin,
            t1=t1,
            dt0=self.dt0,
            y0=state,
            stepsize_controller=self.controller,
            saveat=diffrax.SaveAt(subs=[along, diffrax.SubSaveAt(t1=True)]),
            adjoint=adjoint,
            max_steps=self.max_steps,
            throw=False,
            event=event,
        )


def projected(how: Integrator, adapters: Adapters) -> Adapters:
    """The start of the flow, which both halves make from the adapters given."""
    with jax.default_matmul_precision("highest"):
        return tuple(map(how.flow.project, adapters))


def velocity(problem: Problem, flow: Flow, on: Bool[Array, " layer"] | None = None) -> Callable[[Adapters], Adapters]:
    """The right-hand side: the flow applied to the problem's negative gradient, its latch where it is `on`."""
    field, latch = vector_field(problem), () if on is None else (on,)
    return lambda adapters: flow(field(adapters), adapters, *latch)


def _controller(
    problem: Problem,
    start: Array,
    directions: tuple[Direction, ...],
    unflatten: Callable[[Array], Adapters],
    how: Integrator,
    times: Array,
) -> diffrax.AbstractStepSizeController:
    if how.stepsize_controller is not None:
        return how.stepsize_controller
    pretrained, joined = as_problem(problem).pretrained()  # on which progress is measured

    def seen(state: Array) -> Adapters:
        return joined(unflatten(state))

    relative_residual = _relative_residual(pretrained, seen, seen(start))
    growth_bound = _growth_bound(pretrained, directions, seen, relative_residual)
    controller = ResidualController(
        how.rtol,
        relative_residual=eqx.filter_closure_convert(relative_residual, start),  # with arrays that can be held fixed
        growth_bound=eqx.filter_closure_convert(growth_bound, start),
        factors=unflatten,
        origin=jax.lax.stop_gradient(tuple(map(_origin, unflatten(start)))),
    )
    if how.solver.interpolation_cls is diffrax.LocalLinearInterpolation:
        return diffrax.ClipStepSizeController(controller, step_ts=times)
    return controller


def _relative_residual(
    problem: Problem, unflatten: Callable[[Array], Adapters], start: Adapters
) -> Callable[[Array], Array]:
    """||E|| / ||shift|| of a state: the root of the loss relative to zero adapters, or to the start if that is zero.

    Where both are zero the result is 1. A loss may be less than 0 by rounding.
    """

    def size(adapters: Adapters) -> Array:
        return jnp.sqrt(jnp.abs(jax.lax.stop_gradient(problem.loss(adapters))))

    def known(value: Array) -> Array:
        return jnp.isfinite(value) & (value > 0)

    begin, zero = size(start), size(zero_adapters(problem.layers, rank=1))
    reference = jnp.where(known(zero), zero, begin)

    def relative_residual(state: Array) -> Array:
        now = size(unflatten(state))
        return jnp.where(known(reference), now / jnp.where(known(reference), reference, 1.0), 1.0 + 0.0 * now)

    return relative_residual


def _origin(adapter: Adapter) -> Adapter:
    """What the factors are measured from: the start where both are non-zero, else zero."""
    both = jnp.any(adapter.a != 0) & jnp.any(adapter.b != 0)
    return jax.tree.map(lambda leaf: jnp.where(both, leaf, 0.0), adapter)


def _growth_bound(
    problem: AbstractProblem,
    directions: tuple[Direction, ...],
    unflatten: Callable[[Array], Adapters],
    relative_residual: Callable[[Array], Array],
) -> Callable[[Array], Array]:
    """The problem's own bound where it knows one, else the fastest growth at the start, scaled by the residual.

    The fastest growth is that of B from B = 0 and A along the top right singular vector of the layer's task. Neither
    the steps nor the loop that evaluates this bound are differentiated.
    """
    problem, directions = fixed((problem, directions))
    bound = problem.growth_bound()
    if bound is not None:
        return lambda state: bound(unflatten(state))
    seeds = tuple(Adapter(one.right[None], jnp.zeros((one.left.size, 1))) for one in directions)
    fastest = jnp.max(jnp.stack([norm(change.b) for change in problem.field(seeds)]))
    return lambda state: fastest * relative_residual(state)

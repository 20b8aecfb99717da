"""Gradient descent, jitted; plain `jax.vmap` of diffrax, as its documentation has it; and the same in canonical
coordinates, which tells what the coordinates gain from what the step control does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jax.sharding import Mesh, PartitionSpec

import lora_flow
from benchmarks.peers import arrays
from benchmarks.peers.algebra import Weights, field, loss
from benchmarks.peers.peer import ATOL_SHARE, DECADES, Peer, Run

if TYPE_CHECKING:
    from benchmarks.tasks import Task

State = Any  # a PyTree of arrays, the lanes in front


def over_devices(solve: Callable[[State], jax.Array], lanes: int) -> Callable[[State], jax.Array]:
    """`solve` of equal shares of the lanes on every device, where they can be shared out equally."""
    devices = jax.local_devices()
    if lanes % len(devices):
        return solve
    spec = PartitionSpec("lanes")
    mesh = Mesh(np.array(devices), ("lanes",))
    return jax.shard_map(solve, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False)


def _compiled(losses: Callable[[State, jax.Array], jax.Array], start: State) -> Run:
    """`losses` maps (state, rung) to `(lanes, times)`."""
    lanes = len(jax.tree.leaves(start)[0])

    @jax.jit
    def run(start: State, rung: jax.Array) -> jax.Array:
        return over_devices(lambda state: losses(state, rung), lanes)(start)

    return lambda rung: np.asarray(run(start, jnp.asarray(rung, float)))


def _prepared(losses: Callable[[Weights, jax.Array, State, jax.Array], jax.Array], task: Task) -> Run:
    """`losses` maps (weights, times, state, rung) to `(lanes, times)`."""
    weights = jax.tree.map(jnp.asarray, arrays.weights(task))
    times = jnp.asarray(task.times)
    start = jax.tree.map(jnp.asarray, arrays.start(task))
    return _compiled(lambda state, rung: losses(weights, times, state, rung), start)


def descend(weights: Weights, times: jax.Array, state: State, step: jax.Array) -> jax.Array:
    def one_step(_: Any, state: State) -> State:
        return jax.tree.map(lambda leaf, change: leaf + step * change, state, field(weights, *state))

    def to_next(carry: tuple[State, jax.Array], stop: jax.Array) -> tuple[tuple[State, jax.Array], jax.Array]:
        state, done = carry
        state = jax.lax.fori_loop(done, stop, one_step, state)
        return (state, stop), loss(weights, *state)

    stops = jnp.rint(times / step).astype(int)
    return jax.lax.scan(to_next, (state, jnp.zeros((), stops.dtype)), stops)[1].T


def integrate(
    solver: diffrax.AbstractSolver,
    slope: Callable[[State], State],
    loss_of: Callable[[State], jax.Array],
    times: jax.Array,
    state: State,
    rtol: jax.Array,
) -> jax.Array:
    term = diffrax.ODETerm(lambda t, y, args: slope(y))
    saveat = diffrax.SaveAt(ts=times, fn=lambda t, y, args: loss_of(y))
    controller = diffrax.PIDController(rtol=rtol, atol=ATOL_SHARE * rtol)

    def lane(start: State) -> jax.Array:
        return diffrax.diffeqsolve(
            term,
            solver,
            t0=0.0,
            t1=times[-1],
            dt0=None,
            y0=start,
            saveat=saveat,
            stepsize_controller=controller,
            adjoint=diffrax.ForwardMode(),
            max_steps=1_000_000,
            throw=False,
        ).ys

    return jax.vmap(lane)(state)


def _diffrax(name: str, solver: diffrax.AbstractSolver) -> Peer:
    def losses(weights: Weights, times: jax.Array, state: State, rtol: jax.Array) -> jax.Array:
        return integrate(solver, lambda y: field(weights, *y), lambda y: loss(weights, *y), times, state, rtol)

    return Peer(f"diffrax {name}, plain vmap", functools.partial(_prepared, losses), DECADES, needs="diffrax")


def _in_canonical_coordinates(solver: diffrax.AbstractSolver, task: Task) -> Run:
    """lora_flow's coordinates and its field there, under diffrax's own step control; turned before the clock starts."""
    turned = lora_flow.canonical(task.problem, rank=task.rank)
    start, _ = jax.jit(jax.vmap(turned.enter))(jax.tree.map(jnp.asarray, task.starts))
    problem, times = turned.problem, jnp.asarray(task.times)
    return _compiled(lambda state, rtol: integrate(solver, problem.field, problem.loss, times, state, rtol), start)


_chord = diffrax.with_stepsize_controller_tols(optimistix.Chord)  # the default inflates the step count

PAPER = Peer("gradient descent, JAX (the paper's way)", functools.partial(_prepared, descend), (1e-4,), "step", "jax")


def longest_step(*steps: float) -> Peer:
    """Gradient descent with the longest of these steps that is right."""
    return Peer("gradient descent, JAX (longest step)", functools.partial(_prepared, descend), steps, "step", "jax")


DIFFRAX = (
    _diffrax("Tsit5", diffrax.Tsit5()),
    _diffrax("Dopri8", diffrax.Dopri8()),
    _diffrax("Kvaerno5", diffrax.Kvaerno5(root_finder=_chord())),
)

DOPRI8_CANONICAL = Peer(
    "diffrax Dopri8 in canonical coordinates",
    functools.partial(_in_canonical_coordinates, diffrax.Dopri8()),
    DECADES,
    needs="diffrax",
)

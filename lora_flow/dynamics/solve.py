"""The gradient flow: a problem and adapters in, a trajectory out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from lora_flow.adapter import Adapter, Adapters, as_start, zero_adapters
from lora_flow.algebra.spectra import norm
from lora_flow.checks import (
    PrecisionWarning,
    as_real,
    concrete,
    kind,
    require,
    require_choice,
    require_flag,
    require_increasing,
    require_instance,
    require_integer,
    require_number,
)
from lora_flow.dynamics.flows import Flow, Plain, as_flow
from lora_flow.dynamics.measurements import Direction, Measurement, measure, principal_directions
from lora_flow.dynamics.observables import observables
from lora_flow.dynamics.phases import Steps, in_phases, latch_observables
from lora_flow.problems.base import AbstractProblem, Layers, Problem, as_problem, own_observables, vector_field
from lora_flow.problems.derivatives import probe
from lora_flow.problems.rounding import rounding_floor
from lora_flow.problems.stale import check_problem
from lora_flow.runtime.compiling import compiled
from lora_flow.runtime.memory import require_memory
from lora_flow.solvers.automatic import Automatic
from lora_flow.solvers.chebyshev import RungeKuttaChebyshev
from lora_flow.solvers.control import ResidualController
from lora_flow.solvers.derivatives import adjoint_of, guard_inputs, guard_outputs, loop_kind, require_derivatives
from lora_flow.solvers.tracing import TracedOnce

RTOL = 5e-4
MAX_STEPS = 100_000
SOLVERS = ("auto", "RKC", "Tsit5", "Dopri5", "Dopri8", "Bosh3", "Heun")
KEPT_STATE = 2048  # numbers in a state up to which states are kept, and observables computed after the solve
MANY = 10_000_000  # times to save from which on it is asked whether they fit into memory
ROUNDED = 4  # units of rounding by which the last time may be beyond t1, as that of `np.arange(0, 0.35, 0.1)` is
STATUS = ("success", "max_steps", "failed")  # a lane's status code is the index into these


class Trajectory(eqx.Module):
    """The result of `solve`; under `vmap` every array has a leading axis of lanes.

    - `times`: `(time,)`, in gradient-flow time.
    - `observables`: name -> `(time,)`; "loss", those of `lora_flow.dynamics.observables.observables`, and those of the
      problem's own `observe(adapters)`, where the problem has one. NaN at times that a failed lane did not reach. Under
      `StableLoRA` also "shrunk_until1" and so on, the time up to which A of that layer was shrunk.
    - `initial_loss`: scalar, the loss at t = 0, whether 0 is among `times` or not.
    - `rounding_floor`: scalar; a loss below it is at rounding, see `lora_flow.rounding_floor`.
    - `adapters`: one `Adapter` a layer, at the time reached, which is t1 where `status` is 0.
    - `history`: with `save_adapters` the adapters over `times`, A `(time, rank, in)` and B `(time, out, rank)`; else
      None.
    - `status`: scalar, an index into `lora_flow.dynamics.solve.STATUS`.
    - `stats`: "num_steps", "num_accepted_steps", "num_rejected_steps", scalars.
    """

    times: Float[Array, " time"]
    observables: dict[str, Float[Array, " time"]]
    initial_loss: Float[Array, ""]
    rounding_floor: Float[Array, ""]
    adapters: Adapters
    status: Int[Array, ""]
    stats: dict[str, Any]
    history: Adapters | None = None

    def __str__(self) -> str:
        if self.times.ndim > 1:
            ended = np.bincount(np.asarray(self.status).ravel(), minlength=len(STATUS))
            counts = ", ".join(f"{count} {name}" for name, count in zip(STATUS, ended, strict=True) if count)
            return f"Trajectory of {self.status.size} lanes ({counts}), {self.times.shape[-1]} times"
        last = {name: float(values[-1]) for name, values in self.observables.items()}
        reached = "at rounding" if last["loss"] < float(self.rounding_floor) else f"{last['loss']:.4g}"
        errors = [f"{last[name]:.3g}" for name in last if name.startswith("alignment_error")]
        each = f" of the {len(errors)} layers" if errors[1:] else ""
        alignment = f", alignment error{each} {', '.join(errors)}"
        along = [self.observables[f"norm_along{i}"] for i in range(1, len(self.adapters) + 1)]
        if np.isnan(along).all():
            alignment = ", no direction to align with"
        drift = float(jnp.max(self.observables["drift"]))
        conserved = "" if np.isnan(drift) else f", drift of the conserved quantities {drift:.1g}"
        until = [f"{value:.4g}" for name, value in last.items() if name.startswith("shrunk_until")]
        shrunk = f", A shrunk until t = {', '.join(until)}" if until else ""
        return (
            f"Trajectory to t = {float(self.times[-1]):g}: {STATUS[int(self.status)]} after "
            f"{int(self.stats['num_steps'])} steps ({int(self.stats['num_rejected_steps'])} rejected), "
            f"rank {self.adapters[0].rank}; loss {float(self.initial_loss):.4g} -> {reached}"
            f"{alignment}{conserved}{shrunk}"
        )


def solve(
    problem: Problem,
    adapters: Adapters,
    *,
    t1: float | Array,
    saves: int | ArrayLike | Sequence[float] = 101,
    flow: Flow | str = "plain",
    solver: diffrax.AbstractSolver | str = "auto",
    rtol: float | Array = RTOL,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    dt0: float | Array | None = None,
    derivatives: str = "reverse",
    max_steps: int = MAX_STEPS,
    save_adapters: bool = False,
) -> Trajectory:
    r"""Integrates dA_i/dt = -dL/dA_i, dB_i/dt = -dL/dB_i from 0 to `t1` (arXiv 2503.06982, equation 3).

    The result can be differentiated with respect to the adapters and the problem's arrays. `solve` works under `jit`
    and `vmap`; traced values cannot be checked.

    **Arguments:**

    - `problem`: a `Factorization`, or anything that meets `Problem`.
    - `adapters`: the start, a tuple with one `Adapter(a, b)` for each layer.
    - `t1`: the end, in gradient-flow time (n steps of gradient descent with step eta reach t = n eta).
    - `saves`: a number of equally spaced times, 0 and t1 included, or the times themselves.
    - `flow`: turns the negative gradient into the velocity: one of `lora_flow.dynamics.flows`, `ScaledGD(damping)` for
      instance, or its name and number, "scaled:1e-3". "plain" is gradient flow, the equations above.
    - `solver`: "auto", which is `Tsit5` until stability limits the step, then `RungeKuttaChebyshev` (for the flows
      "plain", "balora", "muon" and "lora-muon"; for others Tsit5 throughout); or another name in `SOLVERS`; or any
      diffrax solver.
    - `rtol`: the tolerance of `ResidualController`, relative to the factors and to the residual.
    - `stepsize_controller`, `dt0`: replace this controller and its first step. "auto" is then Tsit5 throughout, because
      another controller cannot follow a change of methods. For gradient descent, use
      `solver=diffrax.Euler(), stepsize_controller=diffrax.ConstantStepSize(), dt0=eta`.
    - `derivatives`: those that exist. "reverse" is for `grad` and `jacrev`; "forward" for `jvp` and `jacfwd`; "both"
      for both and for second derivatives, which take long to compile. Others are refused by name. For gradients right
      to 1e-3 pass `rtol=2e-4`, and `rtol=5e-6` with RKC.
    - `max_steps`: the number of steps after which the run is given up, with status 1 ("max_steps"). Under `StableLoRA`
      they are counted anew once a layer is no longer shrunk.
    - `save_adapters`: keep the adapters at every saved time as `Trajectory.history`, from which `analyse` computes the
      more expensive quantities.

    **Returns:** a `Trajectory` over the saved times.

    **Raises:** `InputError` for bad arguments, for a loss that is negative at the start, and for derivatives that
    `derivatives` excludes. A run that fails has a status, and raises nothing.
    """
    check_problem(problem)
    times = save_times(t1, saves)
    adapters = as_start("adapters", adapters, problem.layers)
    driven = as_flow(flow)
    driven.check_projected_start(adapters)
    how = integrator(
        flow=driven,
        solver=solver,
        rtol=rtol,
        stepsize_controller=stepsize_controller,
        dt0=dt0,
        derivatives=derivatives,
        max_steps=max_steps,
        save_adapters=save_adapters,
        layers=problem.layers,
    )
    inputs = guard_inputs(how.derivatives, (problem, adapters, jnp.asarray(t1, float), times, how))
    solved = _solve(*inputs)
    if how.stepsize_controller is None:
        require_loss(solved.initial_loss, solved.rounding_floor)
    return guard_outputs(how.derivatives, solved)


def require_loss(initial: Any, floor: Any) -> None:
    """Raises where a loss at the start is less than 0 by more than rounding; of what JAX traces nothing is known.

    What is still to be learned, which tolerances are relative to, would be taken for its size.
    """
    loss, floor = concrete(initial), concrete(floor)
    if loss is not None and floor is not None:
        eps = np.finfo(loss.dtype).eps
        negative = loss[loss < -np.abs(floor) / eps - 1e4 * eps]
        require(negative.size == 0, "problem", "have a loss that is at least 0", f"{negative.min(initial=0):.3g}")


def save_times(
    t1: float | Array, saves: int | ArrayLike | Sequence[float], spacing: str = "linear"
) -> Float[Array, " time"]:
    """The times at which observables are saved, as `solve` and `sweep` take them.

    A number means that many times, 0 and `t1` included: equally spaced, or for `spacing="log"` 0 and then equally
    spaced in log t over the four decades up to t1. An array is checked; a last time that only rounding puts beyond `t1`
    becomes `t1`.

    **Returns:** the times, of shape `(time,)`, increasing from 0 or later to at most `t1`.

    **Raises:** `InputError` for a bad `t1` or `spacing`, and for times that do not increase or lie outside the run.
    """
    require_choice("spacing", spacing, ("linear", "log"))
    require_number("t1", t1, "be positive and finite", lambda end: end > 0)
    if isinstance(saves, (int, np.integer)) and not isinstance(saves, bool):
        require(saves >= 2, "saves", "be at least 2, or an array of times", saves)
        if saves > MANY:  # to ask how much memory there is takes longer than many a solve
            require_memory("saves", saves, 16.0 * saves)
        if spacing == "linear":
            return jnp.linspace(0.0, t1, int(saves))
        late = jnp.geomspace(1e-4, 1.0, int(saves) - 1).at[-1].set(1.0)  # which rounding may leave beside 1
        return t1 * jnp.concatenate([jnp.zeros(1), late])
    known = as_real(saves)
    shape = jnp.asarray(saves, float).shape if known is None else known.shape
    listed = len(shape) == 1 and shape[0] >= 2
    require(listed, "saves", "be a whole number, or an array of at least two times", kind(saves))
    end = as_real(t1)
    if known is None or end is None:
        return jnp.asarray(saves, float)
    known = np.where((known > end) & (known <= end * (1 + ROUNDED * np.finfo(known.dtype).eps)), end, known)
    require_increasing("saves", known, end, "t1")
    return jax.device_put(known)


class Integrator(eqx.Module):
    """Checked arguments of `solve`: how to step and what to keep. Arrays may change without recompiling.

    `layers` has the shapes of the problem as it was given, which a flow with a latch counts with in any coordinates;
    else None.
    """

    flow: Flow
    solver: diffrax.AbstractSolver
    rtol: Array
    stepsize_controller: diffrax.AbstractStepSizeController | None
    dt0: Array | None
    derivatives: str = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    save_adapters: bool = eqx.field(static=True)
    layers: Layers | None = eqx.field(static=True)


def integrator(
    *,
    derivatives: str,
    flow: Flow = Plain(),  # noqa: B008  (it holds nothing that changes)
    solver: diffrax.AbstractSolver | str = "auto",
    rtol: float | Array = RTOL,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    dt0: float | Array | None = None,
    max_steps: int = MAX_STEPS,
    save_adapters: bool = False,
    layers: Layers,
) -> Integrator:
    """Checks the arguments of `solve` of the same names and fills in the defaults; `layers` are the problem's."""
    require_integer("max_steps", max_steps, "be at least 1", 1)
    require_flag("save_adapters", save_adapters)
    require_derivatives(derivatives)
    require_number("rtol", rtol, "lie between 0 and 1", lambda tolerance: 0 < tolerance < 1)
    if dt0 is not None:
        require_number("dt0", dt0, "be positive", lambda first: first > 0)
    if stepsize_controller is not None:
        must = "be a controller of diffrax, made, as PIDController(rtol=1e-6, atol=1e-9)"
        require_instance("stepsize_controller", stepsize_controller, diffrax.AbstractStepSizeController, must)
    if not isinstance(solver, diffrax.AbstractSolver):
        solver = _named(solver, own_control=stepsize_controller is None, symmetric=flow.symmetric)
    if isinstance(solver, RungeKuttaChebyshev | Automatic):
        must = f"be of another kind than RKC for {type(flow).__name__}, whose Jacobian need not have a real spectrum"
        require(flow.symmetric, "solver", must, "RKC")
        solver = solver.with_loops(loop_kind(derivatives))
    if stepsize_controller is None:
        require(
            isinstance(solver, diffrax.AbstractAdaptiveSolver),
            "solver",
            "estimate its error, or come with stepsize_controller=diffrax.ConstantStepSize() and a dt0",
            type(solver).__name__,
        )
    dtype = jnp.result_type(float)
    tolerance = as_real(rtol)
    if tolerance is not None and tolerance < 100 * jnp.finfo(dtype).eps:
        advice = '; turn on double precision with jax.config.update("jax_enable_x64", True)'
        warnings.warn(
            f"rtol must be at least {100 * float(jnp.finfo(dtype).eps):.0e} for {dtype} to carry it, got {rtol:g}"
            f"{advice if dtype == jnp.float32 else ''}",
            PrecisionWarning,
            stacklevel=3,
        )
    start = None if dt0 is None else jnp.asarray(dt0)
    shapes = tuple((m, n) for m, n in layers) if flow.latched else None
    return Integrator(
        flow,
        solver,
        jnp.asarray(rtol, float),
        stepsize_controller,
        start,
        derivatives,
        max_steps,
        save_adapters,
        shapes,
    )


def _named(name: Any, own_control: bool, symmetric: bool) -> diffrax.AbstractSolver:
    require_choice("solver", name, SOLVERS, "or a diffrax solver")
    if name == "RKC":
        return RungeKuttaChebyshev(tell_rounding=own_control)
    if name != "auto":
        return getattr(diffrax, name)()
    return Automatic() if own_control and symmetric else diffrax.Tsit5()


def solve_lane(
    problem: Problem,
    adapters: Adapters,
    directions: tuple[Direction, ...],
    t1: Array,
    times: Array,
    how: Integrator,
) -> Trajectory:
    """One lane, unchecked and not compiled: the part of `solve` that is written once and batched from outside."""
    return look_back(
        problem, adapters, directions, times, how, step_lane(problem, adapters, directions, t1, times, how)
    )


def step_lane(
    problem: Problem, adapters: Adapters, directions: tuple[Direction, ...], t1: Array, times: Array, how: Integrator
) -> Steps:
    """The first half of `solve_lane`: all of its steps."""
    adapters = _projected(how, adapters)
    state, unflatten = ravel_pytree(adapters)  # one array: the solver's sums are then one operation each
    look = _looks(problem, directions, unflatten)
    solver = how.solver
    if isinstance(solver, Automatic | RungeKuttaChebyshev):  # whose steps take long to trace
        solver = TracedOnce(solver)

    def keep(state: Array) -> Any:
        return state if _looks_later(state, how) else look(state)

    def run(begin: Array, state: Array, on: Array | None = None, event: diffrax.Event | None = None) -> Any:
        field = velocity(problem, how.flow, on)
        ts = times if event is None else jnp.maximum(times, begin)
        along = diffrax.SubSaveAt(ts=ts, fn=lambda t, state, args: keep(state))
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, state, args: ravel_pytree(field(unflatten(state)))[0]),
            solver,
            t0=begin,
            t1=t1,
            dt0=how.dt0,
            y0=state,
            stepsize_controller=controller,
            saveat=diffrax.SaveAt(subs=[along, diffrax.SubSaveAt(t1=True)]),
            adjoint=adjoint_of(how.derivatives),
            max_steps=how.max_steps,
            throw=False,
            event=event,
        )

    with jax.default_matmul_precision("highest"):  # accelerators round products in single precision to less
        controller = _controller(problem, adapters, directions, unflatten, how, times)
        if how.layers is None:
            return Steps.of(run(jnp.zeros_like(t1), state))
        kept = jax.eval_shape(keep, state)
        return in_phases(how.flow, how.layers, state, unflatten, t1, times, run, kept)


def look_back(
    problem: Problem, adapters: Adapters, directions: tuple[Direction, ...], times: Array, how: Integrator, steps: Steps
) -> Trajectory:
    """The second half of `solve_lane`: the observables of what its steps have saved."""
    adapters = _projected(how, adapters)
    state, unflatten = ravel_pytree(adapters)
    look, afterwards = _looks(problem, directions, unflatten), _looks_later(state, how)
    with jax.default_matmul_precision("highest"):
        start = state if afterwards else look(state)
        saved = where(times > 0, steps.saved, start)  # which is not saved where the first step is never made
        reached = finite(saved)
        seen = prepend(start, where(reached, saved, 0.0))
        loss, measurements, own = jax.vmap(look)(seen) if afterwards else seen
        floor = rounding_floor(problem, adapters)
    named = observed(loss, measurements, own, reached, conserved_by(problem, how.flow))
    latched = latch_observables(how.flow, times, steps.until)
    named |= {name: jnp.where(reached, values, jnp.nan) for name, values in latched.items()}
    came = jnp.all(reached) & jnp.all(jnp.isfinite(steps.final))
    status = jnp.where(steps.ok & came, 0, jnp.where(steps.stopped & jnp.all(jnp.isfinite(steps.final)), 1, 2))
    history = jax.vmap(unflatten)(where(reached, saved, jnp.nan)) if how.save_adapters else None
    return Trajectory(times, named, loss[0], floor, unflatten(steps.final), status, steps.stats, history)


def _projected(how: Integrator, adapters: Adapters) -> Adapters:
    """The start of the flow, which both halves make from the adapters given."""
    with jax.default_matmul_precision("highest"):
        return tuple(map(how.flow.project, adapters))


def _looks_later(state: Array, how: Integrator) -> bool:
    """Whether states are saved and looked at together, far cheaper than one after another: where there is room."""
    return how.save_adapters or state.size <= KEPT_STATE


def _looks(
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


def velocity(problem: Problem, flow: Flow, on: Bool[Array, " layer"] | None = None) -> Callable[[Adapters], Adapters]:
    """The right-hand side: the flow applied to the problem's negative gradient, its latch where it is `on`."""
    field, latch = vector_field(problem), () if on is None else (on,)
    return lambda adapters: flow(field(adapters), adapters, *latch)


@compiled()
def _solve(
    problem: Problem,
    adapters: Adapters,
    t1: Array,
    times: Array,
    how: Integrator,
) -> Trajectory:
    directions = jax.lax.stop_gradient(principal_directions(problem))
    return solve_lane(problem, adapters, directions, t1, times, how)


def _controller(
    problem: Problem,
    start_adapters: Adapters,
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

    relative_residual = _relative_residual(pretrained, seen, seen(ravel_pytree(start_adapters)[0]))
    controller = ResidualController(
        how.rtol,
        relative_residual=relative_residual,
        growth_bound=_growth_bound(pretrained, directions, seen, relative_residual),
        factors=unflatten,
        origin=jax.lax.stop_gradient(tuple(map(_origin, start_adapters))),
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
    problem, directions = jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf, (problem, directions)
    )
    bound = problem.growth_bound()
    if bound is not None:
        return lambda state: bound(unflatten(state))
    seeds = tuple(Adapter(one.right[None], jnp.zeros((one.left.size, 1))) for one in directions)
    fastest = jnp.max(jnp.stack([norm(change.b) for change in problem.field(seeds)]))
    return lambda state: fastest * relative_residual(state)


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

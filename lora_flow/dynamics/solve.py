"""The gradient flow: a problem and adapters in, a trajectory out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, Int

from lora_flow.adapter import Adapters, as_start
from lora_flow.checks import as_real, concrete, kind, require, require_choice, require_increasing, require_number
from lora_flow.dynamics.flows import Flow, as_flow
from lora_flow.dynamics.integrator import MAX_STEPS, RTOL, Integrator, integrator
from lora_flow.dynamics.looks import conserved_by, finite, looks, looks_later, observed, prepend, where
from lora_flow.dynamics.measurements import Direction, principal_directions
from lora_flow.dynamics.phases import Steps, latch_observables
from lora_flow.dynamics.steps import projected, step_lane
from lora_flow.problems.base import Problem
from lora_flow.problems.rounding import rounding_floor
from lora_flow.problems.stale import check_problem
from lora_flow.runtime.compiling import compiled
from lora_flow.runtime.memory import require_memory
from lora_flow.solvers.derivatives import guard_inputs, guard_outputs

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
    - `derivatives`: those that exist. "reverse" is for `grad` and `jacrev`, and for forward mode over them: `hessian`,
      and the `jvp` of a `grad`. "forward" is for `jvp` and `jacfwd`, any number of times. "both" is for all of them and
      `grad` of `grad`, and takes long to compile. Others are refused by name. For gradients right to 1e-3 pass
      `rtol=2e-4`, and `rtol=5e-6` with RKC.
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
    inputs = (problem, adapters, jnp.asarray(t1, float), times, how)
    inputs = guard_inputs(how.derivatives, inputs, once=not how.replayed)
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


def look_back(
    problem: Problem, adapters: Adapters, directions: tuple[Direction, ...], times: Array, how: Integrator, steps: Steps
) -> Trajectory:
    """The second half of `solve_lane`: the observables of what its steps have saved."""
    adapters = projected(how, adapters)
    state, unflatten = ravel_pytree(adapters)
    look, afterwards = looks(problem, directions, unflatten), looks_later(state, how)
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

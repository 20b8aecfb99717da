"""Gradient descent beside the flow: a problem, adapters and a step in, a trajectory out."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int

from lora_flow.adapter import Adapter, Adapters, as_start
from lora_flow.algebra.spectra import norm
from lora_flow.checks import (
    InputError,
    as_real,
    kind,
    one_line,
    require,
    require_choice,
    require_flag,
    require_increasing,
    require_integer,
    require_number,
)
from lora_flow.dynamics.flows import Flow, Plain, as_flow
from lora_flow.dynamics.looks import conserved_by, finite, observed, prepend, where
from lora_flow.dynamics.measurements import Direction, measure, principal_directions
from lora_flow.dynamics.solve import STATUS, Trajectory
from lora_flow.dynamics.steps import velocity
from lora_flow.fields import take_new_fields
from lora_flow.problems.base import Problem, as_problem, kind_of, own_observables
from lora_flow.problems.rounding import rounding_floor
from lora_flow.problems.stale import check_problem
from lora_flow.runtime.compiling import compiled
from lora_flow.solvers.counted import counted
from lora_flow.solvers.derivatives import LoopKind, guard_inputs, guard_outputs, loop_kind, require_derivatives

Schedule = Callable[[Int[Array, ""]], Any]  # from the iteration to a step size, as optax has them
ORDERS = ("simultaneous", "A first", "B first")


class StepRule(eqx.Module):
    """A step size for every iteration.

    - `init(problem, adapters)`: the rule's state, made from the start; None by default.
    - `size(state, problem, adapters, iteration)`: the step from these adapters, a scalar; iterations count from 0.
    - `check(problem, flow, order)`: raises `InputError` where the rule is not meant for these.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        take_new_fields(cls)

    @abc.abstractmethod
    def size(self, state: Any, problem: Any, adapters: Adapters, iteration: Int[Array, ""]) -> Float[Array, ""]: ...

    def init(self, problem: Any, adapters: Adapters) -> Any:
        return None

    def check(self, problem: Problem, flow: Flow, order: str) -> None:
        pass


class MuKlabjan(StepRule):
    r"""The step size of Mu and Klabjan 2025 (arXiv 2512.18248, equation 3.4), with which gradient descent converges:

        eta_t = min{1/(4 sqrt(2) L (||V_t||_F^2 + ||grad l(B_t A_t)||_F)), 1},   V = [B; A^T],

    for a loss l of `B A` whose gradient is L-Lipschitz. Then `J(V_{t+1}) <= J(V_t) - eta_t/4 ||grad J(V_t)||_F^2`. The
    rule needs the gradient itself, of both factors at once: the plain flow and the order "simultaneous".

    **Arguments:** `smoothness`, L; by default the problem's own, which `SingleLayer`, a linear `Regression` and
    `SoftmaxRegression` know.
    """

    smoothness: Float[Array, ""] | None

    def __init__(self, smoothness: float | Array | None = None):
        if smoothness is not None:
            require_number("smoothness", smoothness, "be a positive number", lambda known: known > 0)
        self.smoothness = None if smoothness is None else jnp.asarray(smoothness, float)

    def check(self, problem: Problem, flow: Flow, order: str) -> None:
        must = "adapt one layer (SingleLayer, Regression or SoftmaxRegression) for the step rule MuKlabjan"
        asked = as_problem(problem)
        require(len(asked.layers) == 1 and asked.of_products, "problem", must, kind_of(problem))
        known = self.smoothness is not None or jax.eval_shape(asked.smoothness) is not None
        require(known, "smoothness", "be given for a problem that does not know its own", self.smoothness)
        check_plain(self, flow, order)

    def size(self, state: Any, problem: Any, adapters: Adapters, iteration: Int[Array, ""]) -> Float[Array, ""]:
        asked = as_problem(problem)
        smoothness: Any = asked.smoothness() if self.smoothness is None else self.smoothness
        squared_norm = sum(norm(leaf) ** 2 for leaf in jax.tree.leaves(adapters))
        slope = norm(asked.product_descent(adapters))
        return 1 / jnp.maximum(4 * jnp.sqrt(2.0) * smoothness * (squared_norm + slope), 1.0)


def check_plain(rule: StepRule, flow: Flow, order: str) -> None:
    """Raises unless the rule gets what its proof assumes: the gradient itself, of both factors at once."""
    name = type(rule).__name__
    require(type(flow) is Plain, "flow", f"be 'plain' for the step rule {name}", f"'{flow}'")
    require(order == "simultaneous", "order", f"be 'simultaneous' for the step rule {name}", f"'{order}'")


class Descent(Trajectory):
    """The result of `descend`: a `Trajectory` over `iterations`, `(time,)`.

    `times` are the sums of the step sizes so far, which correspond to gradient-flow time; an optimiser of optax has no
    such times, and `times` are then the iterations. The observable "step_size" is the step of the next iteration.
    """

    iterations: Int[Array, " time"] = eqx.field(kw_only=True)

    def __str__(self) -> str:
        if self.times.ndim > 1:
            return super().__str__()
        last = float(self.observables["loss"][-1])
        reached = "at rounding" if last < float(self.rounding_floor) else f"{last:.4g}"
        by_optax = np.isnan(self.observables["step_size"]).all()  # whose iterations have no times
        return (
            f"Descent of {int(self.iterations[-1])} iterations{'' if by_optax else f' to t = {self.times[-1]:g}'}: "
            f"{STATUS[int(self.status)]}, rank {self.adapters[0].rank}; "
            f"loss {float(self.initial_loss):.4g} -> {reached}"
        )


def descend(
    problem: Problem,
    adapters: Adapters,
    *,
    steps: int,
    step: float | Array | Schedule | StepRule | optax.GradientTransformation | optax.MultiSteps,
    saves: int | ArrayLike | Sequence[int] = 101,
    order: str = "simultaneous",
    flow: Flow | str = "plain",
    derivatives: str = "reverse",
    save_adapters: bool = False,
) -> Descent:
    r"""Trains the adapters by gradient descent, `A_i <- A_i - eta dL/dA_i` and `B_i <- B_i - eta dL/dB_i`.

    The result can be differentiated with respect to the adapters, the problem's arrays and a constant step size, in
    the modes that `derivatives` names, but not in reverse through the loop of a line search. `descend` works under
    `jit` and `vmap`.

    **Arguments:**

    - `problem`, `adapters`, `flow`, `derivatives`, `save_adapters`: as for `solve`; `flow="scaled:1e-3"` is ScaledGD
      with damping.
    - `steps`: the number of iterations.
    - `step`: a constant step size eta; or a schedule, a function from the iteration, counted from 0, to a step size; or
      a `StepRule`, `MuKlabjan()` for instance; or an optimiser of optax. The flow acts on the gradient before the
      optimiser does, and B's updates are multiplied by LoRA+'s ratio after it (`Flow.before`, `Flow.rates`). With the
      plain flow the optimiser also gets `value`, `grad` and `value_fn`, which line searches need. A program is compiled
      for each schedule and optimiser object, so make the object once.
    - `saves`: a number of iterations, equally spaced, 0 and the last included, or the iterations themselves.
    - `order`: "simultaneous"; "A first", where the gradient of B is taken at the new A; or "B first". An optimiser of
      optax then becomes two, one for the A of all layers and one for the B of all layers.

    **Returns:** a `Descent` over the saved iterations.

    **Raises:** `InputError` for bad arguments. A run that diverges has status 2, and NaN in all later observables.
    """
    check_problem(problem)
    require_integer("steps", steps, "be at least 1", 1)
    require_choice("order", order, ORDERS)
    require_flag("save_adapters", save_adapters)
    require_derivatives(derivatives)
    adapters = as_start("adapters", adapters, problem.layers)
    iterations = save_iterations(int(steps), saves)
    driven = as_flow(flow)
    driven.check_start(adapters)
    step = _as_step(step)
    if isinstance(step, StepRule):
        step.check(problem, driven, order)
    if _is_optax(step):
        driven.check_optimiser()
    stops = (*iterations.tolist(), int(steps))
    inputs = guard_inputs(derivatives, (problem, adapters, step, driven))
    return guard_outputs(derivatives, _descend(*inputs, order, stops, loop_kind(derivatives), save_adapters))


def _as_step(step: Any) -> Any:
    """A rule, a schedule or an optimiser as it is, and a number as an array."""
    must = "be a positive number, a schedule, a StepRule or an optimiser of optax"
    if isinstance(step, optax.MultiSteps):
        return step.gradient_transformation()
    if isinstance(step, StepRule) or _is_optax(step):
        return step
    if callable(step) and not isinstance(step, type):
        try:
            size = jax.eval_shape(step, jax.ShapeDtypeStruct((), jnp.int32))
            known = size.shape == () and jnp.issubdtype(size.dtype, jnp.floating)
        except Exception:  # whatever it does with a number
            known = False
        require(known, "step", f"{must}: a schedule makes one number of an iteration", kind(step))
        return step
    require_number("step", step, must, lambda known: known > 0)
    return jnp.asarray(step, float)


def save_iterations(steps: int, saves: int | ArrayLike | Sequence[int]) -> np.ndarray:
    """The iterations at which observables are saved, as `descend` takes them, `(time,)`.

    A number means that many, 0 and the last included, equally spaced up to rounding, and no iteration twice.

    **Raises:** `InputError` for iterations that do not increase or lie outside the run.
    """
    if isinstance(saves, (int, np.integer)) and not isinstance(saves, bool):
        require(saves >= 2, "saves", "be at least 2, or an array of iterations", saves)
        return np.unique(np.round(np.linspace(0, steps, int(saves))).astype(int))
    known = as_real(saves)
    listed = known is not None and known.ndim == 1 and known.size >= 2
    whole = listed and np.issubdtype(np.asarray(saves).dtype, np.integer)
    require(whole, "saves", "be a whole number, or an array of at least two iterations", kind(saves))
    iterations = np.asarray(saves).astype(int)
    require_increasing("saves", iterations, steps, "steps")
    return iterations


class _State(NamedTuple):
    adapters: Adapters
    iteration: Array
    time: Array
    memory: Any  # of optax's optimisers, one for each group of factors that moves together


@compiled()
def _descend(
    problem: Problem,
    adapters: Adapters,
    step: Any,
    flow: Flow,
    order: str,
    stops: tuple[int, ...],
    loop: LoopKind,
    keep: bool,
) -> Descent:
    with jax.default_matmul_precision("highest"):
        directions = jax.lax.stop_gradient(principal_directions(problem))
    return descend_lane(problem, adapters, directions, step, flow, order, stops, loop, keep)


def descend_lane(
    problem: Problem,
    adapters: Adapters,
    directions: tuple[Direction, ...],
    step: Any,
    flow: Flow,
    order: str,
    stops: tuple[int, ...],
    loop: LoopKind,
    keep: bool,
) -> Descent:
    """One lane, unchecked and not compiled: the part of `descend` that is written once and batched from outside.

    `stops` are the iterations to save, and the last one.
    """
    groups = {"simultaneous": (("a", "b"),), "A first": (("a",), ("b",)), "B first": (("b",), ("a",))}[order]
    with jax.default_matmul_precision("highest"):
        sized = _sizes(step, problem, adapters)
    advance = _stepper(problem, flow, step, sized, groups)
    memory = [jax.tree.map(jnp.asarray, step.init(_select(adapters, group))) for group in groups if _is_optax(step)]
    gaps = np.diff([0, *stops])

    most = max(1, int(gaps.max()))

    def until_next(state: _State, gap: Array) -> tuple[_State, tuple[Adapters, Array, Array]]:
        if loop == "checkpointed":
            state = counted(lambda _, state: advance(state), state, gap, most)
        else:
            _, state = eqxi.while_loop(
                lambda carry: carry[0] < gap,
                lambda carry: (carry[0] + 1, advance(carry[1])),
                (jnp.zeros_like(gap), state),
                max_steps=most,
                kind=loop,
            )
        return state, (state.adapters, state.iteration, state.time)

    def look(adapters: Adapters, iteration: Array) -> Any:
        size = jnp.asarray(jnp.nan) if _is_optax(step) else sized(adapters, iteration)
        return problem.loss(adapters), measure(adapters, directions), own_observables(problem, adapters), size

    with jax.default_matmul_precision("highest"):
        begin = _State(adapters, jnp.zeros((), int), jnp.zeros(()), memory)
        last, seen = jax.lax.scan(until_next, begin, jnp.asarray(gaps))
        came = finite(seen[0])
        reached, (saved, iterations, times) = jax.tree.map(lambda leaf: leaf[:-1], (came, seen))
        looked_at = prepend((adapters, begin.iteration), (where(reached, saved, 0.0), iterations))
        loss, measurements, own, sizes = jax.vmap(look)(*looked_at)
        floor = rounding_floor(problem, adapters)
        came, reached = jnp.isfinite(problem.loss(last.adapters)) & jnp.all(came), reached & jnp.isfinite(loss[1:])
    return Descent(
        times=times,
        observables={
            **observed(loss, measurements, own, reached, conserved_by(problem, flow)),
            "step_size": jnp.where(reached, sizes[1:], jnp.nan),
        },
        initial_loss=loss[0],
        rounding_floor=floor,
        adapters=last.adapters,
        status=jnp.where(came & jnp.all(reached), 0, 2),
        stats={"num_steps": jnp.asarray(stops[-1])},
        history=where(reached, saved, jnp.nan) if keep else None,
        iterations=iterations,
    )


Group = tuple[str, ...]  # the factors that move together


def _stepper(
    problem: Problem, flow: Flow, step: Any, sized: Callable[..., Array], groups: tuple[Group, ...]
) -> Callable[[_State], _State]:
    by_optax, plain = _is_optax(step), isinstance(flow, Plain)
    descent = velocity(problem, flow.before if by_optax else flow)

    def advance(state: _State) -> _State:
        adapters, iteration, time, memory = state
        size = sized(adapters, iteration)
        remembered = []
        for i, group in enumerate(groups):
            factors, change = _select(adapters, group), _select(descent(adapters), group)
            if by_optax:
                loss = functools.partial(_loss_of, problem, adapters, group) if plain else None
                change, memory_after = _update(step, change, memory[i], factors, loss)
                rates = _select((flow.rates,) * len(adapters), group)
                change = jax.tree.map(jnp.multiply, rates, change)
                remembered.append(memory_after)
            adapters = _replaced(adapters, group, jax.tree.map(lambda x, dx: x + size * dx, factors, change))
        adapters = tuple(map(flow.project, adapters))
        return _State(adapters, iteration + 1, time + size, remembered)

    return advance


def _replaced(adapters: Adapters, group: Group, factors: Any) -> Adapters:
    return tuple(
        adapter._replace(**dict(zip(group, new, strict=True))) for adapter, new in zip(adapters, factors, strict=True)
    )


def _loss_of(problem: Problem, adapters: Adapters, group: Group, factors: Any, **ignored: Any) -> Array:
    """The loss as a function of the factors that move."""
    return problem.loss(_replaced(adapters, group, factors))


def _update(
    optimizer: optax.GradientTransformation, change: Any, memory: Any, factors: Any, loss: Callable[..., Array] | None
) -> tuple[Any, Any]:
    """The optimiser's updates and its state after; `loss` only where the change is minus its gradient."""
    gradient = jax.tree.map(jnp.negative, change)
    known = {} if loss is None else {"value": loss(factors), "grad": gradient, "value_fn": loss}
    try:
        updates, after = optax.with_extra_args_support(optimizer).update(gradient, memory, factors, **known)
    except InputError:
        raise
    except (TypeError, AttributeError, ValueError) as error:
        told = (
            " of its group, without a loss, which is the plain flow's"
            if loss is None
            else " of its group, and the loss"
        )
        must = f"step must be an optimiser that is content with the gradient and the factors{told}"
        raise InputError(f"{must}, got one that fails with: {one_line(str(error).partition(chr(10))[0])}") from error
    return updates, jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), after, memory)


def _select(adapters: Adapters, group: Group) -> tuple[tuple[Array, ...], ...]:
    """The factors that move together; both factors as adapters, which flows in a chain of optax take."""
    if group == Adapter._fields:
        return adapters
    return tuple(tuple(getattr(adapter, factor) for factor in group) for adapter in adapters)


def _sizes(step: Any, problem: Problem, start: Adapters) -> Callable[[Adapters, Array], Array]:
    """The step size from the adapters and the iteration; 1 for optimisers of optax, which set their own."""
    if isinstance(step, StepRule):
        state = step.init(problem, start)
        return lambda adapters, iteration: step.size(state, problem, adapters, iteration)
    if callable(step):
        return lambda adapters, iteration: jnp.asarray(step(iteration.astype(jnp.int32)), float)  # as optax counts
    return lambda adapters, iteration: jnp.ones(()) if _is_optax(step) else step


def _is_optax(step: Any) -> bool:
    return isinstance(step, optax.GradientTransformation)

"""What is minimised: a quantity of a run, at a time or as a time, over one problem or over a family of tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapters
from lora_flow.checks import require, require_choice, require_number
from lora_flow.dynamics.flows import Flow, as_flow
from lora_flow.dynamics.integrator import SOLVERS
from lora_flow.dynamics.solve import save_times
from lora_flow.sensitivities.lanes import Method
from lora_flow.sensitivities.quantities import Setting, quantities

OVER: dict[str, Callable[[Array], Array]] = {"mean": jnp.mean, "worst": jnp.max}
LOOKED_AT = 101  # times in each of two spacings, between which a time is found by interpolation


@dataclasses.dataclass(frozen=True)
class Objective:
    """One number of a start, to be made small: of one problem, or over stacked ones the mean or worst.

    A quantity at a time is that of `sensitivity`. A time is found where its quantity first crosses 0 between saved
    times, linearly, and is infinite where it does not: the derivative is that of the crossing.
    """

    method: Method
    times: tuple[float, ...]  # 0 first
    over: str
    several: bool

    def __call__(self, problem: Any, start: Adapters) -> Float[Array, ""]:
        if not self.several:
            return self._of_one(problem, start)
        each = eqx.filter_vmap(self._of_one, in_axes=(eqx.if_array(0), None))(problem, start)
        return OVER[self.over](each)

    def first_of(self, problem: Any) -> Any:
        """The first of the problems, which starts are made along."""
        return jax.tree.map(lambda leaf: leaf[0] if eqx.is_array(leaf) else leaf, problem) if self.several else problem

    def _of_one(self, problem: Any, start: Adapters) -> Float[Array, ""]:
        times = jnp.asarray(self.times)
        run = self.method.solve(problem, start, times, "reverse")
        (quantity,), history = self.method.quantities, run.history
        assert history is not None  # as the method asks for it

        def value(state: Adapters) -> Array:
            return quantity.value(self.method.setting, problem, state)

        if quantity.is_time:
            found = first_zero(times, jax.vmap(value)(history))
        else:
            found = value(jax.tree.map(lambda leaf: leaf[-1], history))
        return jnp.where(run.status == 0, found, jnp.nan)


def first_zero(times: Float[Array, " time"], values: Float[Array, " time"]) -> Float[Array, ""]:
    """Where values that begin below 0 first come to 0, linear between times; infinite where they do not."""
    above = values >= 0
    behind = jnp.maximum(jnp.argmax(above), 1)
    low, high = values[behind - 1], values[behind]
    rises = jnp.any(above) & (high > low)
    share = jnp.where(rises & (low < 0), -low / jnp.where(rises, high - low, 1.0), 0.0)
    found = times[behind - 1] + share * (times[behind] - times[behind - 1])
    return jnp.where(jnp.any(above), found, jnp.inf)


def as_objective(
    name: Any,
    members: Sequence[Any],
    *,
    at: Any,
    t1: Any,
    over: Any,
    flow: Flow | str,
    solver: Any,
    rtol: Any,
    max_steps: int,
    several: bool,
) -> Objective:
    """The objective of these arguments of `optimise`, checked.

    **Raises:** `InputError` for an argument that is none, the nearest name suggested.
    """
    require_number("t1", t1, "be positive and finite", lambda end: end > 0)
    taken = t1 if at is None else at
    require_number("at", taken, f"be a time after 0 and up to t1 = {t1:g}", lambda time: 0 < time <= t1)
    require_number("rtol", rtol, "lie between 0 and 1", lambda tolerance: 0 < tolerance < 1)
    require_choice("over", over, OVER)
    require_choice("solver", solver, SOLVERS)
    require(isinstance(name, str), "objective", "be a name", type(name).__name__)
    found = quantities((name,), members[0], what="objective")
    setting = Setting.of(members[0])
    alike = name == "log10 loss" or found[0].level is not None or all(Setting.of(one) == setting for one in members)
    require(alike, "objective", "be a loss, or a time to one, for tasks that differ in what they align with", name)
    method = Method(setting, found, as_flow(flow), solver, float(rtol), max_steps)
    return Objective(method, _times(float(taken), float(t1), found[0].is_time), over, several)


def _times(at: float, t1: float, is_time: bool) -> tuple[float, ...]:
    if not is_time:
        return 0.0, at
    both = [np.asarray(save_times(t1, LOOKED_AT, spacing)) for spacing in ("log", "linear")]
    return tuple(np.unique(np.concatenate(both)).tolist())

"""What a sensitivity is of: values at a time, and times at which a value is reached."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapters
from lora_flow.algebra.spectra import norm, positive
from lora_flow.checks import require, require_choice
from lora_flow.dynamics.measurements import Direction, measure, principal_directions
from lora_flow.dynamics.observables import observables
from lora_flow.initialization.directions import triplets
from lora_flow.problems.base import as_problem, kind_of
from lora_flow.problems.factorization import Factorization
from lora_flow.theory.gradient_flow import Gains, t1_threshold

NAMES = ("log10 loss", "log10 alignment_error", "t_align", "t1")
TIME_TO = "time to "
NEAR = 1e-9  # relative: of gains that are nearer to each other none is the larger

Value = Callable[["Setting", Any, Adapters], Float[Array, ""]]


class Setting(NamedTuple):
    """What is known of a problem and does not move with it.

    - `ties`: for each layer the number of singular pairs of its task that tie for the largest value; 0 for none.
    - `leading`: the index of the layer that aligns first.
    - `pair`: the index of the shift's singular pair that is learned first, where the problem is a `Factorization`.
    """

    ties: tuple[int, ...]
    leading: int
    pair: int

    @classmethod
    def of(cls, problem: Any) -> Setting:
        directions = principal_directions(problem)
        ties = tuple(int(np.sum(np.any(np.asarray(one.pairs[0]) != 0, axis=1))) for one in directions)
        if not isinstance(problem, Factorization):
            return cls(ties, 0, 0)
        sigma, s1, s2 = problem.gains()
        pair = int(np.argmax(sigma * np.maximum(s1, s2)))
        return cls(ties, int(s1[pair] > (1 + NEAR) * s2[pair]), pair)


@dataclasses.dataclass(frozen=True)
class Quantity:
    """One quantity of a run.

    `value(setting, problem, adapters)` is the quantity at a time, or of a quantity that is a time the natural logarithm
    of what is to be reached over its threshold: negative before this time, 0 at this time.
    """

    name: str
    value: Value
    is_time: bool = False
    level: float | None = None  # of the loss, where the time at which it is reached is asked for


def quantities(names: Sequence[str], problem: Any, what: str = "observable") -> tuple[Quantity, ...]:
    """The quantities of these names, given as the argument `what`.

    **Raises:** `InputError` for a name that is none, and for one that the problem does not define.
    """
    found = tuple(_quantity(name, what) for name in names)
    require(len(found) > 0, what, "hold at least one name", "none")
    require(len({one.name for one in found}) == len(found), what, "name each quantity once", list(names))
    of_one = any(one.name == "t1" for one in found) and not isinstance(problem, Factorization)
    require(not of_one, what, "be another than t1, which a Factorization has", kind_of(problem))
    return found


def _quantity(name: str, what: str) -> Quantity:
    if name.startswith(TIME_TO):
        return _time_to(name, _level(name, what))
    require_choice(what, name, NAMES, "or 'time to LEVEL', a loss")
    return _NAMED[name]


@functools.cache  # for what is compiled is kept by the function
def _time_to(name: str, level: float) -> Quantity:
    return Quantity(name, lambda _, problem, adapters: -jnp.log(_loss(problem, adapters) / level), True, level)


def _level(name: str, what: str) -> float:
    try:
        level = float(name.removeprefix(TIME_TO))
    except ValueError:
        level = np.nan
    require(0 < level < np.inf, what, f"name a positive loss after '{TIME_TO}'", repr(name))
    return level


def _log10_loss(_: Setting, problem: Any, adapters: Adapters) -> Float[Array, ""]:
    return jnp.log10(_loss(problem, adapters))


def _loss(problem: Any, adapters: Adapters) -> Float[Array, ""]:
    return positive(problem.loss(adapters))


def _log10_alignment_error(setting: Setting, problem: Any, adapters: Adapters) -> Float[Array, ""]:
    return jnp.log10(_observed(setting, problem, adapters)["alignment_error"])


def _alignment(setting: Setting, problem: Any, adapters: Adapters) -> Float[Array, ""]:
    """||gamma^T Z|| over the norm of the rest of Z, as `phases` has its `t_align`."""
    observed = _observed(setting, problem, adapters)
    return jnp.log(observed["norm_along1"]) - jnp.log(observed["norm_across1"])


def _growth(setting: Setting, problem: Any, adapters: Adapters) -> Float[Array, ""]:
    """The overlap over the threshold of the paper's T1, as `phases` has its `t1`."""
    left, sigma, right = (one[setting.pair] for one in _transposed(triplets(problem.shift, setting.pair + 1)))
    s1, s2 = norm(problem.w1 @ right), norm(problem.w2.T @ left)
    smaller, larger = (s2, s1) if setting.leading else (s1, s2)
    overlap = _observed(setting, problem, adapters)["overlap_1"]
    return jnp.log(positive(overlap)) - jnp.log(t1_threshold(Gains(sigma, smaller, larger)))


def _transposed(found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    left, sigma, right = found
    return left.T, sigma, right


def _observed(setting: Setting, problem: Any, adapters: Adapters) -> dict[str, Array]:
    """The observables of the layer that aligns first, beside a direction that moves with the problem."""
    index = setting.leading
    task, count = as_problem(problem).linearised_task()[index], setting.ties[index]
    if count == 0:
        left, right = (jnp.zeros((1, size)) for size in task.shape)
    else:
        left, _, right = _transposed(triplets(task, count))
    direction = Direction(left[0], right[0], (left[1:], right[1:]))
    measured = jax.tree.map(lambda leaf: leaf[None], measure(adapters[index : index + 1], (direction,)))
    return {name: values[0] for name, values in observables(measured).items()}


_NAMED = {
    one.name: one
    for one in (
        Quantity("log10 loss", _log10_loss),
        Quantity("log10 alignment_error", _log10_alignment_error),
        Quantity("t_align", _alignment, is_time=True),
        Quantity("t1", _growth, is_time=True),
    )
}

"""The base of flows: a velocity from the negative gradient, what else a solver asks of a flow, and gradient flow."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lora_flow.adapter import Adapter, Adapters
from lora_flow.checks import InputError, concrete, kind, require, require_number
from lora_flow.fields import take_new_fields


class Flow(eqx.Module):
    """One layer's velocity from its negative gradient; called with the updates and the adapters of all layers."""

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        take_new_fields(cls)

    @property
    def conserves(self) -> Float[Array, ""]:
        """w such that the flow conserves `w A A^T - B^T B` of every layer; NaN where no such w exists."""
        return jnp.asarray(jnp.nan)

    @property
    def rates(self) -> Adapter:
        """The factors that multiply an optimiser's learning rate for A and for B; 1 by default."""
        return Adapter(jnp.ones(()), jnp.ones(()))

    @property
    def before(self) -> Flow:
        """The flow that acts on the gradient before an optimiser does: everything but `rates`.

        An optimiser that normalises, as Adam does, undoes any rescaling of a factor, so rescaling must come after.
        """
        return self

    def check_optimiser(self) -> None:
        """Raises where `before` followed by `rates` differs from the flow, for an optimiser linear in the gradient."""

    @abc.abstractmethod
    def velocity(self, descent: Adapter, adapter: Adapter) -> Adapter: ...

    def __str__(self) -> str:
        """As `parse_flow` takes it, where its numbers are known."""
        numbers = map(concrete, jax.tree.leaves(self))
        return ":".join([self.name, *("traced" if one is None else str(one[()]).removesuffix(".0") for one in numbers)])

    @property
    def latched(self) -> bool:
        """Whether a part of the flow goes off in a layer as soon as the layer's `margin` is below 0, and stays off."""
        return False

    @property
    def off(self) -> Flow:
        """The flow of a layer in which the latched part is off."""
        return self

    def margin(self, adapter: Adapter, layer: tuple[int, int]) -> Float[Array, ""]:
        """At least 0 until the latched part goes off in a layer of shape `(out, in)`; always 1 without such a part."""
        return jnp.ones(())

    def __call__(self, updates: Adapters, adapters: Adapters, on: Bool[Array, " layer"] | None = None) -> Adapters:
        """The velocities of all layers; of a latched flow `on` says in which layers that part is on.

        **Raises:** `InputError` for a latched flow without `on`.
        """
        if not self.latched:
            return tuple(map(self.velocity, updates, adapters))
        if on is None:
            must = "have no latch, which only solve and sweep remember (for gradient descent take stable_lora)"
            raise InputError(f"flow must {must}, got {kind(self)}")  # whose numbers may be traced
        both = zip(on, map(self.velocity, updates, adapters), map(self.off.velocity, updates, adapters), strict=True)
        return tuple(jax.tree.map(functools.partial(jnp.where, one), *velocities) for one, *velocities in both)

    @property
    def always_defined(self) -> bool:
        """Whether `check_start` has nothing to say of any adapters."""
        return True

    @property
    def symmetric(self) -> bool:
        """Whether the Jacobian's spectrum is real, as that of a symmetric matrix: what stabilised methods are for."""
        return False

    def check_start(self, adapters: Adapters) -> None:
        """Raises where the flow is not defined at these adapters, and warns where a latched part is off at once."""

    def hint(self, rank: int, task_rank: int) -> str:
        """What to know before runs of this rank on a task of that rank are begun, "" for nothing."""
        return ""

    def project(self, adapter: Adapter) -> Adapter:
        """Onto the factors among which the flow stays: what `solve` makes of its start, and `descend` of each step."""
        return adapter

    def check_projected_start(self, adapters: Adapters) -> None:
        """Raises where the flow is not defined at what `project` makes of these adapters, or stands still there."""
        self.check_start(adapters)


class Plain(Flow):
    """Gradient flow: the negative gradient as it is. Conserves A A^T - B^T B."""

    name: ClassVar[str] = "plain"

    @property
    def conserves(self) -> Float[Array, ""]:
        return jnp.ones(())

    @property
    def symmetric(self) -> bool:
        return True

    def velocity(self, descent: Adapter, adapter: Adapter) -> Adapter:
        return descent


def check_rank(adapters: Adapters, damping: Any, factors: str = "AB") -> None:
    """Raises unless these factors of every layer have as many directions as Z = [B; A^T], above rounding."""
    known = concrete(damping)
    if known is None or known > 0 or not is_known(adapters):
        return
    for layer, (a, b) in enumerate(adapters, start=1):
        alive, rounding = directions(a, b)
        for name, factor in [one for one in (("A", a), ("B", b)) if one[0] in factors]:
            found = int(np.linalg.matrix_rank(np.asarray(factor), tol=rounding))
            must = f"be positive where a factor's rank is below {alive}, the number of directions"
            require(found == alive, "damping", must, f"0 with {name}_{layer} of rank {found}")


def is_known(adapters: Adapters) -> bool:
    """Whether JAX traces none of the factors."""
    return all(concrete(leaf) is not None for leaf in jax.tree.leaves(adapters))


def directions(a: Array | np.ndarray, b: Array | np.ndarray) -> tuple[int, float]:
    """The number of directions of Z = [B; A^T], and the size up to which singular values of a factor are rounding."""
    stacked = np.concatenate([np.asarray(b), np.asarray(a).T])
    rounding = 10 * len(stacked) * np.finfo(stacked.dtype).eps * np.linalg.norm(stacked, 2)
    return int(np.linalg.matrix_rank(stacked, tol=rounding)), float(rounding)


def positive(name: str, value: Any) -> Array:
    return _number(name, value, "be positive", lambda known: known > 0)


def not_negative(name: str, value: Any) -> Array:
    return _number(name, value, "be at least 0", lambda known: known >= 0)


def _number(name: str, value: Any, must: str, where: Callable[[np.ndarray], Any]) -> Array:
    require_number(name, value, must, where)
    return jnp.asarray(value, float)

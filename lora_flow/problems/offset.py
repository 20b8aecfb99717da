"""Offset frozen weights, with which a start with non-zero B A does not change the function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters, as_start
from lora_flow.algebra.diagonal import Matrix
from lora_flow.problems.base import AbstractProblem, Layers, Problem, as_problem, on_host, require_problem
from lora_flow.runtime.compiling import compiled


class Offset(AbstractProblem):
    r"""A problem with its weights frozen at `W_i - s B_i(0) A_i(0)`, so that its start leaves the function unchanged.

    PiSSA, MiLoRA, OLoRA, LoRA-GA and LoRAM start like this. Any problem computes the offset with `[B, -B(0)]` and
    `[A; A(0)]` side by side in place of B and A.

    The start stays beside the weights. To write `W_i - s B_i(0) A_i(0)` out would be as accurate: of `Factorization`s
    with weights 1, 100 and 10,000 times the shift and PiSSA's start, either loss is within 6e-4 of extended precision
    down to the rounding floor. But a problem with such weights does not know the pretrained ones, at which progress and
    rounding are measured: at 100 times the shift its runs took more than ten times as many steps as these.
    Canonical coordinates need no other weights either: a sweep offsets the problem in these coordinates.

    **Arguments:** the `problem`, and the `start` to subtract. `sweep` makes the offset by itself for the
    initialisations that need one.

    **Raises:** `InputError` for what is no problem, and for adapters that are not finite or not of its layers.
    """

    problem: Problem
    start: Adapters

    def __init__(self, problem: Problem, start: Adapters):
        require_problem(problem)
        self.problem, self.start = problem, as_start("start", start, problem.layers)

    @property
    def scaling(self) -> Array:
        return jnp.asarray(self._inner.scaling, float)

    @property
    def _inner(self) -> AbstractProblem:
        return as_problem(self.problem)

    @property
    def layers(self) -> Layers:
        return self.problem.layers

    def joined(self, adapters: Adapters) -> Adapters:
        """Adapters with which the original problem computes the same; with any leading axes."""

        def beside(now: Array | np.ndarray, then: Array | np.ndarray, axis: int) -> Array:
            return jnp.concatenate([now, jnp.broadcast_to(then, (*now.shape[:-2], *then.shape))], axis=axis)

        return tuple(
            Adapter(beside(now.a, then.a, -2), beside(now.b, -then.b, -1))
            for now, then in zip(adapters, self.start, strict=True)
        )

    def loss(self, adapters: Adapters) -> Array:
        return self.problem.loss(self.joined(adapters))

    def field(self, adapters: Adapters) -> Adapters:
        moving = self._inner.field(self.joined(adapters))
        return tuple(Adapter(v.a[: x.rank], v.b[:, : x.rank]) for v, x in zip(moving, adapters, strict=True))

    def observe(self, adapters: Adapters) -> dict[str, Array]:
        return self._inner.observe(self.joined(adapters))

    def linearised_task(self) -> tuple[Matrix, ...]:
        """The original problem's: at the start the function is the pretrained one."""
        return self._inner.linearised_task()

    def pretrained(self) -> tuple[AbstractProblem, Callable[[Adapters], Adapters]]:
        return self._inner, self.joined

    def rounding_floor(self, adapters: Adapters) -> Array:
        """The original problem's, from the start, whose product is subtracted from the weights and added again."""
        return self._inner.rounding_floor(self.start)

    def details(self, adapters: Adapters) -> dict[str, np.ndarray]:
        """The original problem's, of the joined adapters, with as many values as adapters of this rank have there."""
        like = self._inner.details(jax.tree.map(lambda leaf: leaf[:1], adapters))
        told = self._inner.details(on_host(_joined(self, adapters)))
        kept: dict[str, Any] = {name: (..., *map(slice, values.shape[1:])) for name, values in like.items()}
        return {name: values[kept[name]] for name, values in told.items()}

    def meanings(self) -> dict[str, str]:
        return self._inner.meanings()


@compiled()
def _joined(problem: Offset, adapters: Adapters) -> Adapters:
    return problem.joined(adapters)


def offset_where(shifted: Array | None, problem: Problem, start: Adapters) -> Problem:
    """`Offset` where `shifted` is true and the problem itself where it is not, in one program; None is never."""
    if shifted is None:
        return problem
    return as_problem(problem).offset(jax.tree.map(lambda leaf: jnp.where(shifted, leaf, 0.0), start))

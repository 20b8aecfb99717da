"""Stable-LoRA for gradient descent: an optimiser of optax that also shrinks the A of each layer until a rule is met."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from lora_flow.adapter import Adapter, Adapters
from lora_flow.checks import kind, require, require_instance, require_number
from lora_flow.dynamics.flows import excess_of_a


class StableLoRAState(NamedTuple):
    """The state of `stable_lora`: whether each layer's A still shrinks, and the state of the optimiser."""

    on: tuple[Bool[Array, ""], ...]
    inner: Any


def stable_lora(optimizer: optax.GradientTransformation, lam: float) -> optax.GradientTransformationExtraArgs:
    r"""An optimiser of optax with Stable-LoRA's decay of A (arXiv 2603.05204, by the authors' code), for `descend`.

    Before each update, and for each layer with B `(m, r)` and A `(r, n)`: once `||A||_F/n < ||B||_F/m` the decay is off
    for good; while it is on, A is multiplied by `1 - lam`. The gradient is taken before that, and the optimiser gets
    the A that is already shrunk. With gradient descent of step eta this becomes the flow `StableLoRA(lam/eta)` as
    eta goes to 0.

    **Arguments:**

    - `optimizer`: an optimiser of optax; its updates are those of tuples of `Adapter`, A and B together.
    - `lam`: the share of A that each step takes away, from 0 to below 1.

    **Returns:** a transformation, to be made once for each program, whose state is a `StableLoRAState`.

    **Raises:** `InputError` for bad arguments, and for parameters that are no adapters, as those of `descend` with an
    order other than "simultaneous".
    """
    must = "be an optimiser of optax, made, as optax.sgd(0.1)"
    require_instance("optimizer", optimizer, optax.GradientTransformation, must)
    require_number("lam", lam, "be at least 0 and below 1", lambda known: 0 <= known < 1)
    inner = optax.with_extra_args_support(optimizer)

    def init(adapters: Any) -> StableLoRAState:
        _check_adapters(adapters)
        return StableLoRAState(tuple(jnp.array(True) for _ in adapters), inner.init(adapters))

    def update(
        gradient: Any, state: StableLoRAState, adapters: Any = None, **more: Any
    ) -> tuple[Adapters, StableLoRAState]:
        _check_adapters(adapters)
        on = tuple(was & (_margin(adapter) >= 0) for was, adapter in zip(state.on, adapters, strict=True))
        shrunk = tuple(
            Adapter(jnp.where(still, (1 - lam) * a, a), b) for still, (a, b) in zip(on, adapters, strict=True)
        )
        updates, after = inner.update(gradient, state.inner, shrunk, **more)
        moved = tuple(
            Adapter(change.a + (new.a - old.a), change.b)
            for change, new, old in zip(updates, shrunk, adapters, strict=True)
        )
        return moved, StableLoRAState(on, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _margin(adapter: Adapter) -> Array:
    return excess_of_a(adapter, (adapter.b.shape[-2], adapter.a.shape[-1]))


def _check_adapters(parameters: Any) -> None:
    known = isinstance(parameters, tuple) and all(isinstance(one, Adapter) for one in parameters)
    must = "be Adapters, of A and B together (in descend: order='simultaneous')"
    require(known, "the parameters of stable_lora", must, kind(parameters))

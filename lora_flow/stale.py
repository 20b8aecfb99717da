"""Whether a program can be kept for a problem, and whether the problem is still what one was made from."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import zero_adapters
from lora_flow.checks import InputError, concrete, require
from lora_flow.problem import Problem, probe

PLAIN = (bool, int, float, complex, str, bytes)  # which are told apart by their value


def check_problem(problem: Problem) -> None:
    """Raises unless a compiled program can be kept for the problem, and is still of it.

    Arrays of a PyTree are inputs of its program. Any other object, a problem or a part of one, is a constant there,
    known by its hash: were its arrays changed, or did another object equal it, the numbers of before would come again.
    So what a small program says of the loss at two states is compared with the loss outside of all programs.
    """
    opaque = eqx.filter(problem, eqx.is_array, inverse=True)
    try:
        hash(tuple(jax.tree.leaves(opaque)))
    except TypeError:
        must = "be a PyTree, an equinox.Module for instance, or hashable, like a plain class or @dataclass(eq=False)"
        raise InputError(f"problem must {must}, got an unhashable {type(problem).__name__}") from None
    if all(isinstance(leaf, PLAIN) for leaf in jax.tree.leaves(opaque)):
        return
    try:
        with jax.ensure_compile_time_eval():
            before = concrete(_losses(problem))
            with jax.disable_jit():  # of the loss's own programs as well
                now = concrete(_told(problem))
    except Exception:  # what is traced, or cannot be without a program, is not known
        return
    if before is None or now is None:
        return
    close = np.sqrt(np.finfo(now.dtype).eps)
    changed = ~np.isclose(now, before, rtol=close, atol=0.0, equal_nan=True)
    got = f"a loss of {now[changed][0]:.6g} where it was {before[changed][0]:.6g}" if changed.any() else ""
    require(not changed.any(), "problem", "not change once it has been solved, nor equal another: make it anew", got)


def _told(problem: Any) -> Float[Array, 2]:
    """The loss at zero and at a state where nothing vanishes."""
    layers = problem.layers
    with jax.default_matmul_precision("highest"):
        return jnp.stack([problem.loss(state) for state in (zero_adapters(layers, 1), probe(layers, 1))])


_losses = eqx.filter_jit(_told)

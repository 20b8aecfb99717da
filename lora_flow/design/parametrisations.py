"""What is searched: free numbers, and the adapters that they stand for, which have a fixed norm whatever they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters
from lora_flow.checks import require_choice, require_instance
from lora_flow.initialization.of_norm import along_gradient
from lora_flow.problems.base import Problem


class Parametrisation(NamedTuple):
    """Free numbers of any value, and the adapters that they stand for; what calls it brings these to one norm.

    - `first(key, problem, rank)`: the numbers that a restart begins with, a PyTree of floating-point arrays.
    - `adapters(free, problem, rank)`: one `Adapter` a layer.
    - `numbers(free)`: by name what a scheme is made of, for `along_gradient`; None where adapters are learned.
    """

    name: str
    first: Callable[[Array, Problem, int], Any]
    adapters: Callable[[Any, Problem, int], Adapters]
    numbers: Callable[[Any], dict[str, Array]] | None = None


def _drawn(key: Array, problem: Problem, rank: int) -> Adapters:
    """Every entry of every factor N(0, 1): a direction that is uniform on the sphere."""
    keys = jax.random.split(key, (len(problem.layers), 2))
    return tuple(
        Adapter(jax.random.normal(of_a, (rank, n_in)), jax.random.normal(of_b, (n_out, rank)))
        for (of_a, of_b), (n_out, n_in) in zip(keys, problem.layers, strict=True)
    )


def _frames(free: Adapters, problem: Problem, rank: int) -> Adapters:
    """The nearest factors with orthonormal rows of A and columns of B, but for a rotation within the rank."""
    return tuple(Adapter(jnp.linalg.qr(a.T)[0].T, jnp.linalg.qr(b)[0]) for a, b in free)


def _numbers(key: Array, problem: Problem, rank: int) -> dict[str, Array]:
    of_mix, of_power, of_layers = jax.random.split(key, 3)
    return {
        "mix": jax.random.uniform(of_mix, maxval=jnp.pi / 2),
        "power": jax.random.uniform(of_power, maxval=2.0),
        "layers": jax.random.normal(of_layers, (len(problem.layers),)),
    }


PARAMETRISATIONS = {
    one.name: one
    for one in (
        Parametrisation("adapters", _drawn, lambda free, problem, rank: free),
        Parametrisation("frames", _drawn, _frames),
        Parametrisation(
            "scheme", _numbers, lambda free, problem, rank: along_gradient(problem, rank, **free), lambda free: free
        ),
    )
}


def as_parametrisation(given: Any) -> Parametrisation:
    """One of `PARAMETRISATIONS` by name, or one of your own."""
    if isinstance(given, str):
        require_choice("parameters", given, PARAMETRISATIONS)
        return PARAMETRISATIONS[given]
    require_instance("parameters", given, Parametrisation, "be a name or a Parametrisation")
    return given

"""What runs on the devices: drawing and solving many lanes in one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from lora_flow.adapter import Adapters, pad
from lora_flow.flow import Integrator, solve_lane
from lora_flow.initialization import initialize
from lora_flow.problem import Problem


@functools.cache
def round_solver(devices: tuple[Any, ...]) -> Callable[..., dict[str, Array]]:
    """A function that solves one batch on each device: each runs a loop of its own, none waits for another's steps."""
    mesh = Mesh(np.array(devices), ("lanes",))
    lanes, everywhere = PartitionSpec("lanes"), PartitionSpec()

    @eqx.filter_jit
    def solve_round(
        problem: Problem,
        start: Adapters,
        directions: tuple[Array, ...],
        t1: Array,
        times: Array,
        settings: Integrator,
        max_steps: int,
    ) -> dict[str, Array]:
        arrays, rest = eqx.partition((problem, directions, t1, times, settings), eqx.is_array)

        def solve_batch(arrays: Any, start: Adapters) -> dict[str, Array]:
            problem, directions, t1, times, settings = eqx.combine(arrays, rest)

            def lane(adapters: Adapters) -> dict[str, Array]:
                trajectory = solve_lane(
                    problem, adapters, directions, t1, times, settings, diffrax.ForwardMode(), max_steps
                )
                return trajectory.observables | {"status": trajectory.status, "steps": trajectory.stats["num_steps"]}

            return jax.vmap(lane)(start)

        return jax.shard_map(solve_batch, mesh=mesh, in_specs=(everywhere, lanes), out_specs=lanes, check_vma=False)(
            arrays, start
        )

    return solve_round


@eqx.filter_jit
def draw(init: str, side: str, rank: int, padded_rank: int, problem: Problem, seeds: Array, alphas: Array) -> Adapters:
    """Initial adapters of one scheme and rank for many (seed, alpha), padded to a common rank."""

    def one(seed: Array, alpha: Array) -> Adapters:
        key = jax.random.key(seed)
        return pad(initialize(init, key, problem, rank=rank, alpha=alpha, side=side), padded_rank)

    return jax.vmap(one)(seeds, alphas)

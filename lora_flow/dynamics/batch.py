"""The work of the devices: drawing and solving many lanes in one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from lora_flow.adapter import Adapters
from lora_flow.coordinates.base import Coordinates
from lora_flow.dynamics.measurements import Direction
from lora_flow.dynamics.solve import Trajectory
from lora_flow.dynamics.ways import Way
from lora_flow.initialization import Scheme, initialize
from lora_flow.problems.offset import offset_where
from lora_flow.runtime.compiling import compiled

Setting = tuple[Any, tuple[Direction, ...]]  # a problem, or several stacked, and its principal directions


def lane_sharding(devices: tuple[Any, ...]) -> NamedSharding:
    """Arrays with a leading axis of lanes, a batch of them on each device."""
    return NamedSharding(Mesh(np.array(devices), ("lanes",)), PartitionSpec("lanes"))


@functools.cache
def round_solver(devices: tuple[Any, ...], threads: bool = True, optimised: bool = True) -> Callable[..., Trajectory]:
    """A function that solves one batch on each device; each device runs its own loop and waits for no other.

    `which` holds for each lane the index of its problem where `settings` are stacked; None where there is one problem.
    `shifted` says which lanes have their weights offset by their start; None where no lane has.
    `own` is what the way of solving takes of each lane.
    `threads` says whether CPU devices may share out one product to several, and `optimised` whether code for them takes
    longer to be ready, and less to run. Both change the rounding.
    """
    mesh, lanes = lane_sharding(devices).mesh, PartitionSpec("lanes")
    on_cpu = devices[0].platform == "cpu"

    def solve_round(
        settings: Setting,
        which: Array | None,
        shifted: Array | None,
        start: Adapters,
        own: Any,
        way: Way,
    ) -> Trajectory:
        arrays, rest = eqx.partition((settings, way), eqx.is_array)

        def solve_batch(
            arrays: Any, which: Array | None, shifted: Array | None, start: Adapters, own: Any
        ) -> Trajectory:
            settings, way = eqx.combine(arrays, rest)

            def prepared(index: Array | None, shifted: Array | None, adapters: Adapters) -> Any:
                problem, directions = _pick(settings, index)
                return offset_where(shifted, problem, adapters), adapters, directions

            def look(lane: Any) -> Trajectory:
                drawn, run = lane
                return way.look(*prepared(*drawn), run)

            drawn = which, shifted, start
            run = jax.vmap(lambda drawn, own: way.lane(*prepared(*drawn), own))(drawn, own)
            # what is saved of one lane after another stays in the cache of a CPU
            return jax.lax.map(look, (drawn, run)) if on_cpu else jax.vmap(look)((drawn, run))

        specs = PartitionSpec(), lanes, lanes, lanes, lanes
        batched = jax.shard_map(solve_batch, mesh=mesh, in_specs=specs, out_specs=lanes, check_vma=False)
        return batched(arrays, which, shifted, start, own)

    options: dict[str, Any] = {}
    if on_cpu:
        options = {"xla_cpu_multi_thread_eigen": threads} | ({} if optimised else {"xla_backend_optimization_level": 0})
    return compiled(**options)(solve_round)


@compiled(quickly=True)
def draw(
    init: Scheme,
    side: str,
    rank: int,
    problem: Any,
    coordinates: Coordinates,
    which: Any,
    seeds: Any,
    alphas: Any,
    to_leave: bool,
) -> tuple[Adapters, Any]:
    """Initial adapters of one scheme and rank for many (problem, seed, alpha), in these coordinates.

    Second comes what they need to leave the coordinates; None unless they are to do so.
    """

    def one(index: Array | None, seed: Array, alpha: Array) -> tuple[Adapters, Any]:
        drawn = initialize(init, jax.random.key(seed), _pick(problem, index), rank=rank, alpha=alpha, side=side)
        entered, bases = _pick(coordinates, index).enter(drawn)
        return entered, bases if to_leave else None

    with jax.default_matmul_precision("highest"):
        return jax.vmap(one)(which, seeds, alphas)


def _pick(stacked: Any, index: Array | None) -> Any:
    if index is None:
        return stacked
    return jax.tree.map(lambda leaf: leaf[index] if eqx.is_array(leaf) else leaf, stacked)

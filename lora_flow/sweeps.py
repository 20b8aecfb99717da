"""A grid of runs -> lanes -> batches of one compiled program -> one labelled dataset."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, ArrayLike
from tqdm.auto import tqdm

from lora_flow.adapter import Adapters, zero_adapters
from lora_flow.batch import draw, round_solver
from lora_flow.checks import require, require_choice
from lora_flow.flow import MAX_STEPS, RTOL, STATUS, Integrator, integrator, save_times
from lora_flow.initialization import INITIALIZATIONS, SIDES, check_alpha, check_rank
from lora_flow.observables import measure, observables, principal_directions
from lora_flow.problem import Factorization, Problem, check_problem, task_rank

PENDING = -1  # the status of a lane that has not run
BATCH_SIZE = 32
LANE_DIMS = ("init", "side", "alpha", "rank", "seed")

Values = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The axes of a sweep; their product is its lanes, numbered in C order."""

    init: tuple[str, ...]
    side: tuple[str, ...]
    alpha: tuple[float, ...]
    rank: tuple[int, ...]
    seed: Sequence[int]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(getattr(self, dim)) for dim in LANE_DIMS)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def lane(self, number: int | np.integer) -> dict[str, Any]:
        """The coordinates of one lane."""
        index = np.unravel_index(number, self.shape)
        return {dim: getattr(self, dim)[i] for dim, i in zip(LANE_DIMS, index, strict=True)}

    def by_cost(self) -> np.ndarray:
        """Lane numbers in an order that puts lanes of like cost side by side.

        All lanes of a batch step until its slowest is done. Within one problem the number of steps depends on
        the initialisation, then on alpha and the rank, and hardly on the seed.
        """
        init, side, alpha, rank, seed = np.unravel_index(np.arange(self.size), self.shape)
        return np.lexsort((seed, np.take(self.rank, rank), np.take(self.alpha, alpha), side, init))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked sweep: what will be solved, how, and in which batches. Build it with `plan_sweep`."""

    problem: Problem
    grid: Grid
    t1: float
    times: np.ndarray
    integrator: Integrator
    max_steps: int
    batch_size: int

    @functools.cached_property
    def batches(self) -> list[np.ndarray]:
        """Lane numbers, `batch_size` at a time; the same for a run that is resumed."""
        order = self.grid.by_cost()
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    @property
    def nbytes(self) -> int:
        """The size of the result, without making it."""
        return self.grid.size * (8 * len(self.times) * len(self._observable_names()) + 5)

    def empty(self) -> xr.Dataset:
        """The result before any lane has run: NaN everywhere, and status -1."""
        dims, coords, shape = self._axes()
        lanes = {"status": np.full(shape, PENDING, np.int8), "steps": np.zeros(shape, np.int32)}
        over_time = {name: np.full((*shape, len(self.times)), np.nan) for name in self._observable_names()}
        dataset = xr.Dataset(
            {name: ((*dims, "time"), values) for name, values in over_time.items()}
            | {name: (dims, values) for name, values in lanes.items()},
            coords=coords,
            attrs=self._attrs(),
        )
        for name, about in _ABOUT.items():
            if name in dataset:
                dataset[name].attrs.update(about)
        return dataset

    def run(self, pending: Sequence[int] | None = None, progress: bool = True) -> Iterator[tuple[np.ndarray, Values]]:
        """Solves the batches with the given indices, or all, and yields (lane numbers, values) as each is done."""
        pending = range(len(self.batches)) if pending is None else pending
        devices = jax.local_devices()[: max(1, len(pending))]
        solve_round = round_solver(tuple(devices))
        directions = principal_directions(self.problem)
        t1, times = jnp.asarray(self.t1, float), jnp.asarray(self.times, float)
        done = self.grid.size - sum(len(self.batches[i]) for i in pending)
        with tqdm(total=self.grid.size, initial=done, unit="lane", disable=None if progress else True) as bar:
            bar.set_description("compiling")
            for first in range(0, len(pending), len(devices)):
                lanes = [self.batches[i] for i in pending[first : first + len(devices)]]
                start = self._start(lanes, len(devices))
                solved = solve_round(self.problem, start, directions, t1, times, self.integrator, self.max_steps)
                values = {name: np.asarray(array) for name, array in solved.items()}
                bar.set_description("solving")
                for device, numbers in enumerate(lanes):
                    offset = device * self.batch_size
                    yield numbers, {name: array[offset : offset + len(numbers)] for name, array in values.items()}
                    bar.update(len(numbers))

    def fill(self, dataset: xr.Dataset, lanes: np.ndarray, values: Values) -> None:
        """Writes what `run` yields into a dataset made by `empty`."""
        index = np.unravel_index(lanes, dataset["status"].shape)
        for name, array in values.items():
            dataset[name].values[index] = array

    def _start(self, lanes: list[np.ndarray], devices: int) -> Adapters:
        """Initial adapters of one round, `(devices * batch_size, ...)`; places without a lane repeat the last one."""
        filled = [np.pad(numbers, (0, self.batch_size - len(numbers)), mode="edge") for numbers in lanes]
        numbers = np.concatenate(filled + filled[-1:] * (devices - len(lanes)))
        coordinates = [self.grid.lane(number) for number in numbers]
        groups: dict[tuple[str, str, int], list[int]] = {}
        for place, lane in enumerate(coordinates):
            groups.setdefault((lane["init"], lane["side"], lane["rank"]), []).append(place)
        parts, places = [], []
        for (init, side, rank), members in groups.items():
            padded = np.pad(members, (0, len(numbers) - len(members)), mode="edge")
            seeds = jnp.asarray([coordinates[place]["seed"] for place in padded])
            alphas = jnp.asarray([coordinates[place]["alpha"] for place in padded], float)
            drawn = draw(init, side, rank, max(self.grid.rank), self.problem, seeds, alphas)
            parts.append([np.asarray(leaf)[: len(members)] for leaf in jax.tree.leaves(drawn)])
            places.extend(members)
        back = np.argsort(places)
        leaves = [jnp.asarray(np.concatenate(part)[back]) for part in zip(*parts, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(drawn), leaves)

    def _axes(self) -> tuple[tuple[str, ...], dict[str, Any], tuple[int, ...]]:
        """Dimensions, coordinates and shape over lanes; `side` is a dimension only where there are several."""
        dims = tuple(dim for dim in LANE_DIMS if dim != "side" or len(self.grid.side) > 1)
        coords = {dim: list(getattr(self.grid, dim)) for dim in dims} | {"time": self.times}
        return dims, coords, tuple(len(coords[dim]) for dim in dims)

    def _observable_names(self) -> list[str]:
        def one_time() -> dict[str, Array]:
            measured = measure(zero_adapters(self.problem.layers, rank=1), principal_directions(self.problem))
            return observables(jax.tree.map(lambda leaf: leaf[None], measured))

        return ["loss", *jax.eval_shape(one_time)]

    def _attrs(self) -> dict[str, Any]:
        side = {"side": self.grid.side[0]} if len(self.grid.side) == 1 else {}
        spectrum = self.problem.spectrum() if isinstance(self.problem, Factorization) else {}
        return (
            side
            | {
                "t1": self.t1,
                "solver": type(self.integrator.solver).__name__,
                "rtol": float(self.integrator.rtol),
                "max_steps": self.max_steps,
                "batch_size": self.batch_size,
                "layers": [list(shape) for shape in self.problem.layers],
                "problem_digest": digest(self.problem),
                "lora_flow_version": _version("lora-flow"),
                "jax_version": _version("jax"),
                "diffrax_version": _version("diffrax"),
                "platform": jax.local_devices()[0].platform,
                "dtype": str(jnp.result_type(float)),
            }
            | {name: int(value) if isinstance(value, bool) else value for name, value in spectrum.items()}
        )


def plan_sweep(
    problem: Problem,
    *,
    init: str | Sequence[str],
    side: str | Sequence[str],
    alpha: float | ArrayLike | Sequence[float],
    rank: int | ArrayLike | Sequence[int],
    seeds: int | ArrayLike | Sequence[int],
    t1: float,
    saves: int | ArrayLike | Sequence[float],
    solver: diffrax.AbstractSolver | None,
    rtol: float,
    max_steps: int,
    batch_size: int,
) -> Plan:
    """Checks the arguments of `sweep`, all of them before anything is solved."""
    check_problem(problem)
    grid = Grid(
        init=_axis("init", init),
        side=_axis("side", side),
        alpha=tuple(map(float, _axis("alpha", alpha))),
        rank=_axis("rank", rank),
        seed=_seeds(seeds),
    )
    for name in grid.init:
        require_choice("init", name, INITIALIZATIONS)
    for one in grid.side:
        require_choice("side", one, SIDES)
    for scale in grid.alpha:
        check_alpha(scale)
    for r in grid.rank:
        check_rank(r, problem.layers)
    if "spectral" in grid.init:
        needed = task_rank(problem)
        smallest = min(grid.rank)
        require(smallest >= needed, "rank", f"be at least {needed}, the rank of the shift, for init spectral", smallest)
    require(max_steps >= 1, "max_steps", "be at least 1", max_steps)
    require(batch_size >= 1, "batch_size", "be at least 1", batch_size)
    times = np.asarray(save_times(t1, saves))
    settings = integrator(solver=solver, rtol=rtol)
    return Plan(problem, grid, float(t1), times, settings, max_steps, min(batch_size, grid.size))


def sweep(
    problem: Problem,
    *,
    init: str | Sequence[str] = "gaussian",
    side: str | Sequence[str] = "A",
    alpha: float | ArrayLike | Sequence[float] = 1e-3,
    rank: int | ArrayLike | Sequence[int] = 4,
    seeds: int | ArrayLike | Sequence[int] = 1,
    t1: float,
    saves: int | ArrayLike | Sequence[float] = 101,
    solver: diffrax.AbstractSolver | None = None,
    rtol: float = RTOL,
    max_steps: int = MAX_STEPS,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> xr.Dataset:
    r"""Solves the gradient flow for every combination of initialisation, side, alpha, rank and seed.

    All lanes share one compiled program: ranks are padded to the largest, lanes are sorted by cost, and
    batches are spread over the devices present. Seeds are common to all the other axes.

    **Arguments:**

    - `problem`: a `Factorization`, or anything that meets `Problem`.
    - `init`, `side`, `alpha`, `rank`: one value or several; names from `INITIALIZATIONS`, "A" or "B", positive
      scales, ranks. `side` says which factor a one-sided initialisation draws.
    - `seeds`: a number of seeds, from 0, or the seeds themselves.
    - `t1`, `saves`, `solver`, `rtol`, `max_steps`: as for `solve`.
    - `batch_size`: lanes that one device steps together.
    - `progress`: show a progress bar with the time left, where standard error is a terminal.

    **Returns:** an `xarray.Dataset` with dims `init, alpha, rank, seed, time` (and `side` before alpha where there are
    several), the variables of `Trajectory.observables`, and `status` (see its flag attributes) and `steps`
    without `time`.

    **Raises:** `InputError` for bad arguments. A lane that fails is a status, never an exception.
    """
    plan = plan_sweep(
        problem,
        init=init,
        side=side,
        alpha=alpha,
        rank=rank,
        seeds=seeds,
        t1=t1,
        saves=saves,
        solver=solver,
        rtol=rtol,
        max_steps=max_steps,
        batch_size=batch_size,
    )
    dataset = plan.empty()
    for lanes, values in plan.run(progress=progress):
        plan.fill(dataset, lanes, values)
    return dataset


def digest(problem: Problem) -> str:
    """A fingerprint of a problem's arrays, to tell whether a stored run is about this problem.

    Of a problem that is no PyTree it knows the layers only.
    """
    state = hashlib.sha256(repr(problem.layers).encode())
    for leaf in map(np.ascontiguousarray, jax.tree.leaves(eqx.filter(problem, eqx.is_array))):
        state.update(f"{leaf.shape} {leaf.dtype}".encode() + leaf.tobytes())
    return state.hexdigest()


def _axis(name: str, values: Any) -> tuple[Any, ...]:
    listed = (values,) if isinstance(values, str) else tuple(np.atleast_1d(np.asarray(values)).tolist())
    require(len(listed) > 0, name, "hold at least one value", "none")
    require(len(set(listed)) == len(listed), name, "name each value once", listed)
    return listed


def _seeds(seeds: Any) -> Sequence[int]:
    if isinstance(seeds, (int, np.integer)):
        require(seeds >= 1, "seeds", "be at least 1", seeds)
        return range(int(seeds))
    listed = _axis("seeds", seeds)
    require(all(isinstance(seed, int) and seed >= 0 for seed in listed), "seeds", "be integers from 0", listed)
    return listed


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


_ABOUT: dict[str, dict[str, Any]] = {
    "time": {"long_name": "gradient-flow time"},
    "alpha": {"long_name": "initialisation scale"},
    "rank": {"long_name": "LoRA rank"},
    "loss": {"long_name": "1/2 ||shift - update||_F^2"},
    "alignment_error": {"long_name": "1 - |cos(gamma_1, top left singular vector of Z_1)|"},
    "alignment_error_2": {"long_name": "1 - |cos(gamma_2, top left singular vector of Z_2)|"},
    "norm_z1": {"long_name": "spectral norm of Z_1 = [B_1; A_1^T]"},
    "norm_z2": {"long_name": "spectral norm of Z_2 = [B_2; A_2^T]"},
    "drift": {"long_name": "drift of A A^T - B^T B, relative to ||Z||^2 (an error of the integration)"},
    "steps": {"long_name": "solver steps, rejected ones included"},
    "status": {
        "long_name": "how the lane ended",
        "flag_values": [PENDING, *range(len(STATUS))],
        "flag_meanings": " ".join(("pending", *STATUS)),
    },
}

"""A checked sweep: grid -> lanes -> batches of one compiled program -> one labelled dataset."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
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
from lora_flow.analysis import analyse
from lora_flow.batch import draw, round_solver
from lora_flow.checks import require
from lora_flow.flow import Integrator, Trajectory, integrator, save_times
from lora_flow.grid import Grid, Problems
from lora_flow.labels import PENDING, label
from lora_flow.observables import measure, observables, principal_directions
from lora_flow.problem import Factorization, Problem

BATCH_SIZE = 32

Values = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked sweep: what will be solved, how, and in which batches. Build it with `plan_sweep`."""

    problems: Problems
    grid: Grid
    t1: float
    times: np.ndarray
    integrator: Integrator
    batch_size: int

    @functools.cached_property
    def batches(self) -> list[np.ndarray]:
        """Lane numbers, `batch_size` at a time; the same for a run that is resumed."""
        order = self.grid.by_cost()
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    @property
    def nbytes(self) -> int:
        """The size of the result, without making it."""
        return self.grid.size * (5 + 8 * sum(int(np.prod(shape)) for shape in self._shapes.values()))

    def empty(self) -> xr.Dataset:
        """The result before any lane has run: NaN everywhere, and status -1."""
        axes = {dim: values for dim, values in self.grid.axes.items() if dim != "side" or len(values) > 1}
        dims, shape = tuple(axes), tuple(map(len, axes.values()))
        modes = ("time", "mode")
        over_time = {
            name: ((*dims, *modes[: len(own)]), np.full((*shape, *own), np.nan)) for name, own in self._shapes.items()
        }
        lanes = {"status": np.full(shape, PENDING, np.int8), "steps": np.zeros(shape, np.int32)}
        dataset = xr.Dataset(
            over_time | {name: (dims, values) for name, values in lanes.items()},
            coords={dim: list(values) for dim, values in axes.items()} | {"time": self.times} | self._gains(),
            attrs=self._attrs(),
        )
        return label(dataset)

    def run(self, pending: Sequence[int] | None = None, progress: bool = True) -> Iterator[tuple[np.ndarray, Values]]:
        """Solves the batches with the given indices, or all, and yields (lane numbers, values) as each is done."""
        pending = range(len(self.batches)) if pending is None else pending
        devices = jax.local_devices()[: max(1, len(pending))]
        solve_round = round_solver(tuple(devices))
        problems = self.problems.stacked
        directions = eqx.filter_vmap(principal_directions) if self.problems.axes else principal_directions
        settings = (problems, directions(problems))
        t1, times = jnp.asarray(self.t1, float), jnp.asarray(self.times, float)
        done = self.grid.size - sum(len(self.batches[i]) for i in pending)
        with tqdm(total=self.grid.size, initial=done, unit="lane", disable=None if progress else True) as bar:
            bar.set_description("compiling")
            for first in range(0, len(pending), len(devices)):
                lanes = [self.batches[i] for i in pending[first : first + len(devices)]]
                which, start = self._start(lanes, len(devices), problems)
                solved = jax.tree.map(np.asarray, solve_round(settings, which, start, t1, times, self.integrator))
                bar.set_description("solving")
                for device, numbers in enumerate(lanes):
                    offset = device * self.batch_size
                    part = slice(offset, offset + len(numbers))
                    yield numbers, self._values(numbers, jax.tree.map(lambda leaf, part=part: leaf[part], solved))
                    bar.update(len(numbers))

    def fill(self, dataset: xr.Dataset, lanes: np.ndarray, values: Values) -> None:
        """Writes what `run` yields into a dataset made by `empty`."""
        index = np.unravel_index(lanes, dataset["status"].shape)
        for name, array in values.items():
            dataset[name].values[index] = array

    def _start(self, lanes: list[np.ndarray], devices: int, problems: Any) -> tuple[Array | None, Adapters]:
        """Problem indices and initial adapters of one round, `(devices * batch_size, ...)`.

        Places without a lane repeat the last one.
        """
        filled = [np.pad(numbers, (0, self.batch_size - len(numbers)), mode="edge") for numbers in lanes]
        numbers = np.concatenate(filled + filled[-1:] * (devices - len(lanes)))
        coordinates = [self.grid.lane(number) for number in numbers]
        which = self.grid.problem_of(numbers)
        groups: dict[tuple[str, str, int], list[int]] = {}
        for place, lane in enumerate(coordinates):
            groups.setdefault((lane["init"], lane["side"], lane["rank"]), []).append(place)
        parts, places = [], []
        for (init, side, rank), members in groups.items():
            padded = np.pad(members, (0, len(numbers) - len(members)), mode="edge")
            seeds = jnp.asarray([coordinates[place]["seed"] for place in padded])
            alphas = jnp.asarray([coordinates[place]["alpha"] for place in padded], float)
            index = jnp.asarray(which[padded]) if self.problems.axes else None
            drawn = draw(init, side, rank, max(self.grid.rank), problems, index, seeds, alphas)
            parts.append([np.asarray(leaf)[: len(members)] for leaf in jax.tree.leaves(drawn)])
            places.extend(members)
        back = np.argsort(places)
        leaves = [jnp.asarray(np.concatenate(part)[back]) for part in zip(*parts, strict=True)]
        start = jax.tree.unflatten(jax.tree.structure(drawn), leaves)
        return (jnp.asarray(which) if self.problems.axes else None), start

    def _values(self, numbers: np.ndarray, solved: Trajectory) -> Values:
        """What is stored of one batch; the details are worked out here, one problem at a time."""
        values = solved.observables | {"status": solved.status, "steps": solved.stats["num_steps"]}
        if solved.history is None:
            return values
        which = self.grid.problem_of(numbers)
        details: Values = {}
        for index in np.unique(which):
            mine = np.flatnonzero(which == index)
            history = jax.tree.map(lambda leaf, mine=mine: leaf[mine], solved.history)
            for name, array in analyse(self.problems.members[index], history).items():
                details.setdefault(name, np.empty((len(numbers), *array.shape[1:])))[mine] = array
        return values | details

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape over (time, mode) of every observable."""
        problem, times = self.problems.members[0], len(self.times)
        rest = zero_adapters(problem.layers, max(self.grid.rank))

        def one_time() -> dict[str, Array]:
            measured = measure(rest, principal_directions(problem))
            return observables(jax.tree.map(lambda leaf: leaf[None], measured))

        names = ["loss", *jax.eval_shape(one_time)]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (times,))
        if self.integrator.save_adapters:
            shapes |= {name: (times, *array.shape) for name, array in analyse(problem, rest).items()}
        return shapes

    def _gains(self) -> dict[str, Any]:
        """What theory is written in, as coordinates over the problems."""
        problems = [problem for problem in self.problems.members if isinstance(problem, Factorization)]
        if not problems:
            return {}
        shape = tuple(map(len, self.problems.axes.values()))

        def over_problems(values: Any) -> Any:
            return tuple(self.problems.axes), np.reshape(list(values), shape)

        spectra = [problem.spectrum() for problem in problems]
        gains = zip(*(problem.leading_gains() for problem in problems), strict=True)
        return {
            name: over_problems(values) for name, values in zip(("sigma", "sigma_w1", "sigma_w2"), gains, strict=True)
        } | {
            "shift_rank": over_problems(len(spectrum["sigma_shift"]) for spectrum in spectra),
            "aligned": over_problems(int(spectrum["aligned"]) for spectrum in spectra),
        }

    def _attrs(self) -> dict[str, Any]:
        side = {"side": self.grid.side[0]} if len(self.grid.side) == 1 else {}
        problem = self.problems.members[0]
        spectrum = problem.spectrum() if isinstance(problem, Factorization) and not self.problems.axes else {}
        return (
            side
            | {
                "t1": self.t1,
                "solver": type(self.integrator.solver).__name__,
                "rtol": float(self.integrator.rtol),
                "max_steps": self.integrator.max_steps,
                "batch_size": self.batch_size,
                "layers": [list(shape) for shape in problem.layers],
                "problem_digest": digest(self.problems),
                "lora_flow_version": version("lora-flow"),
                "jax_version": version("jax"),
                "diffrax_version": version("diffrax"),
                "platform": jax.local_devices()[0].platform,
                "dtype": str(jnp.result_type(float)),
            }
            | {name: int(value) if isinstance(value, bool) else value for name, value in spectrum.items()}
        )


def plan_sweep(
    problem: Problem | Mapping[Any, Problem] | Problems,
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
    details: bool = False,
) -> Plan:
    """Checks the arguments of `sweep`, all of them before anything is solved."""
    problems = Problems.of(problem)
    grid = Grid.of(problems, init=init, side=side, alpha=alpha, rank=rank, seeds=seeds)
    require(batch_size >= 1, "batch_size", "be at least 1", batch_size)
    times = np.asarray(save_times(t1, saves))
    how = integrator(
        adjoint=diffrax.ForwardMode(), solver=solver, rtol=rtol, max_steps=max_steps, save_adapters=details
    )
    return Plan(problems, grid, float(t1), times, how, min(batch_size, grid.size))


def digest(problems: Problems) -> str:
    """A fingerprint of the problems' arrays, to tell whether a stored run is about them.

    Of a problem that is no PyTree it knows the layers only.
    """
    state = hashlib.sha256()
    for problem in problems.members:
        state.update(repr(problem.layers).encode())
        for leaf in map(np.ascontiguousarray, jax.tree.leaves(eqx.filter(problem, eqx.is_array))):
            state.update(f"{leaf.shape} {leaf.dtype}".encode() + leaf.tobytes())
    return state.hexdigest()

"""A checked sweep: grid -> boxes of lanes -> batches of one compiled program -> one labelled dataset."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import ArrayLike

from lora_flow.adapter import zero_adapters
from lora_flow.checks import require, require_flag, require_integer
from lora_flow.coordinates.base import Coordinates
from lora_flow.dynamics.analysis import modes_of_details
from lora_flow.dynamics.batch import draw, lane_sharding, round_solver
from lora_flow.dynamics.descend import save_iterations
from lora_flow.dynamics.flows import Flow, as_flow
from lora_flow.dynamics.integrator import MAX_STEPS, RTOL, integrator
from lora_flow.dynamics.measurements import directions_of
from lora_flow.dynamics.observables import OBSERVABLES
from lora_flow.dynamics.phases import latch_meanings
from lora_flow.dynamics.solve import save_times
from lora_flow.dynamics.ways import Descending, Flowing, Way
from lora_flow.initialization import Init
from lora_flow.problems.base import Problem, as_problem, on_host, own_observables
from lora_flow.storage.portable import portable_attrs
from lora_flow.sweeps.grid import Grid, Problems, stack
from lora_flow.sweeps.layout import Layout, choose_layout, noted_layout
from lora_flow.sweeps.limits import BATCH_SIZE, BATCH_SIZE_ELSEWHERE, LANE, LARGEST
from lora_flow.sweeps.schema import OF_LANES, OPTIONAL_DIMS, label
from lora_flow.sweeps.values import Values, detail_values, leave_each, start_values
from lora_flow.version import __version__

THREADED = 256  # the dimension above which a product is worth the threads of a CPU
SMALL = 50_000  # numbers in the adapters of all lanes, times about the steps of one, that take less than a second


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked sweep: its problems, lanes, way of solving, boxes and batches. `plan_sweep` builds it.

    `devices` is the number of this process's devices that batches are spread over. No number depends on it.
    """

    problems: Problems
    grid: Grid
    way: Way
    layout: Layout
    devices: int

    @property
    def noted_layout(self) -> dict[str, Any]:
        """What is noted of the layout, for `plan_sweep` to take over."""
        return self.layout.noted(self.grid.axes)

    @property
    def dtype(self) -> str:
        """The floating-point type that is in use."""
        return str(jnp.result_type(float))

    @property
    def is_small(self) -> bool:
        """Whether all lanes are solved sooner than code for them would be optimised. No part or device decides it."""
        numbers = self.grid.size * max(self.grid.rank) * sum(map(sum, self.coordinates[0].problem.layers))
        return bool(numbers <= SMALL and numbers * np.max(self.way.costs(self.problems.members)) <= SMALL)

    @property
    def nbytes(self) -> int:
        """The size of the result, without making it."""
        return self.grid.size * (LANE + 8 * sum(int(np.prod(shape)) for shape in self._shapes.values()))

    def outline(self) -> xr.Dataset:
        """The result before any lane has run: NaN, and status -1. It takes no memory, and is read only."""
        axes = {dim: values for dim, values in self.grid.axes.items() if dim not in OPTIONAL_DIMS or len(values) > 1}
        dims, shape = tuple(axes), tuple(map(len, axes.values()))
        modes = (self.way.axis, "mode")
        over_time = {
            name: ((*dims, *modes[: len(own)]), np.broadcast_to(np.nan, (*shape, *own)))
            for name, own in self._shapes.items()
        }
        of_lanes = {name: (dims, np.broadcast_to(one.pending, shape)) for name, one in OF_LANES.items()}
        dataset = xr.Dataset(
            over_time | of_lanes,
            coords={dim: values if isinstance(values, range) else list(values) for dim, values in axes.items()}
            | {self.way.axis: self.way.saved}
            | self._gains
            | self._offset,
            attrs=self._attrs,
        )
        return label(dataset, as_problem(self.problems.members[0]).meanings() | self._of_latch)

    def empty(self) -> xr.Dataset:
        """The same in memory, to be filled box by box."""
        outline = self.outline()
        return outline.assign({name: one.copy(data=np.array(one, order="C")) for name, one in outline.items()})

    @property
    def _offset(self) -> dict[str, Any]:
        """A coordinate over `init`: 1 where the start is subtracted from the frozen weights."""
        return {"offset": ("init", np.asarray([self.grid.schemes[init].offset for init in self.grid.init], np.int8))}

    def solve(self, boxes: Iterable[int] | None = None) -> Iterator[tuple[int, Values]]:
        """Solves the boxes with these numbers, or all, and yields the number and the values, `(lane, ...)`, of each.

        The devices take a batch each, of whatever box. A number is asked for when a device is free for it.
        """
        boxes = range(self.layout.boxes.count) if boxes is None else boxes
        batches = ((box, lanes) for box in boxes for lanes in self.layout.batches(box))
        many = min(self.devices, math.ceil(self.grid.size / self.layout.width))
        devices = tuple(jax.local_devices()[:many])
        threads = max(map(max, self.problems.members[0].layers)) > THREADED
        solve_round = round_solver(devices, threads=threads, optimised=not self.is_small)
        problem = self._stacked.problem
        settings = problem, directions_of(problem, bool(self.problems.axes))
        parts: dict[int, list[Values]] = {}
        while here := list(itertools.islice(batches, len(devices))):
            which, shifted, start, own, bases = self._start([lanes for _, lanes in here], len(devices))
            placed = jax.device_put((which, shifted, start, own), lane_sharding(devices))
            solved = on_host(solve_round(settings, *placed, self.way))
            for device, (box, lanes) in enumerate(here):
                offset = device * self.layout.width
                part = slice(offset, offset + len(lanes))
                mine = jax.tree.map(lambda leaf, part=part: leaf[part], (solved, start, bases))
                parts.setdefault(box, []).append(self._values(lanes, *mine))
                if len(parts[box]) == math.ceil(self.layout.boxes.size(box) / self.layout.width):
                    yield box, _joined(parts.pop(box))

    @functools.cached_property
    def coordinates(self) -> tuple[Coordinates, ...]:
        """The coordinates that each problem is solved in."""
        return self.way.coordinates(self.problems.members, rank=max(self.grid.rank))

    @functools.cached_property
    def _stacked(self) -> Coordinates:
        """The same, stacked as the problems are."""
        return stack(self.coordinates) if self.problems.axes else self.coordinates[0]

    def _start(self, lanes: list[np.ndarray], devices: int) -> tuple[Any, ...]:
        """Per lane, `(devices * width, ...)`: problem index, whether its weights are offset, adapters, own, bases.

        Places without a lane repeat the last one.
        """
        filled = [np.pad(numbers, (0, self.layout.width - len(numbers)), mode="edge") for numbers in lanes]
        numbers = np.concatenate(filled + filled[-1:] * (devices - len(lanes)))
        coordinates = [self.grid.lane(number) for number in numbers]
        which = self.grid.problem_of(numbers)
        groups: dict[tuple[str, str, int], list[int]] = {}
        for place, lane in enumerate(coordinates):
            groups.setdefault((lane["init"], lane["side"], lane["rank"]), []).append(place)
        parts, places = [], []
        for (init, side, rank), members in groups.items():
            padded = np.pad(members, (0, len(numbers) - len(members)), mode="edge")
            seeds = np.asarray([coordinates[place]["seed"] for place in padded])
            alphas = np.asarray([coordinates[place]["alpha"] for place in padded], jnp.result_type(float))
            index = which[padded] if self.problems.axes else None
            whole = self.problems.stacked, self._stacked
            to_leave = self._stacked.changes_problem or self.way.save_adapters
            drawn = draw(self.grid.schemes[init], side, rank, *whole, index, seeds, alphas, to_leave)
            self._check_finite(init, jax.tree.leaves(drawn), [coordinates[place] for place in padded])
            parts.append([np.asarray(leaf)[: len(members)] for leaf in jax.tree.leaves(drawn)])
            places.extend(members)
        back = np.argsort(places)
        leaves = [np.concatenate(part)[back] for part in zip(*parts, strict=True)]
        start, bases = jax.tree.unflatten(jax.tree.structure(drawn), leaves)
        shifted = np.asarray([self.grid.schemes[lane["init"]].offset for lane in coordinates])
        any_shifted = any(scheme.offset for scheme in self.grid.schemes.values())
        some = (which if self.problems.axes else None), (shifted if any_shifted else None)
        return *some, start, self.way.own(coordinates), bases

    def _check_finite(self, init: str, drawn: list[Any], lanes: list[dict[str, Any]]) -> None:
        """Raises where an initialisation has returned NaN or infinity."""
        lost = ~np.all([np.isfinite(leaf).reshape(len(lanes), -1).all(axis=1) for leaf in drawn], axis=0)
        for place in np.flatnonzero(lost)[:1]:
            where = ", ".join(f"{name} {value}" for name, value in lanes[place].items() if name != "init")
            require(False, f"init '{init}'", "return adapters with finite entries", f"NaN or infinite ones at {where}")

    def _values(self, numbers: np.ndarray, solved: Any, start: Any, bases: Any) -> Values:
        """The values of one batch to store, by name."""
        which = self.grid.problem_of(numbers)
        problems, lanes = [self.problems.members[i] for i in which], [self.grid.lane(number) for number in numbers]
        self.way.check(solved)
        values = solved.observables | {"initial_loss": solved.initial_loss, "rounding_floor": solved.rounding_floor}
        values |= {"status": solved.status, "steps": solved.stats["num_steps"]}
        offset, ranks = [self.grid.schemes[lane["init"]].offset for lane in lanes], [lane["rank"] for lane in lanes]
        left = start  # its values are the same in any coordinates, but for the floor of one layer in other ones
        coordinates = [self.coordinates[i] for i in which]
        if self._stacked.changes_problem and len(start) == 1:
            left = leave_each(coordinates, start, bases)
        values |= start_values(problems, ranks, offset, left)
        if solved.history is None:
            return values
        told = problems, coordinates, offset, start, bases, solved.history
        until = [solved.observables[name] for name in self._of_latch]  # below the time once the latch is off
        on = np.stack([one >= self.way.saved for one in until], axis=-1) if until else None
        return values | detail_values(*told, self.way.flow, on)

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape over (time, mode) of every observable."""
        problem, times, rank = self.problems.members[0], len(self.way.saved), max(self.grid.rank)
        own = jax.eval_shape(lambda: own_observables(problem, zero_adapters(problem.layers, rank)))
        names = ["loss", *sorted(OBSERVABLES.meanings(len(problem.layers))), *own, *self._of_latch]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (times,))
        if self.way.save_adapters:
            shapes |= {name: (times, *shape) for name, shape in modes_of_details(problem, rank).items()}
        return shapes

    @property
    def _of_latch(self) -> dict[str, str]:
        """Name -> meaning of the observables that the flow adds."""
        return latch_meanings(self.way.flow, len(self.problems.members[0].layers))

    @functools.cached_property
    def _gains(self) -> dict[str, Any]:
        """The quantities that theory is written in, as coordinates over the problems."""
        shape = tuple(map(len, self.problems.axes.values()))
        told = [as_problem(problem).characteristics() for problem in self.problems.members]
        return {name: (tuple(self.problems.axes), np.reshape([one[name] for one in told], shape)) for name in told[0]}

    @functools.cached_property
    def _attrs(self) -> dict[str, Any]:
        axes = self.grid.axes
        single = {dim: axes[dim][0] for dim in OPTIONAL_DIMS if dim in axes and len(axes[dim]) == 1}
        problem = self.problems.members[0]
        summary = {} if self.problems.axes else as_problem(problem).summary()
        return portable_attrs(
            single
            | self.way.told
            | {
                "batch_size": self.layout.width,
                "layers": problem.layers,
                "problem_digest": digest(self.problems),
                "lora_flow_version": __version__,
                "jax_version": _version("jax"),
                "diffrax_version": _version("diffrax"),
                "platform": jax.local_devices()[0].platform,
                "dtype": self.dtype,
            }
            | summary
        )


def plan_sweep(
    problem: Problem | Mapping[Any, Problem] | Problems,
    *,
    init: Init | Sequence[Init],
    side: str | Sequence[str],
    alpha: float | ArrayLike | Sequence[float],
    rank: int | ArrayLike | Sequence[int],
    seeds: int | ArrayLike | Sequence[int],
    t1: float | None = None,
    saves: int | ArrayLike | Sequence[float] | Sequence[int],
    solver: diffrax.AbstractSolver | str,
    rtol: float,
    max_steps: int,
    batch_size: int,
    devices: int = 0,
    details: bool = False,
    flow: Flow | str = "plain",
    descend: str | Sequence[str] | None = None,
    steps: int | None = None,
    gradient_noise: float | ArrayLike | Sequence[float] = 0.0,
    layout: Mapping[str, Any] | None = None,
) -> Plan:
    """Checks the arguments of `sweep`, all of them before anything is solved.

    `layout` is what a stored run has noted of its own; without it one is chosen.
    """
    problems = Problems.of(problem)
    axes = {"init": init, "side": side, "alpha": alpha, "rank": rank, "seeds": seeds}
    grid = Grid.of(problems, **axes, descend=descend, gradient_noise=gradient_noise)
    require_integer("batch_size", batch_size, "be at least 1, or 0 for what suits the device", 0)
    require_flag("details", details)
    here = jax.local_device_count()
    require_integer("devices", devices, f"lie between 0, for all, and {here}, the number of devices", 0, here)
    devices = devices or here
    batch_size = batch_size or (BATCH_SIZE if jax.local_devices()[0].platform == "cpu" else BATCH_SIZE_ELSEWHERE)
    of_flow = {"t1": t1, "flow": flow, "solver": solver, "rtol": rtol, "max_steps": max_steps}
    way = (
        _descending(grid, steps, saves, details, of_flow)
        if grid.optimizer
        else _flowing(problems, steps, saves, details, of_flow)
    )
    grid.check_starts(problems, way.flow)
    if layout is None:
        costs = way.costs(problems.members).reshape([len(values) for values in problems.axes.values()])
        chosen = choose_layout(grid.shape, costs, batch_size)
    else:
        chosen = noted_layout(layout, dict(zip(grid.axes, grid.shape, strict=True)))
    return Plan(problems, grid, way, chosen, devices)


def _flowing(problems: Problems, steps: Any, saves: Any, details: bool, of_flow: Mapping[str, Any]) -> Flowing:
    require(steps is None, "steps", "be left out without descend", steps)
    t1, flow, how = of_flow["t1"], of_flow["flow"], {name: of_flow[name] for name in ("solver", "rtol", "max_steps")}
    require(t1 is not None, "t1", "be given for a flow (or descend and steps, for gradient descent)", t1)
    times = save_times(t1, saves)
    how |= {"derivatives": "forward", "save_adapters": details, "layers": problems.members[0].layers}
    made = integrator(flow=as_flow(flow), **how)
    return Flowing(jnp.asarray(t1, float), times, made)


def _descending(grid: Grid, steps: Any, saves: Any, details: bool, of_flow: Mapping[str, Any]) -> Descending:
    left_out = {"t1": None, "flow": "plain", "solver": "auto", "rtol": RTOL, "max_steps": MAX_STEPS}
    for name, value in of_flow.items():
        same = isinstance(value, type(left_out[name])) and value == left_out[name]
        require(same, name, "be left out with descend", value)
    require(steps is not None, "steps", "be given with descend", steps)
    require_integer("steps", steps, f"lie between 1 and {LARGEST}", 1, LARGEST)
    iterations, noisy = save_iterations(int(steps), saves), any(grid.gradient_noise)
    return Descending(grid.optimizer, int(steps), tuple(iterations.tolist()), noisy, details)


def _joined(parts: Sequence[Values]) -> Values:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


_version = functools.cache(version)  # a millisecond each


def digest(problems: Problems) -> str:
    """A fingerprint of the problems' arrays, which tells whether a stored run is of these problems.

    For a problem that is no PyTree the fingerprint is of the layers only.
    """
    state = hashlib.sha256()
    for problem in problems.members:
        state.update(repr(problem.layers).encode())
        for leaf in map(np.ascontiguousarray, jax.tree.leaves(eqx.filter(problem, eqx.is_array))):
            state.update(f"{leaf.shape} {leaf.dtype}".encode() + leaf.tobytes())
    return state.hexdigest()

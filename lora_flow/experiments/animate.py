"""The animation of one lane of a run, which is solved again for it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from lora_flow.checks import require, require_choice
from lora_flow.dynamics.descend import Descent
from lora_flow.dynamics.solve import Trajectory
from lora_flow.figures.animation import animation
from lora_flow.figures.motion import motion_of
from lora_flow.problems.base import Problem
from lora_flow.results.clock import over_time
from lora_flow.results.levels import clipped
from lora_flow.results.report import show
from lora_flow.settings import Settings, build_plan
from lora_flow.storage.reading import lanes
from lora_flow.storage.remote import RunPath, as_file, run_path
from lora_flow.storage.swap import appearing
from lora_flow.sweeps.folder import kept_problem
from lora_flow.sweeps.one_lane import solve_lane
from lora_flow.sweeps.run import Looked, look_at

MANY = 1000  # saves, about, of which the frames are chosen
NEAR = 1e-6  # relative: as which a value is known that was typed


class Lane(NamedTuple):
    """A lane of a run: its place along each dim, and its coordinates, those that the run varies first named."""

    place: Mapping[str, int]
    where: Mapping[str, Any]
    varied: Sequence[str]

    @property
    def name(self) -> str:
        """What tells it from the others: "spectral, alpha 0.0001, seed 0"."""
        told = {dim: show(self.where[dim]) for dim in self.varied or ["init"]}
        return ", ".join(value if dim == "init" else f"{dim} {value}" for dim, value in told.items())


def animate_lane(
    out: str | RunPath, settings: Settings, asked: Sequence[str], suffix: str, frames: int, seconds: float
) -> list[str]:
    """Solves a lane of a run folder again and writes its animation to `figures/`; says where, and what was checked.

    The `settings` are those of the run.

    **Raises:** `InputError` where the folder holds no run, and for no such lane.
    """
    out = run_path("the run folder", out)
    looked = look_at(out)[""]
    lane = lane_of(looked.dataset, asked)
    problem, trajectory = _solved(out, settings, lane)
    content = animation(motion_of(problem, trajectory), suffix, lane.name, frames, seconds, progress=True)
    file = out / "figures" / f"animation-{re.sub(r'[^a-zA-Z0-9.+-]+', '-', lane.name)}{suffix}"
    file.parent.mkdir(parents=True, exist_ok=True)
    with appearing(file) as written:
        written.write(content)
    return [f"lane: {lane.name}", _compared(looked, lane, trajectory), f"animation: {file}"]


def lane_of(dataset: xr.Dataset, asked: Sequence[str]) -> Lane:
    """The lane of `alpha=1e-4`, `seed=0` and so on; along an axis that is not named, the first."""
    dims = [str(dim) for dim in dataset["status"].dims]
    place = dict.fromkeys(dims, 0)
    for dim, value in _pairs(asked).items():
        require_choice("an axis of lane", dim, dims)
        values = dataset[dim].values.tolist()
        found = [i for i, one in enumerate(values) if _is(one, value)]
        listed = ", ".join(map(show, values[:6])) + (f" ... {show(values[-1])}" if len(values) > 6 else "")
        require(found, f"{dim} of lane", f"be one of the run's ({listed})", value)
        place[dim] = found[0]
    where = {dim: dataset[dim].values[i].item() for dim, i in place.items()}
    return Lane(place, where, [dim for dim in dims if dataset.sizes[dim] > 1])


def _solved(out: RunPath, settings: Settings, lane: Lane) -> tuple[Problem, Trajectory]:
    asked = dataclasses.replace(settings, details=True, saves=_more(settings))
    with contextlib.ExitStack() as held:
        kept = kept_problem(out)
        file = None if kept is None else held.enter_context(as_file(kept))
        plan = build_plan(asked if file is None else dataclasses.replace(asked, problem=str(file)))
    place = [lane.place.get(dim, 0) for dim in plan.grid.axes]
    return solve_lane(plan, int(np.ravel_multi_index(place, plan.grid.shape)))


def _more(settings: Settings) -> int:
    """A number of saves that has those of the run among them, and shows what happens between.

    A descent's saves are rounded to whole steps, so it keeps the run's own where not every step is saved.
    """
    if settings.descend:
        return settings.steps + 1 if settings.steps < MANY else settings.saves
    intervals = settings.saves - (1 if settings.spacing == "linear" else 2)
    return settings.saves + intervals * (max(1, MANY // settings.saves) - 1)


def _pairs(asked: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in asked:
        dim, equals, value = word.partition("=")
        require(equals and dim and value, "lane", "be pairs such as alpha=1e-4 seed=0", word)
        require(dim not in pairs, "lane", "name each axis once", dim)
        pairs[dim] = value
    return pairs


def _is(one: Any, text: str) -> bool:
    """Whether a coordinate is what somebody has typed."""
    if isinstance(one, str):
        return one == text
    with contextlib.suppress(ValueError):
        return math.isclose(float(one), float(text), rel_tol=NEAR)
    return False


def _compared(looked: Looked, lane: Lane, trajectory: Trajectory) -> str:
    """How far the lane that was solved again is from the stored one."""
    names = [name for name in ("status", "loss", "rounding_floor") if name in looked.dataset]
    stored = over_time(lanes(looked.path, looked.dataset[names], {dim: [i] for dim, i in lane.place.items()}))
    if not np.isfinite(stored["loss"]).any():
        return "the run has no values of this lane to compare with yet"
    floor = stored.get("rounding_floor", xr.zeros_like(stored["status"], float))
    times = trajectory.iterations if isinstance(trajectory, Descent) else trajectory.times
    then = clipped(stored["loss"], floor).values.ravel()
    found = [int(np.argmin(np.abs(np.asarray(times) - time))) for time in stored["time"].values]
    now = np.maximum(np.asarray(trajectory.observables["loss"])[found], floor.values.ravel())
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = np.abs(np.log10(now / then))
    return f"solved again: within {np.nanmax(apart):.1g} decades of the stored loss at every time"

"""One lane of a sweep, solved again with its adapters over time, which run folders do not store."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lora_flow.dynamics.measurements import directions_of
from lora_flow.dynamics.solve import Trajectory
from lora_flow.dynamics.ways import Way
from lora_flow.initialization import initialize
from lora_flow.problems.base import Problem, as_problem
from lora_flow.runtime.compiling import compiled
from lora_flow.sweeps.plan import Plan


def solve_lane(plan: Plan, number: int) -> tuple[Problem, Trajectory]:
    """The lane with this number of a plan with details: its problem, offset where its start is, and its trajectory.

    It is solved in the problem as it is given, so that its `history` has the adapters themselves. The sweep's lane,
    solved in other coordinates, is the same but for its steps and for rounding.
    """
    lane = plan.grid.lane(number)
    (which,) = plan.grid.problem_of(np.array([number]))
    scheme, problem = plan.grid.schemes[lane["init"]], plan.problems.members[which]
    drawn = {name: lane[name] for name in ("rank", "alpha", "side")}
    start = initialize(scheme, jax.random.key(lane["seed"]), problem, **drawn)
    own = jax.tree.map(lambda leaf: leaf[0], plan.way.own([lane]))
    directions = directions_of(problem)
    solved = as_problem(problem).offset(start) if scheme.offset else problem
    return solved, _solve(plan.way, solved, start, directions, own)


@compiled()
def _solve(way: Way, problem: Any, start: Any, directions: Any, own: Any) -> Trajectory:
    return way.look(problem, start, directions, way.lane(problem, start, directions, own))

"""`optimise`: a problem or a family of tasks in, and out the start of a fixed norm from which training ends best."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from jaxtyping import Array

from lora_flow.adapter import Adapters
from lora_flow.checks import require, require_flag, require_integer, require_number
from lora_flow.design.looks import Spans
from lora_flow.design.objectives import Objective, as_objective
from lora_flow.design.parametrisations import Parametrisation, as_parametrisation
from lora_flow.design.results import BLOCK, steps_of
from lora_flow.design.steps import State, first_state, step, values_of
from lora_flow.dynamics.flows import Flow
from lora_flow.dynamics.integrator import MAX_STEPS
from lora_flow.initialization import allows_any_width, check_alpha, check_rank
from lora_flow.initialization.learned import LearnedStart
from lora_flow.initialization.of_norm import gaussian_norm, on_sphere
from lora_flow.problems.base import Problem
from lora_flow.runtime.progress import Progress
from lora_flow.sensitivities.parameters import checked
from lora_flow.storage.lanes import NOT_RUN
from lora_flow.sweeps.grid import Problems
from lora_flow.sweeps.plan import digest

SOLVER = "Tsit5"  # whose derivatives compile in a sixth of the time of those of "auto"
RTOL = 2e-4  # at which derivatives are right to a part in a thousand
RATE = 0.1  # of Adam, in free numbers that are of the order of 1 at first


@dataclasses.dataclass(frozen=True)
class Optimised:
    """What `optimise` returns.

    - `dataset`: over `restart` and `step`: `objective` and `slope`, and of the first problem's gradient `angle`,
      principal angles in degrees over `layer`, `factor` and `pair`, and `share`, the factors' shares of the norm.
    - `start`: the winner over all restarts and steps, an initialisation: `sweep(init=learned.start)` takes it.
    - `objective`: of the winner.
    """

    dataset: xr.Dataset
    start: LearnedStart
    objective: float

    @property
    def adapters(self) -> Adapters:
        """The winner's adapters on the first problem."""
        return self.start.adapters

    def __str__(self) -> str:
        numbers = self.start.numbers
        told = "; ".join(f"{name} {np.round(one, 3).tolist()}" for name, one in numbers.items())
        first, name = self.dataset["objective"].isel(step=0), self.dataset.attrs["objective"]
        return (
            f"{name}: {float(first.mean()):.4g} at first, mean of {first.size} random starts, and {self.objective:.4g} "
            f"for the best start of the same norm{f' ({told})' if told else ''}"
        )


def optimise(
    problem: Problem | Mapping[Any, Problem] | Problems,
    parameters: str | Parametrisation = "adapters",
    objective: str = "log10 loss",
    *,
    over: str = "mean",
    at: float | None = None,
    t1: float,
    alpha: float = 1e-3,
    rank: int = 4,
    restarts: int = 8,
    seed: int = 0,
    steps: int = 200,
    optimizer: optax.GradientTransformation | None = None,
    flow: Flow | str = "plain",
    solver: str = SOLVER,
    rtol: float = RTOL,
    max_steps: int = MAX_STEPS,
    progress: bool = True,
) -> Optimised:
    r"""Learns where to start: gradient descent on a run's result, through the run.

    **Arguments:**

    - `problem`: one, or a mapping from labels to several of the same shapes, a family of tasks that one start serves.
    - `parameters`: "adapters", all entries of the factors; "frames", factors with orthonormal rows of A and columns of
      B, all of one size; "scheme", the few numbers of `along_gradient`: the mix of A and B, the power of the gradient's
      singular values, and a weight for each layer; or a `Parametrisation`. All starts have the root mean square norm of
      a Gaussian start, `alpha sqrt(rank sum of inputs)`.
    - `objective`: what is to be small, as `sensitivity` names its observables: "log10 loss" at the time `at`, or a
      time, "time to 1e-6" for instance.
    - `over`: "mean" or "worst" of the objective over the problems.
    - `at`: the time of a quantity, `t1` by default. Times are sought up to `t1`.
    - `alpha`, `rank`: of the start.
    - `restarts`, `seed`: how many random starts are optimised together, and the seed of their draws.
    - `steps`, `optimizer`: how many steps, of which optimiser of optax; by default of Adam, whose step size falls from
      0.1 to 0 along a cosine.
    - `flow`, `solver`, `rtol`, `max_steps`: as for `solve`. The solver is "Tsit5", whose derivatives compile soonest;
      for long and stiff runs "auto" takes fewer steps.
    - `progress`: show progress on standard error.

    A restart whose objective or derivative is not finite stays where it is.

    **Returns:** an `Optimised`: the winner, an initialisation for `sweep`, and all that led there.

    **Raises:** `InputError` for bad arguments, and for an objective that is not finite at the start of every restart.
    """
    require_flag("progress", progress)
    search = plan_search(
        problem,
        parameters,
        objective,
        over=over,
        at=at,
        t1=t1,
        alpha=alpha,
        rank=rank,
        restarts=restarts,
        seed=seed,
        steps=steps,
        optimizer=optimizer,
        flow=flow,
        solver=solver,
        rtol=rtol,
        max_steps=max_steps,
    )
    search.check_start()
    blocks = search.outline()
    for number, values in search.solve(progress=progress):
        for name, one in values.items():
            blocks[name][number] = one
    return search.learned(blocks)


@dataclasses.dataclass(frozen=True)
class Search:
    """A checked search; `plan_search` makes it."""

    problems: Problems
    parametrisation: Parametrisation
    name: str
    objective: Objective
    optimizer: optax.GradientTransformation
    alpha: float
    rank: int
    restarts: int
    seed: int
    steps: int

    @property
    def first(self) -> Any:
        """The problem that starts are made along."""
        return self.problems.members[0]

    @property
    def radius(self) -> Array:
        """The norm of every start."""
        return jnp.asarray(gaussian_norm(self.alpha, self.rank, self.first.layers))

    def begin(self) -> State:
        """The state of every restart, before any step."""
        return first_state(self.parametrisation, self.optimizer, self.first, self.rank, self.restarts, self.seed)

    @property
    def blocks(self) -> int:
        return -(-self.steps // BLOCK)

    def outline(self) -> xr.Dataset:
        """What is stored, block by block of steps: NaN, and status -1. The last block may have fewer steps."""
        counts, spans = len(self.first.layers), Spans.of(self.first, self.rank)
        size = self.begin().flat().shape[-1]
        over_steps = {"objective": (), "slope": (), "angle": (counts, 2, spans.pairs), "share": (counts, 2)}
        dims = "block", "restart", "within"
        shape = self.blocks, self.restarts, BLOCK
        variables: dict[str, Any] = {
            name: ((*dims, *("layer", "factor", "pair")[: len(own)]), np.full((*shape, *own), np.nan))
            for name, own in over_steps.items()
        }
        variables["state"] = ("block", "restart", "number"), np.full((*shape[:2], size), np.nan)
        variables["status"] = "block", np.full(self.blocks, NOT_RUN, np.int8)
        outline = xr.Dataset(variables, coords={"layer": np.arange(1, counts + 1), "factor": ["A", "B"]})
        outline["status"].attrs |= {"flag_values": [NOT_RUN, 0], "flag_meanings": "pending success"}
        return outline.assign_attrs(self.told)

    @property
    def told(self) -> dict[str, Any]:
        """The attributes of the results."""
        return {
            "parameters": self.parametrisation.name,
            "objective": self.name,
            "over": self.objective.over,
            "at": self.objective.times[-1],
            "alpha": self.alpha,
            "rank": self.rank,
            "steps": self.steps,
            "seed": self.seed,
            "problem": str(self.first),
            "problems": len(self.problems.members),
            "problem_digest": digest(self.problems),
        }

    def solve(
        self, number: int = 0, state: np.ndarray | None = None, progress: bool = True
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """The blocks from this number on, each with its values; `state` is that of the block before."""
        now = self.begin() if state is None else self.begin().from_flat(state)
        problem, spans = self.problems.stacked, Spans.of(self.first, self.rank)
        radius = self.radius
        with Progress(self.steps, "steps", done=number * BLOCK, shown=progress) as bar:
            for block in range(number, self.blocks):
                rows = []
                for _ in range(block * BLOCK, min((block + 1) * BLOCK, self.steps)):
                    now, value, slope, adapters = step(
                        self.parametrisation, self.objective, self.optimizer, self.rank, problem, radius, now
                    )
                    angle, share = spans.look(adapters)
                    rows.append({"objective": value, "slope": slope, "angle": angle, "share": share})
                    bar.update()
                values = {name: np.stack([np.asarray(row[name]) for row in rows], axis=1) for name in rows[0]}
                yield (
                    block,
                    {name: _filled(one) for name, one in values.items()}
                    | {
                        "state": now.flat(),
                        "status": np.zeros((), np.int8),
                    },
                )

    def check_start(self) -> None:
        """Raises where the objective is not finite at the start of a restart; nothing is kept of it."""
        free = self.begin().free
        told = self.parametrisation, self.objective, self.rank, self.problems.stacked, self.radius, free
        self._check_finite(np.asarray(values_of(*told)))

    def _check_finite(self, values: np.ndarray) -> None:
        lost = int(np.sum(~np.isfinite(values)))
        must = "be finite at the start of every restart (a time must be reached by t1)"
        require(lost == 0, "objective", must, f"'{self.name}' with {lost} of {values.size} that are not")

    def learned(self, blocks: xr.Dataset) -> Optimised:
        """The result, of all blocks."""
        dataset = steps_of(blocks)
        last = self.begin().from_flat(blocks["state"].values[-1])
        winner = int(np.argmin(np.nan_to_num(np.asarray(last.best), nan=np.inf)))
        free = jax.tree.map(lambda leaf: leaf[winner], last.best_free)
        adapters = self.parametrisation.adapters(free, self.first, self.rank)
        numbers = None if self.parametrisation.numbers is None else self.parametrisation.numbers(free)
        told = {name: np.asarray(one) for name, one in (numbers or {}).items()}
        return Optimised(
            dataset, LearnedStart(on_sphere(adapters, self.radius), self.alpha, told), float(last.best[winner])
        )


def _filled(values: np.ndarray) -> np.ndarray:
    """The steps of a block, `(restart, step, ...)`, with NaN for those that the last block lacks."""
    lacks = [(0, 0), (0, BLOCK - values.shape[1]), *[(0, 0)] * (values.ndim - 2)]
    return np.pad(values, lacks, constant_values=np.nan)


def plan_search(
    problem: Any,
    parameters: Any,
    objective: Any,
    *,
    over: Any,
    at: Any,
    t1: Any,
    alpha: Any,
    rank: Any,
    restarts: Any,
    seed: Any,
    steps: Any,
    optimizer: Any,
    flow: Any,
    solver: Any,
    rtol: Any,
    max_steps: Any,
) -> Search:
    """The arguments of `optimise`, checked."""
    problems = Problems.of(problem)
    for member in problems.members:
        checked(member)
    found = as_parametrisation(parameters)
    check_alpha(alpha)
    check_rank(rank, problems.members[0].layers, bounded=not allows_any_width(problems.members[0]))
    require_integer("restarts", restarts, "be at least 1", 1)
    require_integer("seed", seed, "be at least 0", 0, 2**31 - 1)
    require_integer("steps", steps, "be at least 1", 1)
    require_integer("max_steps", max_steps, "be at least 1", 1)
    how = {"over": over, "at": at, "t1": t1, "flow": flow, "solver": solver, "rtol": rtol, "max_steps": max_steps}
    minimised = as_objective(objective, problems.members, several=bool(problems.axes), **how)
    made = adam(RATE, steps) if optimizer is None else optimizer
    optax_like = callable(getattr(made, "init", None)) and callable(getattr(made, "update", None))
    require(optax_like, "optimizer", "be a gradient transformation of optax", type(made).__name__)
    return Search(problems, found, objective, minimised, made, float(alpha), int(rank), restarts, seed, steps)


def adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with a step size that falls from `rate` to 0 along a cosine: so near the best start losses are steep."""
    require_number("rate", rate, "be positive", lambda known: known > 0)
    return optax.adam(optax.cosine_decay_schedule(rate, steps), b2=0.95)

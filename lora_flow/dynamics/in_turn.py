"""Continual learning: tasks in turn, each by fresh adapters that are then merged into the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lora_flow.arrays import require_key
from lora_flow.checks import kind, require, require_flag, require_instance
from lora_flow.dynamics.descend import descend
from lora_flow.dynamics.flows import Flow
from lora_flow.dynamics.protected import Protected
from lora_flow.dynamics.solve import STATUS, Trajectory, solve
from lora_flow.initialization import Init, initialize, keep_away
from lora_flow.problems.continual import ProtectedInputs, Tasks

FlowOf = Callable[[Tasks, np.ndarray], Flow]  # from the tasks, turned to the one to learn, and the protected inputs V


class Learned(eqx.Module):
    """The result of `learn_in_turn`, of T tasks.

    - `losses`: `(T + 1, T)`; row j has the losses of all tasks after j of them were learned, row 0 those at the start.
    - `tasks`: the tasks with all adapters merged into their weight.
    - `bases`: for each task the inputs that were protected while it was learned, `(in, k)`.
    - `runs`: for each task its `Trajectory` or `Descent`, with the losses of all tasks as observables.
    - `status`: `(T,)`, of the runs, as of a `Trajectory`.
    """

    losses: Float[np.ndarray, "stages tasks"]
    tasks: Tasks
    bases: tuple[Float[np.ndarray, "in _"], ...]
    runs: tuple[Trajectory, ...]

    @property
    def status(self) -> Int[np.ndarray, " tasks"]:
        return np.array([int(run.status) for run in self.runs])

    @property
    def when_learned(self) -> Float[np.ndarray, " tasks"]:
        """The loss of each task just after it was learned, `(T,)`: what protection costs."""
        return np.diagonal(self.losses[1:])

    @property
    def forgetting(self) -> Float[np.ndarray, " tasks"]:
        """The loss of each task at the end less that just after it was learned, `(T,)`."""
        return self.losses[-1] - self.when_learned

    def __str__(self) -> str:
        rows = []
        for j, losses in enumerate(self.losses):
            ended = f", {STATUS[self.status[j - 1]]}, {self.bases[j - 1].shape[1]} protected" if j else ""
            rows.append(f"after {j} tasks: losses {', '.join(f'{loss:.4g}' for loss in losses)}{ended}")
        return "\n".join(rows)


def learn_in_turn(
    tasks: Tasks,
    key: Array,
    *,
    rank: int,
    alpha: float | Array,
    init: Init = "gaussian",
    away: bool = True,
    flow: Flow | str | FlowOf | None = None,
    inputs: ProtectedInputs | None = None,
    **how: Any,
) -> Learned:
    r"""Learns the tasks one after another, each by an adapter of its own.

    Before each task the adapter is drawn anew, and kept away from the protected inputs V if asked. After each task it
    is merged, W <- W + s B A, and the estimate of V takes up the task's inputs. While the first task is learned nothing
    is protected, unless `inputs` has something.

    **Arguments:**

    - `tasks`: `Tasks`.
    - `key`, `rank`, `alpha`, `init`: of the draws, as for an initialisation; `init` is a name, a `Scheme` or a
      function, as in a sweep.
    - `away`: whether A starts with A V = 0 (`keep_away`).
    - `flow`: as for `solve`, or a function `(tasks, basis)` that returns the flow of the present task, `SafeGradient`
      for instance; by default `Protected(basis)`, which from A V = 0 is exactly safe.
    - `inputs`: the estimate of the inputs that are protected already; by default `ProtectedInputs` of none.
    - `how`: the arguments of `solve`, `t1` among them, or of `descend`, `steps` and `step` among them.

    **Returns:** `Learned`. A run that fails has a status, and what it came to is merged.

    **Raises:** `InputError` for bad arguments.
    """
    require_instance("tasks", tasks, Tasks, "be Tasks")
    require_key(key)
    require_flag("away", away)
    must = "be a Flow, its name, or a function (tasks, basis) that returns one"
    require(flow is None or isinstance(flow, Flow | str) or callable(flow), "flow", must, kind(flow))
    inputs = ProtectedInputs(tasks.layers[0][1]) if inputs is None else inputs
    require_instance("inputs", inputs, ProtectedInputs, "be ProtectedInputs")
    wide, size = tasks.layers[0][1], len(inputs.covariance)
    require(size == wide, "inputs", f"be an estimate of {wide} inputs, those of the layer", size)
    one = ("t1" in how) != ("steps" in how)
    require(one, "t1 or steps", "be given, and not both", ", ".join(sorted(how)) or "neither")
    tasks = eqx.tree_at(lambda one: one.now, tasks, jnp.zeros_like(tasks.now))
    losses, bases, runs = [tasks.losses()], [], []
    for each in jax.random.split(key, tasks.count):
        basis = inputs.basis
        start = initialize(init, each, tasks, rank=rank, alpha=alpha, side="A")
        if away:
            start = keep_away(start, basis)
        driven = _flow(flow, tasks, basis)
        run = (solve if "t1" in how else descend)(tasks, start, flow=driven, **how)
        inputs = inputs.extend_by(tasks.second_moments)
        tasks = tasks.merged(run.adapters)
        losses.append(tasks.losses())
        bases.append(basis)
        runs.append(run)
    return Learned(np.asarray(jnp.stack(losses)), tasks, tuple(bases), tuple(runs))


def _flow(flow: Flow | str | FlowOf | None, tasks: Tasks, basis: np.ndarray) -> Flow | str:
    if flow is None:
        return Protected(basis)
    return flow if isinstance(flow, Flow | str) else flow(tasks, basis)

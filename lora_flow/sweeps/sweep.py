"""`sweep`: a grid of runs in, one labelled dataset out."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import diffrax
import xarray as xr
from jaxtyping import ArrayLike

from lora_flow.checks import require, require_flag
from lora_flow.dynamics.flows import Flow
from lora_flow.dynamics.integrator import MAX_STEPS, RTOL
from lora_flow.initialization import Init
from lora_flow.problems.base import Problem
from lora_flow.runtime.memory import require_memory
from lora_flow.storage.folder import Folder, is_started
from lora_flow.storage.remote import run_path
from lora_flow.sweeps import from_python
from lora_flow.sweeps.executors import Executor, InProcess, OnExecutor, solved
from lora_flow.sweeps.extend import open_larger
from lora_flow.sweeps.folder import stored_layout
from lora_flow.sweeps.grid import Problems
from lora_flow.sweeps.limits import COPIES
from lora_flow.sweeps.plan import Plan, plan_sweep
from lora_flow.sweeps.run import load_run, open_runs, run
from lora_flow.sweeps.schema import failed
from lora_flow.sweeps.workers import WorkersLost


def sweep(
    problem: Problem | Mapping[Any, Problem] | Problems,
    *,
    init: Init | Sequence[Init] = "gaussian",
    side: str | Sequence[str] = "A",
    alpha: float | ArrayLike | Sequence[float] = 1e-3,
    rank: int | ArrayLike | Sequence[int] = 4,
    seeds: int | ArrayLike | Sequence[int] = 1,
    t1: float | None = None,
    saves: int | ArrayLike | Sequence[float] | Sequence[int] = 101,
    flow: Flow | str = "plain",
    solver: diffrax.AbstractSolver | str = "auto",
    rtol: float = RTOL,
    max_steps: int = MAX_STEPS,
    descend: str | Sequence[str] | None = None,
    steps: int | None = None,
    gradient_noise: float | ArrayLike | Sequence[float] = 0.0,
    batch_size: int = 0,
    devices: int = 0,
    details: bool = False,
    progress: bool = True,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    extend: bool = False,
    client: Any = None,
    executor: Any = None,
) -> xr.Dataset:
    r"""Solves the gradient flow for every combination of initialisation, side, alpha, rank and seed.

    With `descend` it trains by gradient descent, for every combination of these with optimiser and step size.

    All lanes share one compiled program: ranks are padded to the largest, and batches are spread over the devices
    present, on which no number depends. All combinations share the seeds.

    **Arguments:**

    - `problem`: a `Factorization`, or anything that meets `Problem`; or a mapping from labels to problems of one shape,
      `{d: aligned_problem(key, delta_w=d) for d in (0.25, 0.01)}` for instance, which become the dimension `problem`.
    - `init`: one value or several: names from `INITIALIZATIONS`, or functions `init(key, problem, *, rank, alpha)` and
      `Scheme`s of your own, which are labelled by their names.
    - `side`: "A", "B" or both: the factor that a one-sided initialisation draws.
    - `alpha`, `rank`: one positive scale or several, and one rank or several.
    - `seeds`: a number of seeds, from 0, or the seeds themselves.
    - `t1`, `saves`, `flow`, `solver`, `rtol`, `max_steps`: as for `solve`.
    - `descend`, `steps`: so many steps of gradient descent in place of a flow. `descend` is one text or several, an
      optimiser and its step size each: "adam:1e-3", "sign:1e-3" or "gd:0.1", the names being
      `lora_flow.dynamics.optimizers.OPTIMIZERS`. All optimisers have the same step sizes. `saves` are then iterations,
      as for `descend`, and `t1`, `flow`, `solver`, `rtol` and `max_steps` are left out.
    - `gradient_noise`: with `descend`, the standard deviation of the noise in every entry of dL/dW at every step (see
      `gradient_noise`), one or several. Each seed has its own noise.
    - `batch_size`: the largest number of lanes that one device steps together; 0 for 64 on a CPU and 2048
      elsewhere. A stored run keeps its own.
    - `devices`: the number of JAX's devices that batches are spread over; 0 for all.
    - `details`: also store what `analyse` computes from the adapters at every saved time: singular values of the
      update, its terms, growth rates and more. These adapters take memory, one batch at a time.
    - `progress`: show progress and the time left on standard error: a bar on a terminal, lines elsewhere. At the end a
      line says how many runs ended with a status other than success, where some did.
    - `out`: a run folder to store the results in, box by box as they are solved, or the URL of one in an object store
      (s3://bucket/runs/x). The same call goes on with a run that was interrupted, and returns one that is finished.
    - `overwrite`: replace the run in `out`, whatever was asked for then.
    - `extend`: give the run in `out`, which this function has started, what `init`, `alpha`, `rank` and `seeds` hold
      beyond its own values. Only what is new is solved, and its own values come first. See `lora_flow.extend`.
    - `client`: a `dask.distributed.Client`, whose workers solve the boxes, and store them where there is an `out`.
    - `executor`: the same with anything that has `submit(function, *arguments)` as in `concurrent.futures`.

    **Returns:** an `xarray.Dataset` with dims `init, alpha, rank, seed, time` (and `side` before alpha for several
    sides, `problem` first for several problems). A descent has `iteration` in place of `time`, and before alpha
    `optimizer`, `step` and `gradient_noise`, which are attributes where there is one value. Over all dims it has the
    variables of `Trajectory.observables`; over all but `time` it has `status` (see its flag attributes), `steps`,
    `initial_loss`, `rounding_floor` (a loss below it is at rounding), `dead_directions` and `loss_floor` (see
    `lora_flow.sweeps.values.start_values`). Initialisations that offset the frozen weights by their start
    (`Scheme.offset`) are solved on `Offset(problem, start)`. With `out` the dataset is that of `load_run(out)`.

    **Raises:** `InputError` for bad arguments, for a loss that is negative at a start, and for an `out` that holds
    anything but the run that is asked for; `WorkersLost` where a cluster or an executor has gone. A lane that fails has
    a status, and raises nothing.
    """
    require_flag("progress", progress)
    require_flag("overwrite", overwrite)
    require_flag("extend", extend)
    require(out is not None or not overwrite, "overwrite", "be left out without out", overwrite)
    require(out is not None or not extend, "extend", "be left out without out", extend)
    require(not (overwrite and extend), "overwrite and extend", "not be given together", "both")
    solvers = _executor(client, executor)
    folder = None if out is None else run_path("out", out)
    started = folder if folder is not None and not overwrite and is_started(folder) else None
    planned = functools.partial(
        plan_sweep,
        problem,
        side=side,
        t1=t1,
        saves=saves,
        flow=flow,
        solver=solver,
        rtol=rtol,
        max_steps=max_steps,
        descend=descend,
        steps=steps,
        gradient_noise=gradient_noise,
        batch_size=batch_size,
        devices=devices,
        details=details,
        layout=None if started is None else stored_layout(started),
    )
    plan = planned(init=init, alpha=alpha, rank=rank, seeds=seeds)
    if folder is None:
        dataset = _in_memory(plan, solvers, progress)
    elif started is not None and extend:
        then, now = from_python.grown(started, plan, planned)
        with open_larger(started, (from_python.told(then), then), (from_python.told(now), now)) as opened:
            plan, dataset = now, _solved_in(opened, now, solvers, progress)
    else:
        with open_runs(folder, {"": (from_python.told(plan), plan)}, resume=not overwrite, overwrite=overwrite) as runs:
            dataset = _solved_in(runs[""], plan, solvers, progress)
    if progress:
        for status, count in failed([dataset]).items():
            print(f"{count} of {plan.grid.size} runs ended with status {status}", file=sys.stderr or io.StringIO())
    return dataset


def _in_memory(plan: Plan, solvers: Executor, progress: bool) -> xr.Dataset:
    require_memory("the sweep", f"{plan.grid.size} runs at {len(plan.way.saved)} times", COPIES * plan.nbytes)
    dataset = plan.empty()
    for number, values in solved(plan, None, range(plan.layout.boxes.count), solvers, progress):
        block = plan.layout.boxes.block(number)
        for name, one in (values or {}).items():
            whole = dataset[name].values.reshape(*plan.grid.shape, *one.shape[1:])  # the same memory
            whole[block] = one.reshape(whole[block].shape)
    return dataset


def _executor(client: Any, executor: Any) -> Executor:
    """Who solves for these arguments of `sweep`."""
    require(client is None or executor is None, "client and executor", "not be given together", "both")
    if client is not None:
        return _on_dask(client)
    return InProcess() if executor is None else OnExecutor(executor)


def _on_dask(client: Any) -> Executor:
    """The workers of a client's cluster, where Dask is installed."""
    try:
        from lora_flow.sweeps.dask import OnDask
    except ImportError as error:
        require(False, "client", "be a dask.distributed.Client: pip install 'lora-flow[cluster]'", error)
    return OnDask(client)


def _solved_in(folder: Folder, plan: Plan, solvers: Executor, progress: bool) -> xr.Dataset:
    """The results of a run folder, once all boxes are solved that are not stored there."""
    try:
        run(folder, plan, solvers, progress)
    except WorkersLost as error:
        go_on = from_python.go_on(folder.path)
        raise WorkersLost(f"{error}; solved boxes are stored, continue with: {go_on}") from error
    return load_run(folder.path)

"""A run that is asked to grow: which of its settings may change and how, and `extend`. Imports no JAX by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_flow.checks import require, require_flag
from lora_flow.settings import Settings, build_plan, from_table, to_table
from lora_flow.sizes import check_sizes
from lora_flow.storage.disk import used
from lora_flow.storage.remote import RunPath, as_file, run_path
from lora_flow.sweeps.axes import counted, listed, union

if TYPE_CHECKING:
    import xarray as xr
    from jaxtyping import ArrayLike

    from lora_flow.problems.base import Problem
    from lora_flow.storage.folder import Folder
    from lora_flow.sweeps.grid import Problems
    from lora_flow.sweeps.plan import Plan

AXES = ("init", "alpha", "rank", "seeds")


def extend(
    path: str | os.PathLike[str],
    *,
    init: str | Sequence[str] | None = None,
    alpha: float | ArrayLike | Sequence[float] | None = None,
    rank: int | ArrayLike | Sequence[int] | None = None,
    seeds: int | ArrayLike | Sequence[int] | None = None,
    problem: Problem | Mapping[Any, Problem] | Problems | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Gives a stored run further values along its axes, and solves only what is new.

    What is stored keeps its bits. The larger run takes the place of the old one in one step: whatever ends the process,
    one of the two is there, and `lora-flow sweep --resume` or another `extend` goes on. An unfinished or damaged run is
    finished and mended as well. Everything but the axes stays as it was.

    **Arguments:**

    - `path`: the run folder.
    - `init`, `alpha`, `rank`: one value or several, all that the axis is to have or only the further ones. The old
      values come first. Initialisations by their names.
    - `seeds`: the number of seeds that there are to be, from 0, or further seeds.
    - `problem`: for a run of a problem that was not drawn from the settings, that problem.
    - `progress`: as for `sweep`.

    **Returns:** the larger run, as `load_run` does.

    **Raises:** `InputError` for a folder that holds no run or a figure's, for a run by other versions or on another
    platform, and for bad values.
    """
    from lora_flow.storage.folder import read_settings
    from lora_flow.sweeps.from_python import is_from_python
    from lora_flow.sweeps.run import load_run, run

    require_flag("progress", progress)
    folder = run_path("the run folder", path)
    stored, must = read_settings(folder), "be extended by the call of sweep that has started it, with extend=True"
    require(not is_from_python(stored), f"'{folder}'", must, "this function")
    then = dataclasses.replace(from_table(stored, f"{folder}/settings.toml"), devices=0)
    given = {"init": init, "alpha": alpha, "rank": rank, "seeds": seeds}
    given = {name: _plain(value) for name, value in given.items() if value is not None}
    asked = from_table(to_table(then) | given, "extend")
    with growing(folder, then, united(folder, then, asked), problem) as (opened, plan):
        run(opened, plan, progress=progress)
    return load_run(folder)


def united(path: RunPath, then: Settings, asked: Settings) -> Settings:
    """The settings of a run with what is asked for beside what there is; what there is comes first on every axis.

    **Raises:** `InputError` for other changes, for fewer seeds, and for what cannot fit.
    """
    there = used(path)
    check_sizes(asked, max(asked.devices, 1), path, there)  # before so many seeds are listed
    for name in [name for name in vars(then) if name not in (*AXES, "devices")]:
        same = getattr(then, name) == getattr(asked, name)
        require(same, name, f"be {getattr(then, name)}, as '{path}' was started, to extend it", getattr(asked, name))
    axes: dict[str, Any] = {
        name: union(getattr(then, name), getattr(asked, name)) for name in ("init", "alpha", "rank")
    }
    seeds = union(listed(then.seeds), listed(asked.seeds))
    fewer = isinstance(asked.seeds, int) and asked.seeds < len(seeds) == len(listed(then.seeds))
    require(not fewer, "seeds", f"be at least {len(seeds)}, as many as '{path}' has, or further seeds", asked.seeds)
    now = dataclasses.replace(asked, **axes, seeds=counted(seeds))
    check_sizes(now, max(now.devices, 1), path, there)
    return now


@contextlib.contextmanager
def growing(
    path: RunPath, then: Settings, now: Settings, problem: Problem | Mapping[Any, Problem] | Problems | None = None
) -> Iterator[tuple[Folder, Plan]]:
    """The folder, locked, and the plan of a run that grows from what it was `then` to what it is `now`, see `united`.

    Everything that can be refused is refused before anything is written.
    """
    from lora_flow.sweeps.extend import open_larger
    from lora_flow.sweeps.folder import kept_problem, stored_layout

    then, kept = dataclasses.replace(then, devices=now.devices), kept_problem(path)
    with contextlib.ExitStack() as held:
        file = None if kept is None else held.enter_context(as_file(kept))
        drawn_from = then if file is None else dataclasses.replace(then, problem=str(file))
        old = build_plan(drawn_from, stored_layout(path), problem)
    plan = build_plan(now, old.noted_layout, old.problems)
    with open_larger(path, (to_table(then), old), (to_table(now), plan)) as folder:
        yield folder, plan


def _plain(value: Any) -> Any:
    """Numbers of NumPy and JAX as Python's, several of them in a list."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(map(_plain, value)) if isinstance(value, (list, tuple, range)) else value

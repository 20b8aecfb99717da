"""Runs that Python's `sweep` has started: their settings file, and how they go on. Imports no JAX by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lora_flow.checks import require
from lora_flow.storage.folder import is_started, read_settings
from lora_flow.storage.remote import RunPath
from lora_flow.sweeps.axes import counted, listed, union

if TYPE_CHECKING:
    from lora_flow.sweeps.plan import Plan

PYTHON = "python"  # the problem of such a run, which no command can build again
ALWAYS = {"problem_class", "init", "side", "alpha", "rank", "seeds", "saves", "precision"}


def is_from_python(settings: Mapping[str, Any]) -> bool:
    return settings.get("problem") == PYTHON


def go_on(path: str | RunPath) -> str:
    """How a sweep's run in this folder is continued."""
    python = is_started(path) and is_from_python(read_settings(path))
    return f"sweep(..., out={str(path)!r}) in Python" if python else f"lora-flow sweep --out {path} --resume"


def check_from_command(path: str | RunPath, settings: Mapping[str, Any]) -> None:
    """Raises where Python's `sweep` has started a run that a command is to continue."""
    must = "be continued from Python, by the call of sweep that has started it"
    require(not is_from_python(settings), f"'{path}'", must, "a command")


def told(plan: Plan) -> dict[str, Any]:
    """The settings of a plan that was made in Python, as they are stored."""
    grid, way, problems = plan.grid, plan.way, plan.problems
    seeds = len(grid.seed) if isinstance(grid.seed, range) else list(grid.seed)
    of_several = {"problems": list(map(str, problems.axes["problem"]))} if "problem" in problems.axes else {}
    return of_several | {
        "problem": PYTHON,
        "problem_class": type(problems.members[0]).__qualname__,
        "init": list(grid.init),
        "side": list(grid.side),
        "alpha": list(grid.alpha),
        "rank": list(grid.rank),
        "seeds": seeds,
        **{name: list(values) for name, values in grid.descents.items()},
        "saves": len(way.saved),
        "details": bool(way.save_adapters),
        **way.told,
        "batch_size": plan.layout.width,
        "precision": "double" if plan.dtype == "float64" else "single",
    }


def grown(path: RunPath, asked: Plan, planned: Callable[..., Plan]) -> tuple[Plan, Plan]:
    """A stored run as it was, and as it is with what is `asked` for; its own values come first on every axis.

    `planned` makes the plan of given `init`, `alpha`, `rank` and `seeds`, with all else as it is asked for.

    **Raises:** `InputError` where a command has started the run, and where a value that it has is not asked for.
    """
    stored, grid = read_settings(path), asked.grid
    require(is_from_python(stored), f"'{path}'", "be extended by lora_flow.extend, as a command's run", "sweep")
    had = {name: stored[name] for name in ("init", "alpha", "rank")} | {"seeds": listed(stored["seeds"])}
    asks = {"init": grid.init, "alpha": grid.alpha, "rank": grid.rank, "seeds": grid.seed}
    for name, values in had.items():
        missing = sorted(set(values) - set(asks[name]))
        require(not missing, name, f"hold all that '{path}' has, to extend it", f"none of {missing}")

    def plan(axes: Mapping[str, Any]) -> Plan:
        seeds, schemes = counted(tuple(axes["seeds"])), [grid.schemes[label] for label in axes["init"]]
        return planned(**dict(axes) | {"init": schemes, "seeds": seeds})

    return plan(had), plan({name: union(values, asks[name]) for name, values in had.items()})

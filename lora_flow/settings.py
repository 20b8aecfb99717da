"""The settings of the command line and of settings files, and their way to a checked plan. Imports no JAX by itself."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_flow.checks import InputError, PrecisionWarning, require, require_choice
from lora_flow.flags import Descents, Runs, Solving, Times
from lora_flow.recipes.kinds import Flags, draw_all, is_file_name

if TYPE_CHECKING:
    from lora_flow.sweeps.plan import Plan


@dataclasses.dataclass(frozen=True)
class Settings(Descents, Solving, Flags, Times, Runs):
    """Every setting of a sweep, which runs all combinations of the values given."""


OF_FLOWS = ("t1", "spacing", "flow", "solver", "rtol", "max_steps")  # left out with a descent
_FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
_DEFAULTS = Settings()


def from_table(table: Mapping[str, Any], source: str) -> Settings:
    """Settings from a TOML table; lists become tuples, and single values where several are taken are welcome."""
    values = {}
    for name, value in table.items():
        require_choice(f"a setting in '{source}'", name, _FIELDS)
        values[name] = _coerce(name, value, getattr(Settings(), name))
    return Settings(**values)


def to_table(settings: Settings) -> dict[str, Any]:
    """The inverse of `from_table`, without the settings of descents for a flow, and the other way round."""
    left_out = OF_FLOWS if settings.descend else [field.name for field in dataclasses.fields(Descents)]
    table = {name: value for name, value in dataclasses.asdict(settings).items() if name not in left_out}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in table.items()}


def command_of(table: Mapping[str, Any], out: str) -> str:
    """The command that makes a run of these settings again: its flags that are not the defaults."""
    settings, words = from_table(table, "settings.toml"), ["lora-flow", "sweep"]
    for name in _FIELDS:
        value = getattr(settings, name)
        if value == getattr(_DEFAULTS, name):
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            told = value if isinstance(value, tuple) else (value,)
            words += [flag, *(repr(one) if isinstance(one, float) else shlex.quote(str(one)) for one in told)]
    return " ".join([*words, "--out", shlex.quote(out)])


def with_absolute_path(settings: Settings, folder: Path | None = None) -> Settings:
    """A problem file by its absolute path, from `folder` or here, so that a run can be resumed from anywhere."""
    if not is_file_name(settings.problem):
        return settings
    require("\0" not in settings.problem, "problem", "be a file's name", repr(settings.problem))
    pair = settings.problem.endswith(".npy")
    parts = settings.problem.split(",") if pair else [settings.problem]
    paths = (os.path.join(folder or "", os.path.expanduser(part)) for part in parts)
    return dataclasses.replace(settings, problem=",".join(map(os.path.realpath, paths)))


def sweep_arguments(settings: Settings) -> dict[str, Any]:
    """The arguments of `sweep` that these settings give, besides the problems."""
    from lora_flow.dynamics.solve import save_times

    names = ("init", "side", "alpha", "rank", "seeds", "flow", "solver", "rtol", "max_steps", "descend")
    told = {name: getattr(settings, name) for name in (*names, "gradient_noise", "batch_size", "devices", "details")}
    if settings.descend:
        for name in ("t1", "spacing"):
            value = getattr(settings, name)
            require(value == _FIELDS[name].default, name, "be left out with descend", value)
        return told | {"saves": settings.saves, "steps": settings.steps}
    told["descend"] = None
    require(settings.steps == _FIELDS["steps"].default, "steps", "be left out without descend", settings.steps)
    return told | {"t1": settings.t1, "saves": save_times(settings.t1, settings.saves, settings.spacing)}


def build_plan(settings: Settings, layout: Mapping[str, Any] | None = None, problem: Any = None) -> Plan:
    """The checked plan of a sweep; in single precision a tolerance it cannot carry is an error, not a warning.

    `layout` is as for `plan_sweep`; a `problem` takes the place of the one that the settings draw.
    """
    from lora_flow.sweeps.plan import plan_sweep

    with warnings.catch_warnings():
        warnings.simplefilter("error", PrecisionWarning)
        try:
            drawn = draw_all(settings) if problem is None else problem
            return plan_sweep(drawn, **sweep_arguments(settings), layout=layout)
        except PrecisionWarning as warning:
            raise InputError(str(warning)) from warning


def _coerce(name: str, value: Any, default: Any) -> Any:
    if name == "seeds" and isinstance(value, list):
        return tuple(_coerce("a seed", one, default) for one in value)
    if isinstance(default, tuple):
        listed = value if isinstance(value, list) else [value]
        return tuple(_coerce(name, one, default[0] if default else "") for one in listed)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 10**300 else math.inf  # which nothing takes
    if name == "component":
        value = str(value)
    kinds = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    require(type(value) is type(default), name, f"be {kinds[type(default)]}", repr(value))
    return value

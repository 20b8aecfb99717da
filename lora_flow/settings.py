"""The settings of the command line and of settings files, and their way to a checked plan. Imports no JAX by itself."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_flow.checks import InputError, PrecisionWarning, require, require_choice
from lora_flow.flags import Aligned, Network, Pretrained, Regression, Runs, Solving, Times, Trained
from lora_flow.sweeps.sizes import check_sizes

if TYPE_CHECKING:
    from jaxtyping import Array

    from lora_flow.problems.base import Factorization, Problem
    from lora_flow.sweeps.grid import Problems
    from lora_flow.sweeps.plan import Plan

PRECISIONS = ("double", "single")


@dataclasses.dataclass(frozen=True)
class Settings(Solving, Network, Regression, Pretrained, Aligned, Trained, Times, Runs):
    """Every setting of a sweep, which runs all combinations of the values given."""


PROBLEMS = ("aligned", "pretrained", "regression", "network", "digits")
OWN_FLAGS = {  # of the problems that are drawn; left out with any other
    "aligned": ("m", "n", "h", "delta_w", "shift_scale", "component"),
    "pretrained": ("m", "n", "h", "shift_scale", "component", "pretraining", "pretraining_alpha"),
    "regression": ("m", "n", "target_rank", "kappa", "samples", "input_kappa", "activation"),
    "network": ("m", "n", "samples", "input_rank", "input_kappa", "target_noise"),
}
NOT_TAKEN = {"regression": ("noise",), "network": ("angle", "noise")}  # flags of fine-tuning that these do not take
PROBLEM_AXES = ("delta_w", "problem_seed", "angle", "noise", "kappa", "pretraining")  # several values: several problems
_FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def from_table(table: Mapping[str, Any], source: str) -> Settings:
    """Settings from a TOML table; lists become tuples, and single values where several are taken are welcome."""
    values = {}
    for name, value in table.items():
        require_choice(f"a setting in '{source}'", name, _FIELDS)
        values[name] = _coerce(name, value, getattr(Settings(), name))
    return Settings(**values)


def to_table(settings: Settings) -> dict[str, Any]:
    """The inverse of `from_table`."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(settings).items()
    }


def with_absolute_path(settings: Settings, folder: Path | None = None) -> Settings:
    """A problem file by its absolute path, from `folder` or here, so that a run can be resumed from anywhere."""
    if not _is_file_name(settings.problem):
        return settings
    require("\0" not in settings.problem, "problem", "be a file's name", repr(settings.problem))
    path = os.path.join(folder or "", os.path.expanduser(settings.problem))
    return dataclasses.replace(settings, problem=os.path.realpath(path))


def start_jax(settings: Settings) -> None:
    """Sets what JAX must know before it is imported: one CPU device a core, the precision, and where programs are kept.

    Compiled programs are kept from one command to the next in the user's cache folder, or where JAX's own variable
    `JAX_COMPILATION_CACHE_DIR` says; nowhere, if the user's may not be written.
    """
    require_choice("precision", settings.precision, PRECISIONS)
    check_sizes(settings, devices=max(settings.devices, 1))
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = f"--xla_force_host_platform_device_count={min(max(settings.devices, 0) or cores, cores)}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
    import jax

    jax.config.update("jax_enable_x64", settings.precision == "double")
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lora_flow", "programs")
        if _is_writable(cache):  # or else JAX warns of every program
            jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def build_problems(settings: Settings) -> Problems:
    """The problems that the settings name: one, or one for each combination of the flags that take several values."""
    import jax

    from lora_flow.sweeps.grid import Problems

    _check_flags(settings)
    axes = {name: getattr(settings, name) for name in PROBLEM_AXES}
    members = []
    for values in itertools.product(*axes.values()):
        one = dict(zip(PROBLEM_AXES, values, strict=True))
        members.append(_problem(settings, one, jax.random.key(one["problem_seed"])))
    for name, listed in axes.items():
        require(len(set(listed)) == len(listed), name, "name each value once", listed)
    return Problems(tuple(members), {name: listed for name, listed in axes.items() if len(listed) > 1})


def _check_flags(settings: Settings) -> None:
    """Raises where a flag of another problem was given."""
    own = OWN_FLAGS.get(settings.problem, ())
    others = dict.fromkeys(name for names in OWN_FLAGS.values() for name in names if name not in own)
    for name in (*others, *NOT_TAKEN.get(settings.problem, ())):
        value = getattr(settings, name)
        require(value == _FIELDS[name].default, name, f"be left out with problem '{settings.problem}'", value)
    unknown = settings.problem not in PROBLEMS and not _is_file_name(settings.problem)
    if unknown:
        require_choice("problem", settings.problem, PROBLEMS, "or an .npz or .safetensors file")


def _problem(settings: Settings, axes: Mapping[str, Any], key: Array) -> Problem:
    import jax

    from lora_flow.recipes.network import network_problem
    from lora_flow.recipes.one_layer import regression_problem
    from lora_flow.recipes.targets import misaligned, noisy

    if settings.problem == "network":
        return network_problem(
            key,
            m=settings.m,
            n=settings.n,
            samples=settings.samples,
            input_rank=settings.input_rank,
            input_kappa=settings.input_kappa,
            target_noise=settings.target_noise,
        )
    if settings.problem == "regression":
        return regression_problem(
            key,
            m=settings.m,
            n=settings.n,
            target_rank=settings.target_rank,
            kappa=axes["kappa"],
            angle=axes["angle"],
            samples=settings.samples,
            input_kappa=settings.input_kappa,
            activation=settings.activation,
        )
    turned = misaligned(_factorization(settings, axes, key), jax.random.fold_in(key, 1), angle=axes["angle"])
    return noisy(turned, jax.random.fold_in(key, 2), noise=axes["noise"])


def _factorization(settings: Settings, axes: Mapping[str, Any], key: Array) -> Factorization:
    from lora_flow.recipes import network as pretraining
    from lora_flow.recipes import targets

    if settings.problem == "digits":
        return targets.digits_problem()
    if settings.problem not in PROBLEMS:
        return targets.load_problem(settings.problem)
    scale = settings.shift_scale
    drawn: dict[str, Any] = {
        "m": settings.m,
        "n": settings.n,
        "h": settings.h,
        "shift_scale": scale[0] if len(scale) == 1 else scale,
        "component": settings.component,
    }
    if settings.problem == "pretrained":
        start = {"init": axes["pretraining"], "alpha": settings.pretraining_alpha}
        must = "be positive and finite"
        require(0 < settings.pretraining_alpha < math.inf, "pretraining_alpha", must, settings.pretraining_alpha)
        _check_pretraining(axes["pretraining"])
        return pretraining.pretrained_problem(key, **drawn, **start)
    return targets.aligned_problem(key, **drawn, delta_w=axes["delta_w"])


def _check_pretraining(init: str) -> None:
    from lora_flow.initialization import find_scheme

    try:
        scheme = find_scheme(init)
    except InputError as error:
        raise InputError(f"pretraining: {error}") from error
    require(scheme.network, "pretraining", "be an initialisation of networks (lora-flow inits marks them)", f"'{init}'")


def sweep_arguments(settings: Settings) -> dict[str, Any]:
    """What `sweep` is told of these settings, besides the problems."""
    from lora_flow.dynamics.solve import save_times

    names = ("init", "side", "alpha", "rank", "seeds", "t1", "flow", "solver", "rtol", "max_steps")
    told = {name: getattr(settings, name) for name in (*names, "batch_size", "devices", "details")}
    return told | {"saves": save_times(settings.t1, settings.saves, settings.spacing)}


def build_plan(settings: Settings) -> Plan:
    """The checked plan of a sweep; in single precision a tolerance it cannot carry is an error, not a warning."""
    from lora_flow.sweeps.plan import plan_sweep

    with warnings.catch_warnings():
        warnings.simplefilter("error", PrecisionWarning)
        try:
            return plan_sweep(build_problems(settings), **sweep_arguments(settings))
        except PrecisionWarning as warning:
            raise InputError(str(warning)) from warning


def _is_file_name(problem: str) -> bool:
    return "." in problem or "/" in problem


def _coerce(name: str, value: Any, default: Any) -> Any:
    if name == "seeds" and isinstance(value, list):
        return tuple(_coerce("a seed", one, default) for one in value)
    if isinstance(default, tuple):
        listed = value if isinstance(value, list) else [value]
        return tuple(_coerce(name, one, default[0]) for one in listed)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 10**300 else math.inf  # which nothing takes
    if name == "component":
        value = str(value)
    kinds = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    require(type(value) is type(default), name, f"be {kinds[type(default)]}", repr(value))
    return value

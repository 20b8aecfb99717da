"""`lora-flow sweep`: a grid of settings, solved into a run folder. `figure` solves its runs in the same way."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lora_flow import flags
from lora_flow.checks import require
from lora_flow.cli.cluster import Make, cluster_of, executor_of
from lora_flow.cli.groups import Draws, OnGrid, OnProblem, Pictures
from lora_flow.cli.larger import solve_larger
from lora_flow.cli.parts import part_of, solve_part
from lora_flow.runtime.interrupts import whole
from lora_flow.runtime.start import start_jax
from lora_flow.settings import Settings, build_plan, from_table, to_table, with_absolute_path
from lora_flow.sizes import check_sizes
from lora_flow.storage.disk import used
from lora_flow.storage.remote import RunPath, as_file, run_path
from lora_flow.storage.toml import read_toml

if TYPE_CHECKING:
    from lora_flow.sweeps.plan import Plan
    from lora_flow.sweeps.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Draws, OnProblem, OnGrid):
    """Solve the gradient flow for every combination of initialisation, side, alpha, rank and seed; or train by gradient
    descent.

    Results go to a run folder: settings.toml, results.zarr (open it with lora_flow.load_run), figures/ and report.md.
    A box of runs is stored as soon as it is solved. Ctrl-C or worse loses only those in flight; --resume continues.

    The paper's main experiment:

    lora-flow sweep --alpha 1e-3 1e-4 1e-5 --seeds 30 --init gaussian spectral --side B --out runs/demo

    A target of your own:

    lora-flow sweep --problem target.npz --alpha 1e-3 --rank 2 4 8 --t1 100 --out runs/mine

    A linear network from scratch, of several widths:

    lora-flow sweep --problem network --init gaussian-both:25 balanced --alpha 0.1 --rank 50 200 --t1 20 --out runs/net

    A symmetric matrix of one factor, with fewer, as many and more columns than it needs:

    lora-flow sweep --problem symmetric --eigenvalues 2 1 --init tied --alpha 0.1 --rank 1 2 4 --t1 50 --out runs/sym

    LoRA on an attention head, with few and many sequences:

    lora-flow sweep --problem attention --m 100 --sample-ratio 1 3 --alpha 0.01 --rank 1 --t1 20 --out runs/head

    LoRA on weights that are trained first:

    lora-flow sweep --problem pretrained --pretraining gaussian-both:0.1 gaussian-both:10 --alpha 1e-4 --out runs/pre

    LoRA trained by Adam instead, with two step sizes:

    lora-flow sweep --descend adam:1e-3,adam:1e-2 --steps 300 --alpha 1e-2 1e-1 --seeds 5 --out runs/adam

    After an interruption:

    lora-flow sweep --out runs/demo --resume

    Further seeds, alphas, ranks or initialisations for a run that there is:

    lora-flow sweep --out runs/demo --extend --seeds 60

    By several processes that share a folder, each started so with its number, or as a job array of SLURM or PBS:

    lora-flow sweep --seeds 1000 --out runs/big --part 0/4

    By the workers of a Dask cluster, four of them here:

    lora-flow sweep --seeds 1000 --out runs/big --cluster local:4
    """

    out: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """The run folder, or its URL in an object store, such as s3://bucket/runs/x."""
    config: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """A TOML file with any of the settings below (a run's settings.toml is one); flags override it."""
    resume: bool = False
    """Continue an unfinished run, with the settings that it was started with."""
    overwrite: bool = False
    """Replace the run folder if one exists."""
    extend: bool = False
    """Add values to a run: further --init, --alpha, --rank or --seeds. Only what is new is solved."""
    part: Annotated[str | None, tyro.conf.arg(metavar="I/N")] = None
    """Solve one of N parts of the run, I from 0, beside the processes that solve the others in the same folder; then
    whatever they have left. In a job array of SLURM or PBS the parts are the array's, unless this says "none"."""
    cluster: Annotated[str | None, tyro.conf.arg(metavar="CLUSTER")] = None
    """Have a Dask cluster solve the run: local:N for N workers on this machine, the address of a scheduler
    (tcp://node7:8786), or a TOML file that names the cluster's class (docs/large-sweeps.md has one for SLURM)."""
    times: flags.Times = dataclasses.field(default_factory=flags.Times)
    descents: flags.Descents = dataclasses.field(default_factory=flags.Descents)
    solver: flags.Solving = dataclasses.field(default_factory=flags.Solving)

    @property
    def settings(self) -> Settings:
        """All the groups of flags as one."""
        return Settings(**self.grouped)

    def with_settings(self, settings: Settings) -> Sweep:
        """The command with these settings in place of its own."""
        groups = {
            name: kind(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(kind)})
            for name, kind in GROUPS.items()
        }
        changed: Any = groups
        return dataclasses.replace(self, **changed)

    def from_file(self) -> Sweep | None:
        """The command with the settings that --resume or --config name, where one of them is given."""
        require(not (self.resume and self.overwrite), "resume and overwrite", "not be given together", "both")
        require(not (self.resume and self.config), "config", "be left out with --resume", self.config)
        if self.extend:
            given = {"resume": self.resume, "overwrite": self.overwrite, "part": self.part, "config": self.config}
            for name, value in given.items():
                require(not value, name, "be left out with --extend", f"--{name}")
        if self.resume or self.extend:
            return self.with_settings(stored(self.out))
        if self.config is None:
            return None
        return self.with_settings(read_config(self.config))

    def run(self) -> int:
        go_on, settings = f"lora-flow sweep --out {self.out} --resume", with_absolute_path(self.settings)
        require(self.part in (None, "none") or not self.cluster, "part and cluster", "not be given together", "both")
        cluster = cluster_of(self.cluster) if self.cluster is not None else None
        if self.extend:
            return solve_larger(self.out, stored(self.out), settings, go_on, cluster)
        part = None if (self.overwrite or cluster) and self.part is None else part_of(self.part, os.environ)
        if part is None:
            return solve_runs(self.out, {"": settings}, self.resume, self.overwrite, {}, go_on, cluster)
        require(not self.overwrite, "overwrite", "be left out with --part", "both")
        return solve_part(self.out, plan_run(run_path("out", self.out), settings, True, False), part, go_on)


GROUPS: dict[str, Any] = {
    field.name: field.default_factory
    for field in dataclasses.fields(Sweep)
    if field.default_factory not in (dataclasses.MISSING, Pictures)
}


def solve_runs(
    out: str,
    runs: Mapping[str, Settings],
    resume: bool,
    overwrite: bool,
    attrs: Mapping[str, str],
    go_on: str,
    cluster: Make | None = None,
) -> int:
    """Solves and draws runs below a folder, of one run "" the folder itself.

    Everything that can be refused is refused before anything is written. `go_on` is the command that goes on with the
    runs once they are interrupted. Without a `cluster` this process solves them.
    """
    from lora_flow.cli.plot import draw
    from lora_flow.sweeps.run import open_runs, run

    root = run_path("out", out)
    planned = {name: plan_run(root / name, settings, resume, overwrite) for name, settings in runs.items()}
    with contextlib.ExitStack() as held:
        solvers = held.enter_context(contextlib.ExitStack())
        executor = solvers.enter_context(executor_of(cluster))
        with whole(f"nothing is stored yet, continue with: {go_on}"):
            opened = open_runs(root, planned, resume=resume, overwrite=overwrite, attrs=attrs)
            folders = held.enter_context(opened)
        with solvers:
            for name, folder in folders.items():
                plan = planned[name][1]
                if folder.damaged:
                    print(f"damaged, and solved again: {', '.join(folder.damaged)}")
                print(describe(plan))
                run(folder, plan, executor, go_on=go_on)
        return draw(out)


def plan_run(path: RunPath, settings: Settings, resume: bool, overwrite: bool) -> Run:
    """What a run is asked for and its plan; refused if the folder is another's, or the run cannot fit."""
    from lora_flow.storage.folder import is_started
    from lora_flow.sweeps.folder import SWEEP, kept_problem, stored_layout

    kept, layout, there = None, None, 0
    if resume and is_started(path):
        there = used(path)
        layout = stored_layout(path)
        check_unchanged(settings, stored(str(path)), str(path))
        kept = kept_problem(path)
        if kept is not None:
            print(f"problem: {kept}, a copy of '{settings.problem}'")
    else:
        SWEEP.check_free(path, overwrite)
    check_sizes(settings, max(settings.devices, 1), path, there)
    start_jax(settings.precision, settings.devices)
    with contextlib.ExitStack() as held:
        file = None if kept is None else held.enter_context(as_file(kept))
        asked = settings if file is None else dataclasses.replace(settings, problem=str(file))
        return to_table(settings), build_plan(asked, layout)


def describe(plan: Plan) -> str:
    """The problems, the number of runs, how many are solved together, and what the flow says of the largest rank."""
    from lora_flow.problems.tasks import task_rank

    runs = f"{plan.grid.size} runs {plan.way}, {plan.layout.width} at a time on each device"
    told, flow, rank = [*map(str, plan.problems.members), runs], plan.way.flow, max(plan.grid.rank)
    if flow.hint(rank, 0):  # or no task's rank matters
        least = min(task_rank(problem)[0] for problem in plan.problems.members)
        told += filter(None, [flow.hint(rank, least)])
    return "\n".join(told)


def stored(out: str) -> Settings:
    """The settings that a run folder was started with."""
    from lora_flow.storage.folder import read_settings
    from lora_flow.sweeps.from_python import check_from_command

    settings = read_settings(out)
    check_from_command(out, settings)
    return from_table(settings, f"{out}/settings.toml")


def read_config(path: str) -> Settings:
    """The settings of a file; a problem's file is sought from the folder that the settings are in."""
    path = os.path.expanduser(path)
    return with_absolute_path(from_table(read_toml(path), path), Path(path).parent)


def check_unchanged(asked: Settings, stored: Settings, out: str) -> None:
    """Raises where a run is to be resumed under other settings than it was started with."""
    for name, value in dataclasses.asdict(dataclasses.replace(stored, devices=asked.devices)).items():
        got = getattr(asked, name)
        require(got == value, name, f"be {value}, as '{out}' was started, to resume it", got)

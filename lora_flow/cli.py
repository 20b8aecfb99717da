"""The command line: typed settings in, run folders out. JAX is imported only once a command has work to do."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lora_flow.checks import InputError, require, require_choice
from lora_flow.settings import Settings, build_plan, from_table, start_jax, to_table, with_absolute_path

if TYPE_CHECKING:
    import xarray as xr


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Solve the gradient flow for every combination of initialisation, side, alpha, rank and seed.

    Results go to a run folder: settings.toml, results.zarr (open it with xarray.open_zarr), figures/ and report.md.
    A batch is stored as soon as it is solved; Ctrl-C or worse loses the batches in flight, and --resume goes on.

    The paper's main experiment:
    lora-flow sweep --alpha 1e-3 1e-4 1e-5 --seeds 30 --init gaussian spectral --side B --out runs/demo

    A target of your own:
    lora-flow sweep --problem target.npz --alpha 1e-3 --rank 2 4 8 --t1 100 --out runs/mine

    After an interruption:
    lora-flow sweep --out runs/demo --resume
    """

    out: str
    """The run folder."""
    config: str | None = None
    """A TOML file with any of the settings below (a run's settings.toml is one); flags override it."""
    resume: bool = False
    """Go on with an unfinished run, with the settings it was started with."""
    overwrite: bool = False
    """Replace the run folder if it exists."""
    settings: Settings = dataclasses.field(default_factory=Settings)

    def run(self) -> int:
        settings = with_absolute_path(self.settings)
        if self.resume:
            _check_unchanged(settings, _stored(self.out), self.out)
        return _sweep(settings, self.out, self.resume, self.overwrite)


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw a finished run again: loss, alignment and phases for every side and rank, and report.md.

    For example: lora-flow plot runs/demo
    """

    out: Annotated[str, tyro.conf.Positional]
    """The run folder."""

    def run(self) -> int:
        from lora_flow.store import load_run

        return _draw(load_run(self.out), self.out)


@dataclasses.dataclass(frozen=True)
class Figure:
    """Run and draw a figure of Xu et al., "Understanding the Learning Dynamics of LoRA" (arXiv 2503.06982).

    Figure 1: loss, alignment and phases for alpha = 1e-3, 1e-4, 1e-5 under random and spectral initialisation, with
    side "B". The report compares it with the published values.

    For example: lora-flow figure 1 --out runs/figure1
    """

    number: Annotated[int, tyro.conf.Positional]
    """Which figure: 1."""
    out: str
    """The run folder."""
    seeds: int | None = None
    """Number of random initialisations; the paper's number unless given."""
    resume: bool = False
    """Go on with an unfinished run."""
    overwrite: bool = False
    """Replace the run folder if it exists."""

    def run(self) -> int:
        from lora_flow.paper import FIGURES

        require_choice("figure", str(self.number), map(str, FIGURES))
        settings = FIGURES[self.number].settings
        if self.seeds is not None:
            settings = dataclasses.replace(settings, seeds=self.seeds)
        if self.resume:
            _check_unchanged(settings, _stored(self.out), self.out)
        return _sweep(settings, self.out, self.resume, self.overwrite, figure=self.number)


Command = Sweep | Plot | Figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command: 0 when done, 2 with one line for bad input, 1 for a failure in the run."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        command = _parse(arguments)
    except InputError as error:
        print(f"lora-flow: {error}", file=sys.stderr)
        return 2
    try:
        return command.run()
    except InputError as error:
        print(f"lora-flow: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(_storage_error(error, command.out), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lora-flow: interrupted; what was solved is stored, --resume goes on", file=sys.stderr)
        return 1


def _parse(arguments: list[str]) -> Command:
    """The command; settings come from the defaults, then --config or the resumed run, then flags."""
    command = _tyro(arguments)
    if isinstance(command, Sweep | Figure):
        require(not (command.resume and command.overwrite), "resume and overwrite", "not be given together", "both")
    if isinstance(command, Sweep) and (command.resume or command.config):
        require(not (command.resume and command.config), "config", "be left out with --resume", command.config)
        settings = _stored(command.out) if command.resume else _read_config(str(command.config))
        command = _tyro(arguments, dataclasses.replace(command, settings=settings))
    return command


def _tyro(arguments: list[str], default: Sweep | None = None) -> Command:
    """Parses the flags; `default` replaces what sweep starts from."""
    commands: Any = Sweep | Plot | Figure
    if default is not None:
        commands = Annotated[Sweep, tyro.conf.subcommand(default=default)] | Plot | Figure
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                commands,
                prog="lora-flow",
                description="The gradient flow of LoRA adapters, exactly enough over 26 decades of loss.",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as stop:
        if stop.code:
            raise InputError(_one_line(said.getvalue())) from None
        raise


def _sweep(settings: Settings, out: str, resume: bool, overwrite: bool, figure: int = 0) -> int:
    from lora_flow.store import RunFolder, check_free, run

    if not resume:
        check_free(out, overwrite)
    start_jax(settings)
    plan = build_plan(settings)
    print(plan.problem)
    print(f"{plan.grid.size} runs to t = {plan.t1:g}, {plan.batch_size} at a time on each device")
    attrs = {"figure": figure}
    if resume:
        folder = RunFolder.resume(out, plan, attrs)
    else:
        folder = RunFolder.create(out, to_table(settings), plan, overwrite, attrs)
    return _draw(run(folder, plan), out)


def _draw(dataset: xr.Dataset, out: str) -> int:
    import matplotlib as mpl

    mpl.use("Agg")
    from lora_flow.figures import save_figures
    from lora_flow.paper import FIGURES, comparison
    from lora_flow.report import failed, final_values, report

    paper = FIGURES.get(dataset.attrs.get("figure", 0))
    name, until = (f"figure{dataset.attrs['figure']}", paper.alignment_until) if paper else ("sweep", None)
    pictures = save_figures(dataset, Path(out) / "figures", name, until)
    notes = comparison(paper, dataset) if paper else ""
    links = [str(picture.relative_to(out)) for picture in pictures]
    (Path(out) / "report.md").write_text(report(dataset, links, notes))
    print("\n".join(part for part in (final_values(dataset), notes) if part))
    print(*(f"picture: {picture}" for picture in pictures), f"report: {Path(out) / 'report.md'}", sep="\n")
    ended = failed(dataset)
    for status, count in ended.items():
        print(f"lora-flow: {count} of {dataset['status'].size} runs ended with status {status}", file=sys.stderr)
    return 1 if sum(ended.values()) == dataset["status"].size else 0


def _storage_error(error: OSError, out: str) -> str:
    """A disk that is full or cannot be written is bad input: what is stored stays, and the line says how to go on."""
    line = f"lora-flow: '{out}' must be writable, got {error.strerror or error}"
    if (Path(out) / "results.zarr").exists():
        line += f"; what is stored is kept, go on with: lora-flow sweep --out {out} --resume"
    return line


def _stored(out: str) -> Settings:
    from lora_flow.store import read_settings

    return from_table(read_settings(out), f"{out}/settings.toml")


def _read_config(path: str) -> Settings:
    from lora_flow.store import read_toml

    return from_table(read_toml(path), path)


def _check_unchanged(asked: Settings, stored: Settings, out: str) -> None:
    for name, value in dataclasses.asdict(stored).items():
        got = getattr(asked, name)
        require(got == value, name, f"be {value}, as '{out}' was started, to resume it", got)


def _one_line(box: str) -> str:
    """The first part of a boxed error message as one line, with the flag that was probably meant."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:-1]]
    rules = [number for number, line in enumerate(lines) if line.startswith("──")]
    message = " ".join(lines[: rules[0]] if rules else lines)
    meant = re.search(r"Perhaps you meant:\s+(--[\w-]+)", "\n".join(lines))
    return f"{message} (did you mean {meant[1]}?)" if meant else message

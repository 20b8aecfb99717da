"""The command line: typed settings in, run folders out. JAX is imported only once a command has work to do."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lora_flow.checks import InputError, require, require_choice
from lora_flow.settings import Settings, build_plan, from_table, start_jax, to_table, with_absolute_path
from vision.settings import VisionSettings

if TYPE_CHECKING:
    from lora_flow.plan import Plan
    from lora_flow.store import RunFolder


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Solve the gradient flow for every combination of initialisation, side, alpha, rank and seed.

    Results go to a run folder: settings.toml, results.zarr (open it with xarray.open_zarr), figures/ and report.md.
    A batch is stored as soon as it is solved; Ctrl-C or worse loses the batches in flight, and --resume goes on.

    The paper's main experiment:
    lora-flow sweep --alpha 1e-3 1e-4 1e-5 --seeds 30 --init gaussian spectral --side B --out runs/demo

    A target of your own:
    lora-flow sweep --problem target.npz --alpha 1e-3 --rank 2 4 8 --t1 100 --out runs/mine

    A linear network from scratch, of several widths; and LoRA on weights that are trained first:
    lora-flow sweep --problem network --init gaussian-both:25 balanced --alpha 0.1 --rank 50 200 --t1 20 --out runs/net
    lora-flow sweep --problem pretrained --pretraining gaussian-both:0.1 gaussian-both:10 --alpha 1e-4 --out runs/pre

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
        _solve(*_open(settings, self.out, self.resume, self.overwrite, {}))
        return _draw(self.out)


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw a finished run or figure again, and write its report.md: loss, alignment and phases for every side and rank.

    For example: lora-flow plot runs/demo
    """

    out: Annotated[str, tyro.conf.Positional]
    """The run folder."""

    def run(self) -> int:
        from vision.results import is_vision

        if is_vision(Path(self.out)):
            from vision.command import tell

            return tell(Path(self.out))
        from lora_flow.studies import study_of

        name = study_of(self.out)
        return _draw_study(self.out, name) if name else _draw(self.out)


@dataclasses.dataclass(frozen=True)
class Figure:
    """Run and draw a named experiment, with a table of its values.

    1: loss, alignment and phases for three alphas under random and spectral initialisation, as in Figure 1 of Xu et
    al., "Understanding the Learning Dynamics of LoRA" (arXiv 2503.06982).

    3 and 4: the same for three delta_w, with the shift along the top (3) or bottom (4) pair of the pretrained weights,
    for both sides. The table has the published values beside those found here.

    phase: final loss, alignment and T1 over alpha x rank and over alpha x delta_w.

    beyond: shifts turned away from the pretrained weights or of higher rank, and noise in the weights.

    inits: all the initialisations on one layer, with a task along the weight's top singular pairs and one across them.

    kappa: the rate of the plain and of the preconditioned flow against the condition number of the task.

    lora-one and preconditioner: the toy experiments of LoRA-One (arXiv 2502.01235, Figures 2 and 4), by gradient
    descent. scaling: the best lora_alpha against the rank, for gradient descent and Adam.

    imbalance and width: gradient flow of linear networks trained from scratch, with its bounds, and its implicit bias
    (Min et al., arXiv 2105.06351). adaptive-step and growing-step: gradient descent of the same, with the step sizes of
    Xu et al. (AISTATS 2023; arXiv 2505.11664). pretraining: from such a network to fine-tuning it.

    Those of the last two paragraphs run as a whole, without --resume.

    For example: lora-flow figure 3 --out runs/figure3
    """

    name: Annotated[str, tyro.conf.Positional]
    """Which figure: 1, 3, 4, phase, beyond, inits, kappa, lora-one, preconditioner, scaling, imbalance, width,
    adaptive-step, growing-step or pretraining."""
    out: str
    """The folder: a run folder, or where a figure is made of several runs a folder of run folders."""
    seeds: int | None = None
    """Number of random initialisations or draws; the paper's number unless given."""
    resume: bool = False
    """Go on with an unfinished figure."""
    overwrite: bool = False
    """Replace the folder's runs if they exist."""

    def run(self) -> int:
        from lora_flow.experiments import EXPERIMENTS
        from lora_flow.store import check_parts, is_started, remove_drawn
        from lora_flow.studies import STUDIES

        require_choice("figure", self.name, [*EXPERIMENTS, *STUDIES])
        if self.name in STUDIES:
            return self._study()
        runs = EXPERIMENTS[self.name].runs
        if self.seeds is not None:
            runs = {name: dataclasses.replace(settings, seeds=self.seeds) for name, settings in runs.items()}
        if list(runs) != [""]:
            check_parts(self.out, runs)
        paths = {name: str(Path(self.out) / name) for name in runs}
        started = {name: self.resume and is_started(path) for name, path in paths.items()}
        require(not self.resume or any(started.values()), "the run folder", "exist", f"'{self.out}'")
        for name, settings in runs.items():
            if started[name]:
                _check_unchanged(settings, _stored(paths[name]), paths[name])
        attrs = {"figure": self.name}
        opened = [_open(runs[name], paths[name], started[name], self.overwrite, attrs) for name in runs]
        remove_drawn(Path(self.out))
        for folder, plan in opened:
            _solve(folder, plan)
        return _draw(self.out)

    def _study(self) -> int:
        from lora_flow.progress import each
        from lora_flow.studies import STUDIES, begin_study, check_study_folder, store_study

        study = STUDIES[self.name]
        seeds = study.seeds if self.seeds is None else self.seeds
        require(seeds >= 1, "seeds", "be at least 1", seeds)
        must = f"be left out with figure {self.name}, which runs as a whole"
        require(not self.resume, "resume", must, "--resume")
        check_study_folder(self.out, self.overwrite)
        begin_study(self.out, self.name, seeds)
        start_jax(Settings())
        dataset = study.run(seeds, lambda items: each(items, "parts"))
        store_study(self.out, self.name, seeds, dataset)
        return _draw_study(self.out, self.name)


@dataclasses.dataclass(frozen=True)
class Theory:
    """Hold theory against runs: every claim with its prediction, what was measured, and whether it holds.

    The claims are those of Xu et al. (arXiv 2503.06982) and of the talk on it, of LoRA-One (arXiv 2502.01235), of Mu
    and Klabjan (arXiv 2512.18248), on other flows and initialisations, and on linear networks trained from scratch (Min
    et al., arXiv 2105.06351; Xu et al., arXiv 2505.11664), each tried on runs that this command makes. What a paper
    prints wrongly is tried as printed too, and fails. The folder gets theory.csv, with a row for every case, theory.md
    and figures/theory.png. Takes about three minutes on two cores.

    For example: lora-flow theory --out runs/theory
    """

    out: str = "runs/theory"
    """The folder; files of an earlier check in it are replaced."""
    seeds: int = 6
    """Number of random initialisations; intervals are over these."""

    def run(self) -> int:
        folder = Path(self.out)
        require(self.seeds >= 3, "seeds", "be at least 3, for intervals", self.seeds)
        held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        free = not folder.exists() or (folder.is_dir() and held <= {"theory.csv", "theory.md", "figures"})
        require(free, "out", "be a new folder or one of an earlier check", f"'{folder}', which holds something else")
        start_jax(Settings())
        import matplotlib as mpl

        mpl.use("Agg")
        from lora_flow.figures import save
        from lora_flow.theory.check import HEADER, check, markdown, terminal_line, write_csv
        from lora_flow.theory.evidence import Evidence
        from lora_flow.theory.pictures import draw

        evidence, lines = Evidence(self.seeds), []
        print(HEADER, flush=True)
        for line in check(evidence):
            print(terminal_line(line), flush=True)
            lines.append(line)
        (picture,) = save({"theory": draw(evidence)}, folder / "figures")
        write_csv(lines, folder / "theory.csv")
        (folder / "theory.md").write_text(f"# Theory against runs\n\n{markdown(lines)}\n\n![](figures/theory.png)\n")
        print(f"table: {folder / 'theory.csv'}", f"report: {folder / 'theory.md'}", f"picture: {picture}", sep="\n")
        return 0


@dataclasses.dataclass(frozen=True)
class Inits:
    """List the initialisations: formula, what each asks for, and whether it offsets the frozen weights.

    alpha multiplies both factors; G = -dL/dW = U S V^T is the negative gradient at the pretrained weight W, s the
    scaling, r the rank. Those marked "offset" freeze W - s B A, so that the function does not change at t = 0. Those
    marked "network" are for networks that are trained from scratch, --problem network; a number goes after a colon, as
    in gaussian-both:25.

    For example: lora-flow inits
    """

    def run(self) -> int:
        start_jax(Settings())
        from lora_flow.initialization import INITIALIZATIONS

        width = max(map(len, INITIALIZATIONS))
        for name, scheme in INITIALIZATIONS.items():
            asks = f"; asks for {scheme.asks}" if scheme.asks else ""
            takes = f"; takes :{scheme.parameter.upper()}" if scheme.parameter else ""
            kind = "; offset" if scheme.offset else "; network" if scheme.network else ""
            print(f"{name:{width}}  {scheme.about}{takes}{asks}{kind}")
        return 0


@dataclasses.dataclass(frozen=True)
class Vision:
    """Check the theory on images: a Vision Transformer whose layers carry LoRA, by gradient flow, SGD and Adam.

    Trains from standard deviations .025 ... 1 as in Figures 5, 6 and 7 of Xu et al. (arXiv 2503.06982), with random A,
    random B, spectral and one-step starts, and says of each claim whether it holds, with its statistic. Results go to a
    run folder: settings.toml, results.zarr, adapters/, figures/ and report.md. A unit of work is stored as soon as it
    is done, and checkpoints in between; --resume goes on. The defaults need no network and take a few minutes.

    Images and weights of your own choice:
    lora-flow vision --data fashion-mnist --weights FOLDER --config vit-base --out runs/vit

    LoRA on other layers, by minibatches:
    lora-flow vision --layers 'attention/(query|value)|head' --optimizer sgd adam --batch-size 64 --out runs/qv
    """

    out: str
    """The run folder."""
    resume: bool = False
    """Go on with an unfinished check, with the settings it was started with."""
    overwrite: bool = False
    """Replace the folder's check if there is one."""
    settings: VisionSettings = dataclasses.field(default_factory=VisionSettings)

    def run(self) -> int:
        try:
            import flax  # noqa: F401
        except ImportError as error:
            raise InputError("vision must have flax installed (pip install 'lora-flow[vision]'), got none") from error
        from vision.command import check

        return check(Path(self.out), self.settings, self.resume, self.overwrite)


Command = Sweep | Plot | Figure | Theory | Inits | Vision


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command: 0 when done, 2 with one line for bad input, 1 for a failure in the run."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    os.environ.setdefault("EQX_ON_ERROR", "nan")  # a compiled program that can raise Python's errors cannot be kept
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
        print(_storage_error(error, getattr(command, "out", "standard output")), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        stored = "; what was solved is stored, --resume goes on" if _resumable(command) else ""
        print(f"lora-flow: interrupted{stored}", file=sys.stderr)
        return 1


def _resumable(command: Command) -> bool:
    if isinstance(command, Figure):
        from lora_flow.experiments import EXPERIMENTS

        return command.name in EXPERIMENTS
    return isinstance(command, Sweep | Vision)


def _parse(arguments: list[str]) -> Command:
    """The command; settings come from the defaults, then --config or the resumed run, then flags."""
    command = _tyro(arguments)
    if isinstance(command, Sweep | Figure | Vision):
        require(not (command.resume and command.overwrite), "resume and overwrite", "not be given together", "both")
    if isinstance(command, Sweep) and (command.resume or command.config):
        require(not (command.resume and command.config), "config", "be left out with --resume", command.config)
        settings = _stored(command.out) if command.resume else _read_config(str(command.config))
        command = _tyro(arguments, dataclasses.replace(command, settings=settings))
    if isinstance(command, Vision) and command.resume:
        from vision.results import stored_settings

        command = _tyro(arguments, dataclasses.replace(command, settings=stored_settings(Path(command.out))))
    return command


def _tyro(arguments: list[str], default: Sweep | Vision | None = None) -> Command:
    """Parses the flags; `default` replaces what a command starts from."""
    commands: Any = Command
    if isinstance(default, Sweep):
        commands = Annotated[Sweep, tyro.conf.subcommand(default=default)] | Plot | Figure | Theory | Inits | Vision
    elif default is not None:
        commands = Sweep | Plot | Figure | Theory | Inits | Annotated[Vision, tyro.conf.subcommand(default=default)]
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


def _open(settings: Settings, out: str, resume: bool, overwrite: bool, attrs: dict[str, str]) -> tuple[RunFolder, Plan]:
    """A run folder, new or found, and the plan for it; everything that can be refused is refused here."""
    from lora_flow.store import RunFolder, check_free

    if not resume:
        check_free(out, overwrite)
    start_jax(settings)
    plan = build_plan(settings)
    if resume:
        return RunFolder.resume(out, plan, attrs), plan
    return RunFolder.create(out, to_table(settings), plan, overwrite, attrs), plan


def _solve(folder: RunFolder, plan: Plan) -> None:
    from lora_flow.store import run

    print(*map(str, plan.problems.members), sep="\n")
    print(f"{plan.grid.size} runs to t = {plan.t1:g}, {plan.batch_size} at a time on each device")
    run(folder, plan)


def _draw(out: str) -> int:
    """Draws what a folder holds, a run or a figure of several, and writes its report."""
    import matplotlib as mpl

    mpl.use("Agg")
    from lora_flow.experiments import EXPERIMENTS
    from lora_flow.figures import save, save_figures
    from lora_flow.report import about, failed, final_values, report, warnings
    from lora_flow.store import load_figure
    from lora_flow.theory.predictions import predictions

    name, datasets = load_figure(out)
    folder = Path(out) / "figures"
    if name and set(datasets) != set(EXPERIMENTS[name].runs):
        alone = list(datasets) == [""]  # one of a figure's runs, drawn as the sweep that it is
        missing = sorted(set(EXPERIMENTS[name].runs) - set(datasets))
        require(
            alone, f"'{out}'", f"hold all the runs of figure {name}", f"none of {', '.join(missing)}; --resume goes on"
        )
        name = ""
    if name:
        experiment, stem = EXPERIMENTS[name], f"figure{name}" if name.isdigit() else f"figure-{name}"
        pictures = save({f"{stem}{suffix}": one for suffix, one in experiment.draw(datasets).items()}, folder)
        notes = experiment.notes(datasets)
    else:
        pictures, notes = save_figures(datasets[""], folder, "sweep"), ""
    links = [str(picture.relative_to(out)) for picture in pictures]
    told = {run: [about(one), final_values(one), warnings(one), predictions(one)] for run, one in datasets.items()}
    (Path(out) / "report.md").write_text(report(told, links, notes))
    print(notes or final_values(datasets[""]))
    print(*filter(None, map(warnings, datasets.values())), sep="\n")
    print(*(f"picture: {picture}" for picture in pictures), f"report: {Path(out) / 'report.md'}", sep="\n")
    ended = failed(datasets.values())
    total = sum(dataset["status"].size for dataset in datasets.values())
    for status, count in ended.items():
        print(f"lora-flow: {count} of {total} runs ended with status {status}", file=sys.stderr)
    return 1 if sum(ended.values()) == total else 0


def _draw_study(out: str, name: str) -> int:
    """Draws what a study's folder holds, and writes its report."""
    import matplotlib as mpl

    mpl.use("Agg")
    from lora_flow.figures import save
    from lora_flow.studies import STUDIES, load_study

    require_choice(f"the study in '{out}'", name, STUDIES)
    study, dataset = STUDIES[name], load_study(out)
    notes = study.notes(dataset)
    (picture,) = save({f"figure-{name}": study.draw(dataset)}, Path(out) / "figures")
    text = f"# {study.about[0].upper()}{study.about[1:]}\n\n{notes}\n\n![](figures/{picture.name})\n"
    (Path(out) / "report.md").write_text(text)
    print(notes, f"picture: {picture}", f"report: {Path(out) / 'report.md'}", sep="\n")
    return 0


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

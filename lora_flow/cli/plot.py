"""`lora-flow plot`, and the pictures and the report with which every other command ends."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from lora_flow.checks import require, require_choice
from lora_flow.storage.folder import locked_if_free, write_atomically


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw a run or figure again, and write its report.md: loss, alignment and phases for every side and rank.

    The pictures and report of an unfinished run show the stored part, and say so.

    For example: lora-flow plot runs/demo
    """

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """The run folder."""

    def run(self) -> int:
        with locked_if_free(self.out):
            return self._draw()

    def _draw(self) -> int:
        from lora_flow_vision.results import is_vision

        if is_vision(Path(self.out)):
            from lora_flow_vision.command import tell

            return tell(Path(self.out))
        from lora_flow.experiments.folder import study_of

        name = study_of(self.out)
        return draw_study(self.out, name) if name else draw(self.out, partial=True)


def draw(out: str, partial: bool = False) -> int:
    """Draws a folder's run, or figure of several runs, and writes its report; with `partial` an unfinished one too."""
    import matplotlib as mpl

    mpl.use("Agg")
    from lora_flow.experiments.table import EXPERIMENTS
    from lora_flow.figures.over_time import save_figures, save_with_numbers
    from lora_flow.results.predictions import predictions
    from lora_flow.results.report import about, failed, final_values, report, unfinished, warnings
    from lora_flow.results.summary import answered
    from lora_flow.sweeps.run import load_figure

    name, datasets = load_figure(out, partial)
    state = unfinished(datasets.values())
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
        drawn = {f"{stem}{suffix}": one for suffix, one in experiment.draw(datasets).items()}
        pictures = save_with_numbers(drawn, folder, state)
        notes = "" if state else experiment.notes(datasets)
    else:
        pictures, notes = save_figures(datasets[""], folder, "sweep", state), ""
    links = [str(picture.relative_to(out)) for picture in pictures]
    told: dict[str, list[Any]] = {}
    lines = [state, notes]
    for run, one in datasets.items():
        short, tables = answered(one)
        listed, warned = "\n".join(f"- {line}" for line in short), warnings(one)
        told[run] = [about(one), listed, *tables, warned, predictions(one), final_values(one)]
        lines += [warned] if notes else [*short, warned]
    text, files = report(told, links, notes, state)
    for file, content in ({"report.md": text} | files).items():
        write_atomically(Path(out) / file, content)
    print(*filter(None, lines), sep="\n")
    print(*(f"picture: {picture}" for picture in pictures), f"report: {Path(out) / 'report.md'}", sep="\n")
    ended = failed(datasets.values())
    total = sum(dataset["status"].size for dataset in datasets.values())
    for status, count in ended.items():
        print(f"lora-flow: {count} of {total} runs ended with status {status}", file=sys.stderr)
    return 1 if sum(ended.values()) == total else 0


def draw_study(out: str, name: str) -> int:
    """Draws a study from its folder, and writes its report."""
    import matplotlib as mpl

    mpl.use("Agg")
    from lora_flow.experiments.folder import load_study
    from lora_flow.experiments.studies import STUDIES
    from lora_flow.figures.over_time import save_with_numbers

    require_choice(f"the study in '{out}'", name, STUDIES)
    study, dataset = STUDIES[name], load_study(out)
    notes = study.notes(dataset)
    (picture,) = save_with_numbers({f"figure-{name}": study.draw(dataset)}, Path(out) / "figures")
    text = f"# {study.about[0].upper()}{study.about[1:]}\n\n{notes}\n\n![](figures/{picture.name})\n"
    write_atomically(Path(out) / "report.md", text)
    print(notes, f"picture: {picture}", f"report: {Path(out) / 'report.md'}", sep="\n")
    return 0

"""The pictures and the report of a folder's results, of a sweep's run and of every experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import xarray as xr

from lora_flow.checks import require, require_choice
from lora_flow.experiments.base import Datasets, Experiment
from lora_flow.experiments.folder import load_study, study_of
from lora_flow.experiments.table import EXPERIMENTS
from lora_flow.figures.over_time import save_figures, save_with_numbers
from lora_flow.results.predictions import predictions
from lora_flow.results.report import about, final_values, report, unfinished, warnings
from lora_flow.results.summary import answered
from lora_flow.storage.remote import RunPath, below, run_path
from lora_flow.storage.swap import write_atomically
from lora_flow.sweeps.run import load_figure
from lora_flow.sweeps.schema import failed


class Presented(NamedTuple):
    """What to say of the results, and of all their lanes the number that failed with each status."""

    lines: list[str]
    failed: Mapping[str, int]
    lanes: int


def present(out: str | RunPath, partial: bool = False) -> Presented:
    """Draws a folder's results and writes the report; with `partial` those of an unfinished run too.

    **Raises:** `InputError` where the folder holds neither a run nor an experiment, or lacks a part of one.
    """
    out = run_path("the run folder", out)
    name, datasets = _load(out, partial)
    experiment = EXPERIMENTS[name] if name else None
    runs: Datasets = {} if experiment and experiment.function else datasets
    state = unfinished(runs.values())
    if experiment:
        stem = f"figure{name}" if name.isdigit() else f"figure-{name}"
        drawn = {f"{stem}{suffix}": one for suffix, one in experiment.draw(datasets).items()}
        pictures = save_with_numbers(drawn, out / "figures", state)
    else:
        pictures = save_figures(datasets[""], out / "figures", "sweep", state)
    notes = experiment.notes(datasets) if experiment and not state else ""
    lines = [state, notes]
    told: dict[str, list[Any]] = {}
    for run, one in runs.items():
        short, tables = answered(one)
        listed, warned = "\n".join(f"- {line}" for line in short), warnings(one)
        told[run] = [about(one), listed, *tables, warned, predictions(one), final_values(one)]
        lines += [warned] if notes else [*short, warned]
    links = [below(out, picture) for picture in pictures]
    text, files = report(told, links, notes, state) if told else (_brief(experiment, notes, links), {})
    for file, content in ({"report.md": text} | files).items():
        write_atomically(out / file, content)
    lines += [*(f"picture: {picture}" for picture in pictures), f"report: {out / 'report.md'}"]
    lanes = sum(one["status"].size for one in runs.values())
    return Presented(list(filter(None, lines)), failed(runs.values()), lanes)


def _load(out: RunPath, partial: bool) -> tuple[str, dict[str, xr.Dataset]]:
    """The name of the experiment that a folder was made for, "" for a plain run, and the datasets of its parts."""
    if name := study_of(out):
        require_choice(f"the study in '{out}'", name, [one for one in EXPERIMENTS if EXPERIMENTS[one].function])
        return name, {"": load_study(out)}
    name, datasets = load_figure(out, partial)
    if not name:
        return name, datasets
    require_choice(f"the figure in '{out}'", name, EXPERIMENTS)
    parts = EXPERIMENTS[name].parts
    missing = sorted(set(parts) - set(datasets))
    if missing and list(datasets) == [""]:
        return "", datasets  # one of a figure's runs, drawn as the sweep that it is
    must, got = f"hold all the runs of figure {name}", f"none of {', '.join(missing)}; --resume goes on"
    require(not missing, f"'{out}'", must, got)
    return name, {part: one for part, one in datasets.items() if part in parts}


def _brief(experiment: Experiment | None, notes: str, links: Sequence[str]) -> str:
    """The report of an experiment that is no sweep."""
    heading = experiment.about if experiment else ""
    pictures = [f"![]({link})" for link in links]
    return "\n\n".join([f"# {heading[:1].upper()}{heading[1:]}", notes, *pictures]) + "\n"

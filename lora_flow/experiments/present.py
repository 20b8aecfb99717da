"""The pictures, the report and the page of a folder's results, of a sweep's run and of every experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import xarray as xr

from lora_flow.checks import require, require_choice
from lora_flow.experiments.base import Datasets, Experiment
from lora_flow.experiments.folder import load_study, study_of
from lora_flow.experiments.on_page import written
from lora_flow.experiments.table import EXPERIMENTS
from lora_flow.figures.over_time import save_figures, save_with_numbers
from lora_flow.figures.written import picture_lines
from lora_flow.pages import charts
from lora_flow.results.answers import Cell, answers
from lora_flow.results.clock import over_time
from lora_flow.results.predictions import predictions
from lora_flow.results.report import about, final_values, report, unfinished, warnings
from lora_flow.results.summary import answered
from lora_flow.storage.remote import RunPath, below, run_path
from lora_flow.storage.swap import write_atomically
from lora_flow.sweeps.folder import drawn
from lora_flow.sweeps.run import load_figure
from lora_flow.sweeps.schema import failed


class Presented(NamedTuple):
    """What to say of the results, and of all their lanes the number that failed with each status."""

    lines: list[str]
    failed: Mapping[str, int]
    lanes: int


class Results(NamedTuple):
    """What a folder holds: its experiment, `name` "" for a plain run, the results by part, and the runs among them.

    `state` says that a run is unfinished, "" where none is.
    """

    out: RunPath
    name: str
    experiment: Experiment | None
    datasets: Mapping[str, xr.Dataset]
    runs: Mapping[str, xr.Dataset]
    state: str


class Told(NamedTuple):
    """The text of `report.md` and the files beside it, the answers of every run, and the lines for the terminal."""

    text: str
    files: Mapping[str, str]
    found: Mapping[str, Sequence[Cell]]
    short: Mapping[str, Sequence[str]]
    lines: list[str]


def present(out: str | RunPath, partial: bool = False) -> Presented:
    """Draws a folder's results and writes the report and its page; with `partial` those of an unfinished run too.

    **Raises:** `InputError` where the folder holds neither a run nor an experiment, or lacks a part of one.
    """
    results = _results(out, partial)
    with ThreadPoolExecutor(1) as beside:
        if results.runs and charts.are_to_be_had():
            beside.submit(charts.made)  # takes a second where none are kept, in which the pictures are drawn
        pictures = _drawn(results)
    told = _told(results, [below(results.out, picture) for picture in pictures])
    for file, content in ({"report.md": told.text} | dict(told.files)).items():
        write_atomically(results.out / file, content)
    lines = [*told.lines, *picture_lines(pictures), f"report: {results.out / 'report.md'}"]
    lines.append(_paged(results, told))
    lanes = sum(one["status"].size for one in results.runs.values())
    return Presented(list(filter(None, lines)), failed(results.runs.values()), lanes)


def present_page(out: str | RunPath) -> str:
    """Writes the page of a folder's results again, with the pictures that it holds, and says where it is.

    **Raises:** `InputError` as `present` does, and where what draws the page's charts is not installed.
    """
    results = _results(out, partial=True)
    got = "neither or one (pip install 'lora-flow[report]')"
    require(not results.runs or charts.are_to_be_had(), "report", "have altair and vl-convert-python installed", got)
    pictures = [name for name in sorted(drawn(results.out)) if name.endswith(".png")]
    return _paged(results, _told(results, pictures))


def _results(out: str | RunPath, partial: bool) -> Results:
    out = run_path("the run folder", out)
    name, datasets = _load(out, partial)
    experiment = EXPERIMENTS[name] if name else None
    runs: Datasets = {} if experiment and experiment.function else datasets
    return Results(out, name, experiment, datasets, runs, unfinished(runs.values()))


def _drawn(results: Results) -> Sequence[Any]:
    if results.experiment is None:
        return save_figures(results.datasets[""], results.out / "figures", "sweep", results.state)
    stem = f"figure{results.name}" if results.name.isdigit() else f"figure-{results.name}"
    pictures = {f"{stem}{suffix}": one for suffix, one in results.experiment.draw(results.datasets).items()}
    return save_with_numbers(pictures, results.out / "figures", results.state)


def _told(results: Results, links: Sequence[str]) -> Told:
    experiment, state = results.experiment, results.state
    notes = experiment.notes(results.datasets) if experiment and not state else ""
    lines, found, shorts = [state, notes], dict[str, Sequence[Cell]](), dict[str, Sequence[str]]()
    parts: dict[str, list[Any]] = {}
    for run, one in results.runs.items():
        found[run] = answers(over_time(one))
        short, tables = answered(one, found[run])
        listed, warned = "\n".join(f"- {line}" for line in short), warnings(one)
        shorts[run] = short
        parts[run] = [about(one), listed, *tables, warned, predictions(one), final_values(one)]
        lines += [warned] if notes else [*short, warned]
    text, files = report(parts, links, notes, state) if parts else (_brief(experiment, notes, links), {})
    return Told(text, files, found, shorts, lines)


def _paged(results: Results, told: Told) -> str:
    """Writes the page, and says where, or what it needs."""
    if results.runs and not charts.are_to_be_had():
        return charts.MISSING
    title = f"Figure {results.name}: {results.experiment.about}" if results.experiment else ""
    content = written(results.out, title, told.text, results.runs, told.found, told.short)
    write_atomically(results.out / "report.html", content)
    return f"page: {results.out / 'report.html'}"


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

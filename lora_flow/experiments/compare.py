"""Several runs on one page and in one figure, with the settings in which they differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from lora_flow.checks import require
from lora_flow.experiments.on_page import explored
from lora_flow.figures.over_time import save_with_numbers
from lora_flow.figures.style import band, letters, mark_rounding, panels, shades
from lora_flow.figures.written import picture_lines
from lora_flow.pages import charts
from lora_flow.pages.page import page
from lora_flow.pages.thinned import shown_values
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.answers import Cell, answers, best
from lora_flow.results.clock import clock, over_time
from lora_flow.results.report import show, table, unfinished
from lora_flow.results.summary import answered
from lora_flow.storage.swap import write_atomically
from lora_flow.sweeps.run import load_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MADE = ("compare.md", "compare.html")
_UNTOLD = {"batch_size", "devices", "problem_digest", "seeds", "saves"}  # no settings, or told as values of axes
_PANELS = {"loss": "loss L (log scale)", "alignment_error": "1 - cos (log scale)"}


class Compared(NamedTuple):
    """Runs over `time` by their names, and the answers of their cells."""

    runs: Mapping[str, xr.Dataset]
    found: Mapping[str, Sequence[Cell]]

    def write(self, folder: Path) -> list[str]:
        """Writes the text, the figure and the page, and says where they are."""
        (picture,) = save_with_numbers({"compare": self.drawn()}, folder / "figures")
        header, rows = differences(self.runs)
        short = [line for run in self.runs for line in self._short(run)]
        told = table(header, rows) if rows else "The runs have the same settings."
        picture_of = f"![{_about(self.runs)}](figures/compare.png)"
        text = f"# {' and '.join(self.runs)} compared\n\n## What differs\n\n{told}\n\n{picture_of}"
        listed = "\n".join(f"- {line}" for line in short)
        write_atomically(folder / "compare.md", f"{text}\n\n## What each does\n\n{listed}\n")
        lines = [told, *picture_lines([picture]), f"report: {folder / 'compare.md'}"]
        if not charts.are_to_be_had():
            return [*lines, charts.MISSING.replace("report.html", "compare.html")]
        shown = [explored(run, one, self.found[run]) for run, one in self.runs.items()]
        write_atomically(folder / "compare.html", page(text, folder, runs=shown, short=short))
        return [*lines, f"page: {folder / 'compare.html'}"]

    def drawn(self) -> Figure:
        """Loss and alignment error of the cell of each run whose last loss is the lowest; medians and quartiles."""
        tops = {self._label(run): self._best(run) for run in self.runs}
        colours = shades(len(tops))
        quantities = [name for name in _PANELS if all(name in one for one in tops.values())]
        with panels(1, len(quantities), height=2.9) as (figure, axes):
            for ax, name in zip(axes.flat, quantities, strict=True):
                ax.set_yscale("log")
                floor = max(float(rounding_floors(one).max()) for one in tops.values()) if name == "loss" else None
                for (label, one), colour in zip(tops.items(), colours, strict=True):
                    band(one[name], ax, floor, color=colour, label=label)
                if floor is not None:
                    mark_rounding(ax, floor)
                ax.set(xlabel=clock(next(iter(tops.values()))).axis, ylabel=_PANELS[name])
            letters(axes)
            handles, labels = axes.flat[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(2, len(tops)))
        return figure

    def _best(self, run: str) -> xr.Dataset:
        one, found = self.runs[run], self.found[run]
        tops = best(one, found)
        place = found.index(tops[0].lowest) if tops else 0
        dims = [str(dim) for dim in one["status"].dims if dim != "seed"]
        where = np.unravel_index(place, [one.sizes[dim] for dim in dims])
        return one.isel(dict(zip(dims, map(int, where), strict=True)))

    def _label(self, run: str) -> str:
        """The run, and which of its cells is the best."""
        one, top = self.runs[run], self._best(run)
        dims = [dim for dim in one["status"].dims if dim != "seed" and one.sizes[dim] > 1]
        named = [show(top[dim].item()) if dim == "init" else f"{dim} {show(top[dim].item())}" for dim in dims]
        cell = ", ".join(named)
        return f"{run} ({cell})" if cell else run

    def _short(self, run: str) -> list[str]:
        state = [line for line in [unfinished([self.runs[run]])] if line]
        return [f"{run}: {line}" for line in (*state, *answered(self.runs[run], self.found[run])[0])]


def compare(paths: Sequence[str]) -> Compared:
    """Reads runs, finished or not, to be compared.

    **Raises:** `InputError` for what is no run folder, and for runs of which only some are descents.
    """
    runs = {name: over_time(load_run(path, partial=True)) for name, path in zip(_names(paths), paths, strict=True)}
    clocks = {clock(one).axis for one in runs.values()}
    require(len(clocks) == 1, "runs", "be saved over the same clock", " and ".join(sorted(clocks)))
    return Compared(runs, {run: answers(one) for run, one in runs.items()})


def differences(runs: Mapping[str, xr.Dataset]) -> tuple[list[str], list[list[str]]]:
    """The settings, axes and versions in which runs differ: a header, and rows of values in every run."""
    told = {run: _settings(one) for run, one in runs.items()}
    names = dict.fromkeys(name for settings in told.values() for name in settings)
    rows = [[name, *(settings.get(name, "-") for settings in told.values())] for name in names]
    return ["setting", *runs], [row for row in rows if len(set(row[1:])) > 1]


def _settings(dataset: xr.Dataset) -> dict[str, str]:
    axes = {str(dim): dim for dim in (*dataset["status"].dims, "time")}
    found = {name: _in_few_words(shown_values(dataset, str(dim))) for name, dim in axes.items()}
    attrs = {str(name): value for name, value in dataset.attrs.items() if name not in _UNTOLD}
    return found | {name: _in_few_words(list(map(show, np.ravel(value).tolist()))) for name, value in attrs.items()}


def _in_few_words(values: Sequence[str]) -> str:
    return ", ".join(values) if len(values) <= 6 else f"{values[0]} ... {values[-1]} ({len(values)} values)"


def _names(paths: Sequence[str]) -> list[str]:
    """The last parts of paths; the paths themselves where these are not all different."""
    short = [os.path.basename(path.rstrip("/")) or path for path in paths]
    return short if len(set(short)) == len(short) else list(paths)


def _about(runs: Mapping[str, Any]) -> str:
    return f"Loss and alignment error over time of the best cell of {', '.join(runs)}"

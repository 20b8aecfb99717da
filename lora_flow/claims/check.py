"""All the claims, one after the other: a line for the terminal, a row for each case in a table, and a picture."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_flow.claims.frame import Case, Line
from lora_flow.claims.table import CLAIMS, REST
from lora_flow.results.report import table
from lora_flow.runtime.beside import second_process
from lora_flow.storage.swap import write_atomically


def check(seeds: int) -> Iterator[Line]:
    """Every claim's line from runs with so many seeds, in their order, as soon as it is known.

    Those of `REST` come from a second process, which works at the same time. Chapters that share runs stay together.
    """
    modules = {chapter.__name__ for chapter in REST}
    elsewhere = [name for name, claim in CLAIMS.items() if claim.__module__ in modules]
    with second_process() as other:
        lines = other.map(functools.partial(line_of, seeds=seeds), elsewhere)
        for name in CLAIMS:
            yield next(lines) if name in elsewhere else line_of(name, seeds)


def line_of(name: str, seeds: int) -> Line:
    return CLAIMS[name](seeds)


COLUMNS = ["line", "source", "claim", "case", "predicted", "measured", "half_width_95", "holds", "verdict", "runs"]
COLUMNS += ["runs_counted", "runs_in_all"]
HEADER = f"{'verdict':20}{'predicted':>22}{'measured':>28}  claim"


def terminal_line(line: Line) -> str:
    counted = f" ({line.counted})" if line.counted else ""
    return f"{line.verdict:20}{predicted(line):>22}{measured(line):>28}  {line.source}: {line.statement}{counted}"


def markdown(lines: Sequence[Line]) -> str:
    """The same as a Markdown table, with the runs behind each line."""
    header = ["", "source", "claim", "predicted", "measured", "verdict", "runs"]
    rows = [
        [i, line.source, _cell(line.statement), predicted(line), measured(line), line.verdict, _cell(_runs(line))]
        for i, line in enumerate(lines, start=1)
    ]
    return table(header, rows)


def _runs(line: Line) -> str:
    return f"{line.runs}; {line.counted}" if line.counted else line.runs


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write_csv(lines: Sequence[Line], path: Path) -> None:
    """`theory.csv`: one row for each case of each claim."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for number, line in enumerate(lines, start=1):
        for case in line.cases:
            width = "" if case.half_width is None else f"{case.half_width:.3g}"
            values = [case.where, f"{case.predicted:.6g}", f"{case.measured:.6g}", width, case.verdict]
            writer.writerow(
                [number, line.source, line.statement, *values, line.verdict, line.runs, *(case.counted or ("", ""))]
            )
    write_atomically(path, text.getvalue())


def predicted(line: Line) -> str:
    """The predicted range over the cases that the claim applies to, with the relation to the measured numbers."""
    return ("" if line.relation == "=" else f"{line.relation} ") + _range(line, lambda case: case.predicted)


def measured(line: Line) -> str:
    """The range over the same cases, and the widest of their 95% intervals over seeds."""
    widths = [case.half_width for case in line.cases if case.half_width is not None]
    return _range(line, lambda case: case.measured) + (f" ± {max(widths):.1g}" if widths else "")


def _range(line: Line, value: Callable[[Case], float]) -> str:
    values: Any = [value(case) for case in line.cases if case.holds is not None and not np.isnan(value(case))]
    if not values:
        return "-"
    low, high = _short(min(values)), _short(max(values))
    return low if low == high else f"{low} to {high}"


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}"

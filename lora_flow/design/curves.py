"""Loss curves as people have them: a CSV file with a column of times or steps, and columns of losses. No JAX here."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_flow.checks import InputError, as_path, kind, require, require_choice, require_increasing

CLOCKS = ("time", "step", "t")  # names of a first column, the first that there is


class Curves(NamedTuple):
    """Losses `(curve, time)` over times or steps `(time,)`, which all curves share, and the columns' names."""

    times: np.ndarray
    losses: np.ndarray
    clock: str
    names: tuple[str, ...]


def read_curves(path: str | os.PathLike[str], *, clock: str | None = None, columns: Sequence[str] = ()) -> Curves:
    """Reads loss curves from a CSV file, whose first line names its columns.

    **Arguments:**

    - `clock`: the column of times or steps; by default "time", "step" or "t", whichever there is, or the first.
    - `columns`: the columns of losses, one a run; by default those whose names begin with "loss", or the only other.

    **Returns:** `Curves`, with `times` of shape `(time,)`, `losses` of shape `(curve, time)`, and the columns' names.

    **Raises:** `InputError` for a file that is no such table, for a column that it has not (the nearest is suggested),
    for times that do not increase from 0 or later, and for losses that are not positive and finite.
    """
    file = as_path("curve", path)
    require(clock is None or isinstance(clock, str), "clock", "be the name of a column", kind(clock))
    listed = isinstance(columns, (list, tuple)) and all(isinstance(one, str) for one in columns)
    require(listed, "columns", "be names of columns", kind(columns))
    require(file.is_file(), "curve", "be a file that exists", f"'{file}'")
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            rows = [[cell.strip() for cell in row] for row in csv.reader(text) if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"curve must be a CSV file, got {type(error).__name__} in '{file}'") from error
    require(len(rows) > 0, "curve", "begin with a line of names, such as step,loss", "an empty file")
    names = rows[0]
    named = len(names) > 1 and not any(map(_is_number, names)) and len(set(names)) == len(names)
    require(named, "curve", "begin with a line of names that differ, such as step,loss", f"'{','.join(names)}'")
    uneven = [i for i, row in enumerate(rows) if len(row) != len(names)][:1]
    require(not uneven, "curve", f"have {len(names)} cells in each line", f"another number in line {sum(uneven) + 1}")
    if clock is None:
        clock = next((name for name in CLOCKS if name in names), names[0])
    require_choice("clock", clock, names)
    others = [name for name in names if name != clock]
    for name in columns:
        require_choice("columns", name, others)
    if not columns:
        columns = [name for name in others if name.startswith("loss")] or others
        must = "be named, where several may be losses"
        require(len(columns) == 1 or columns[0].startswith("loss"), "columns", must, ", ".join(columns))
    found = {name: _numbers(name, [row[names.index(name)] for row in rows[1:]]) for name in (clock, *columns)}
    checked = check_curves(found[clock], np.array([found[name] for name in columns]))
    return Curves(*checked, clock, tuple(columns))


def check_curves(times: Any, losses: Any) -> tuple[np.ndarray, np.ndarray]:
    """Times `(time,)` and losses `(curve, time)`, from losses `(time,)` or `(curve, time)`; `InputError` if wrong."""
    known = _reals("times", times)
    require(known.ndim == 1 and known.size >= 3, "times", "be at least three times or steps", kind(times))
    require_increasing("times", known, np.inf, "infinity")
    told = _reals("losses", losses)
    table = told[None] if told.ndim == 1 else told
    must = f"be one for each of the {known.size} times, (time,) or (curve, time)"
    require(table.ndim == 2 and table.shape[1] == known.size and len(table) > 0, "losses", must, f"shape {told.shape}")
    for i, j in np.argwhere(~(np.isfinite(table) & (table > 0)))[:1]:
        require(False, "losses", "be positive and finite", f"{table[i, j]} at {known[j]:g}")
    return known, table


def _reals(name: str, values: Any) -> np.ndarray:
    try:
        known = np.asarray(values)
        ok = known.dtype.kind in "iuf"
    except (TypeError, ValueError, RuntimeError):
        ok = False
    require(ok, name, "be real numbers", kind(values))
    return known.astype(float)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _numbers(name: str, cells: Sequence[str]) -> list[float]:
    for line, cell in enumerate(cells, 2):
        require(_is_number(cell), f"column '{name}'", "have numbers", f"'{cell}' in line {line}")
    return list(map(float, cells))

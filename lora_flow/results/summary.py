"""The answers of a run in words: the two questions first, for its report and, shorter, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.answers import (
    BEFORE,
    FALLING,
    LEVEL,
    LOWEST,
    RISING,
    Best,
    Cell,
    OverSeeds,
    answers,
    best,
    rounding_of_errors,
)
from lora_flow.results.clock import at_the_end, clock, over_time
from lora_flow.results.levels import AT_ROUNDING
from lora_flow.results.phases import aligning, second_leads
from lora_flow.results.report import Table, kind_of, show
from lora_flow.results.resolution import advice, bound

FEW = 8  # cells that the summary names one by one
APART = 0.1  # of 1 - cos, an angle of 26 degrees: what does not come below has not aligned


def answered(dataset: xr.Dataset, found: Sequence[Cell] | None = None) -> tuple[list[str], list[str | Table]]:
    """The answers to a report's two questions: lines, and a table for each question.

    A line for each cell of few, and else their range; then which is best for what. `found` are the answers of the
    dataset, where they are known.
    """
    dataset = over_time(dataset)
    found = answers(dataset) if found is None else found
    return _lines(dataset, found), [_alignment(dataset, found), _losses(dataset, found)]


def _lines(dataset: xr.Dataset, found: Sequence[Cell]) -> list[str]:
    done = [cell for cell in found if cell.endings]
    if not done:
        return ["No lane has finished."]
    if len(found) <= FEW:
        lines = [f"{_name(dataset, cell)}: {_in_a_line(dataset, cell)}." for cell in found]
    else:
        lines = [*_range_of_alignment(dataset, done), *_range_of_losses(dataset, done)]
        if failing := len(found) - len(done):
            lines.append(f"No lane of {failing} of {len(found)} cells has finished.")
    tops = best(dataset, found)
    lines += [line for one in tops for line in _best_lines(dataset, one, len(done))]
    return [*_too_few_saves(dataset, done, tops), *lines]


def _too_few_saves(dataset: xr.Dataset, done: Sequence[Cell], tops: Sequence[Best]) -> list[str]:
    """One line where events come among the first saves, or 1 - cos may be less between two.

    The end of early alignment, which no line tells, is one where it comes before anything is saved but the start.
    """
    second = float(dataset["time"][:2].max())
    events = {
        "alignment": [cell.t_align.when for cell in done if cell.t_align.when < second],
        "T1": [cell.t1.when for cell in done],
        "the fall of the loss": [*(one.time for one in tops), *(cell.reached.when for cell in done)],
    }
    early = [name for name, times in events.items() if any(np.isfinite(_bound(one, dataset)) for one in times)]
    told = []
    if early:
        several = len(early) > 1
        listed = " and ".join(filter(None, [", ".join(early[:-1]), early[-1]]))
        told.append(f"{listed} {'come' if several else 'comes'} among the first saves, so times are told as bounds")
    if any(cell.hidden for cell in done):
        told.append("1 - cos may be much less between two saves than at any")
    text = ", and ".join(told)
    return [f"Too few saves: {text}; {advice(dataset)} would tell."] if told else []


def _in_a_line(dataset: xr.Dataset, cell: Cell) -> str:
    if not cell.endings:
        return "no lane has finished"
    parts = []
    if np.isfinite(cell.best.median):
        t1 = f" (T1 {when(cell.t1.when, dataset, '= ')})" if cell.t1.reached else ""
        who = f"layer {cell.layer} " if _second_in(dataset) else ""
        least, by = error(cell.best, dataset), f"{clock(dataset).at}{cell.best_at.when:.3g}"
        if cell.hidden:
            parts.append(f"{who}aligns to 1 - cos of at most {least} by {by}{t1}")
        elif cell.best.median > APART:
            parts.append(f"{who}does not align (1 - cos is at least {least})")
        else:
            parts.append(f"{who}aligns to 1 - cos = {least} by {by}{t1}")
    return "; ".join([*parts, f"{_loss(cell)} at {at_the_end(dataset)}{_and_then(dataset, cell)}"])


def _second_in(dataset: xr.Dataset) -> bool:
    """Whether layer 2 aligns first in any cell, so that each has to say which layer does."""
    return "sigma_w1" in dataset.coords and bool(second_leads(dataset).any())


def _loss(cell: Cell) -> str:
    return "loss at rounding" if cell.ending == AT_ROUNDING else f"loss {median(cell.loss)}"


def _and_then(dataset: xr.Dataset, cell: Cell) -> str:
    """The loss's ending, in words."""
    words = {
        AT_ROUNDING: f", since {when(cell.reached.when, dataset, clock(dataset).at)}",
        LOWEST: ", the lowest possible",
        LEVEL: f", level{_of_seeds(cell)}",
        FALLING: f", still falling by {_rate(cell)} decades per {clock(dataset).unit}{_of_seeds(cell)}",
        RISING: f", rising{_of_seeds(cell)}",
    }
    return words[cell.ending]


def _of_seeds(cell: Cell) -> str:
    """The number of seeds that have the most frequent ending, if not all."""
    count, all_of_them = cell.endings[cell.ending], sum(cell.endings.values())
    return "" if count == all_of_them else f" ({count} of {all_of_them} seeds)"


def _range_of_alignment(dataset: xr.Dataset, done: Sequence[Cell]) -> list[str]:
    aligned = sorted((cell for cell in done if np.isfinite(cell.best.median)), key=lambda cell: cell.best.middle)
    if not aligned:
        return []
    least, most = aligned[0], aligned[-1]
    low, high = (error(cell.best, dataset, alone=True) for cell in (least, most))
    best_of, worst_of = (
        f"{_name(dataset, one)}, by {clock(dataset).at}{one.best_at.when:.3g}" for one in (least, most)
    )
    seen = " at the saved times" if any(cell.hidden for cell in aligned) else ""
    lines = [f"When it aligns: 1 - cos comes down to between {low} ({best_of}) and {high} ({worst_of}){seen}."]
    reach = sorted((cell for cell in done if cell.t1.middle < np.inf), key=lambda cell: cell.t1.middle)
    if reach:
        of = "" if len(reach) == len(done) else f" of the {len(reach)} of {len(done)} cells where most seeds reach it"
        low, high = (f"{when(cell.t1.when, dataset, '')} ({_name(dataset, cell)})" for cell in (reach[0], reach[-1]))
        early, all_early = (cell.t1.middle == BEFORE for cell in (reach[0], reach[-1]))
        bounded, all_bounded = (np.isfinite(_bound(cell.t1.when, dataset)) for cell in (reach[0], reach[-1]))
        span = f"lies between {low} and {high}"
        if early or bounded:
            span = f"comes {low}, the latest {'' if all_bounded else 'at '}{high}"
        lines.append(f"T1{of} {f'comes before the first save, {_first_save(dataset)}' if all_early else span}.")
    return lines


def _range_of_losses(dataset: xr.Dataset, done: Sequence[Cell]) -> list[str]:
    ordered = sorted(done, key=lambda cell: cell.loss.middle)
    ends = [cell.ending for cell in done]
    counts = ", ".join(
        f"{ends.count(word)} {word}" for word in dict.fromkeys(sorted(ends, key=ends.count, reverse=True))
    )
    first, last = ordered[0], ordered[-1]
    low, high = ("rounding" if one.ending == AT_ROUNDING else median(one.loss, alone=True) for one in (first, last))
    moving = FALLING in ends or RISING in ends
    hint = f"; {clock(dataset).longer} tells where those stop" if moving else ""
    asked = "The loss" if moving else "Where the loss stops,"
    return [
        f"{asked} at {at_the_end(dataset)}: from {low} ({_name(dataset, first)}) to {high} "
        f"({_name(dataset, last)}); of {len(done)} cells {counts}{hint}."
    ]


def _best_lines(dataset: xr.Dataset, one: Best, cells_there: int) -> list[str]:
    of = ", ".join(f"{name} {show(value)}" for name, value in one.problem.items())
    prefix = f"{of}: " if of else ""
    several = cells_there > 1
    lines = []
    if several and one.at_rounding:
        many = f"at rounding in {one.at_rounding} cells, first " if one.at_rounding > 1 else "at rounding "
        reached = when(one.lowest.reached.when, dataset, f"at {clock(dataset).at}")
        lines.append(f"lowest loss: {many}with {_name(dataset, one.lowest, one.problem)}, {reached}")
    elif several:
        lines.append(f"lowest loss: {_name(dataset, one.lowest, one.problem)}, {median(one.lowest.loss)}")
    if one.fastest is not None and one.level is not None:
        who = f"{_name(dataset, one.fastest, one.problem)}, " if several else ""
        what = "fastest" if several else "speed"
        there = when(one.time, dataset, f"at {clock(dataset).at}")
        lines.append(f"{what}: {who}at {one.share:g} of the first loss ({one.level:.3g}) {there}")
    else:
        lines.append("no start halves the loss" if several else "the loss is not halved")
    if several and one.aligned is not None:
        seen = " at the saved times" if one.hidden else ""
        least = error(one.aligned.best, dataset)
        lines.append(f"best aligned{seen}: {_name(dataset, one.aligned, one.problem)}, {least}")
    text = "; ".join(lines)
    return [prefix + text + "." if prefix else text[0].upper() + text[1:] + "."]


def _alignment(dataset: xr.Dataset, found: Sequence[Cell]) -> str | Table:
    heading = "When it aligns"
    if not any(cell.endings for cell in found):
        return f"## {heading}\n\nNo lane has finished."
    if not any(np.isfinite(cell.best.median) for cell in found):
        return (
            f"## {heading}\n\nThere is nothing to align with: small adapters turn to no direction, because the "
            "gradient of the loss with respect to the weights is zero at zero adapters."
        )
    rows = []
    timed, both = "sigma_w1" in dataset.coords, _second_in(dataset)
    for cell in found:
        ends = [cell.t_align, *([cell.t1] if timed else [])]
        times = [time(end, dataset, cell.seeds) for end in ends]
        least = f"{'<= ' if cell.hidden else ''}{error(cell.best, dataset)}"
        from_then = f"{cell.best_at.when:.3g}" if cell.best_at.reached else "-"
        shown = [least, from_then, error(cell.error, dataset), *times]
        shown = [str(cell.layer), *shown] if both else shown
        rows.append([*_start(dataset, cell.where), *(shown if cell.endings else ["-"] * len(shown))])
    since = f"from {clock(dataset).at.rstrip(' =')}"
    header = [*_dims(dataset), *(["layer"] if both else []), "least 1 - cos", since, "1 - cos at the end", "t_align"]
    header += ["T1"] if timed else []
    text = (
        f"cos is that of the angle between the top left singular vector of {aligning(dataset)}, and the direction that "
        f"it turns to while small. `{since}`: the first save at which 1 - cos is within a tenth of a decade of its "
        "least. `t_align`: the time at which the part along this direction outgrows the rest."
    )
    text += (
        " `T1`: the end of growth, when g^T B1 A1 v first reaches (1 - delta_w) sigma / (4 sigma_W2) (Theorem C.2); "
        "with the layers exchanged where delta_w > 1."
        if timed
        else f" The paper's T1 is defined for factorisations of two layers, and this is {kind_of(dataset)}."
    )
    if any(value.startswith("<") for row in rows for value in row):
        text += " `<` and `<=` mark bounds: the saves are too few to tell more."
    return Table("alignment", heading, f"{text} {_medians(dataset)}", header, rows)


def _losses(dataset: xr.Dataset, found: Sequence[Cell]) -> Table:
    rows = []
    for cell in found:
        if not cell.endings:
            rows.append([*_start(dataset, cell.where), "-", "no lane has finished", "-"])
            continue
        loss = "at rounding" if cell.ending == AT_ROUNDING else median(cell.loss)
        rate = _rate(cell) if cell.ending in (FALLING, RISING) else ""
        since = f" since {when(cell.reached.when, dataset, clock(dataset).at)}" if cell.ending == AT_ROUNDING else ""
        rows.append([*_start(dataset, cell.where), loss, _endings(cell) + since, rate])
    header = [*_dims(dataset), f"loss at {at_the_end(dataset)}", "then", f"decades per {clock(dataset).unit}"]
    floor = float(rounding_floors(dataset).median())
    text = (
        "`level`: the loss changes by less than a hundredth of a decade in the last tenth of the run (on a saddle as "
        f"well); `at rounding`: below {floor:.1g}, where the loss is only rounding. "
        f"{_medians(dataset)}"
    )
    if "least_loss" in dataset.coords:
        text = f"The loss is L - L*, in excess of the least loss of such a network. {text}"
    return Table("loss", "Where the loss stops", text, header, rows)


def _endings(cell: Cell) -> str:
    if len(cell.endings) == 1:
        return cell.ending
    return ", ".join(f"{word} ({count} of {sum(cell.endings.values())})" for word, count in cell.endings.items())


def _rate(cell: Cell) -> str:
    return f"{abs(cell.rate.median):.2g}" if np.isfinite(cell.rate.median) else "-"


def _medians(dataset: xr.Dataset) -> str:
    return "Medians over seeds, with the range of the seeds in brackets." if dataset.sizes["seed"] > 1 else "One seed."


def _dims(dataset: xr.Dataset) -> list[str]:
    """The columns by which a row is known: what differs between rows, or the initialisation."""
    varied = [str(dim) for dim in dataset["status"].dims if dim != "seed" and dataset.sizes[dim] > 1]
    return varied or ["init"]


def _start(dataset: xr.Dataset, where: Mapping[str, Any]) -> list[str]:
    return [show(where[dim]) for dim in _dims(dataset)]


def _name(dataset: xr.Dataset, cell: Cell, left_out: Mapping[str, Any] | None = None) -> str:
    plain = ("init",)
    dims = [dim for dim in _dims(dataset) if dim not in (left_out or {})] or ["init"]
    return ", ".join(show(cell.where[dim]) if dim in plain else f"{dim} {show(cell.where[dim])}" for dim in dims)


def median(values: OverSeeds, alone: bool = False) -> str:
    """The median, and the range where there are several, unless it is to stand alone."""
    if np.isnan(values.median):
        return "-"
    middle_one, low, high = (f"{one:.2g}" for one in (values.median, values.low, values.high))
    return middle_one if low == high or alone else f"{middle_one} ({low} to {high})"


def error(values: OverSeeds, dataset: xr.Dataset, alone: bool = False) -> str:
    """An alignment error, or "rounding" where it is only rounding."""
    return "rounding" if values.median < rounding_of_errors(dataset) else median(values, alone)


def when(found: float, dataset: xr.Dataset, after: str) -> str:
    """A median of times that are reached, after these words; or before which save it was, of the first ones."""
    if found == BEFORE:
        return f"before the first save, {_first_save(dataset)}"
    limit = _bound(found, dataset)
    return f"before {clock(dataset).at}{limit:.3g}" if np.isfinite(limit) else f"{after}{found:.3g}"


def time(values: OverSeeds, dataset: xr.Dataset, seeds: int = 0) -> str:
    """The same for a table, "-" where none is reached, and how many seeds reach one if not all."""
    if not values.reached:
        return "-"
    some = f" ({values.reached} of {seeds})" if values.reached < seeds else ""
    limit = float(dataset["time"][0]) if values.when == BEFORE else _bound(values.when, dataset)
    return f"{f'< {limit:.3g}' if np.isfinite(limit) else f'{values.when:.3g}'}{some}"


def _bound(found: float, dataset: xr.Dataset) -> float:
    return bound(found, dataset["time"].values)


def _first_save(dataset: xr.Dataset) -> str:
    return f"{clock(dataset).at}{float(dataset['time'][0]):.3g}"

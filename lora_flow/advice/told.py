"""An advice in words and tables: for a terminal, and for `report.md`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from lora_flow.advice.choice import Cell
from lora_flow.results.report import show, table

PHASES = {"t_align": "aligned at", "t1": "grown at"}  # of the linearised flow
LAYERS = 20  # that a terminal's table has; the report has all


def tables(
    dataset: xr.Dataset, cell: Cell | None, translation: Sequence[Sequence[str]], layers: int | None = LAYERS
) -> str:
    """All tables, each under its heading, in Markdown."""
    cell = cell or _any(dataset)
    parts = [_over_rank(dataset, cell), _over_init(dataset, cell), _over_size(dataset, cell)]
    parts += [_over_layers(dataset, cell, layers)] if dataset.sizes["layer"] > 1 else []
    parts += [_heading("In practice and in theory", table(["set", "theory", "here"], translation))]
    return "\n\n".join(parts)


def report(words: tuple[str, str, str], assumptions: Sequence[str], links: Sequence[str], tables: str) -> str:
    """The text of report.md; `words` are the reason, the confidence, and the command."""
    reason, confidence, command = words
    bullets = "\n".join(f"- {line}" for line in assumptions)
    parts = ["# Which start, which size, which rank", reason, f"Confidence {confidence}."]
    parts += [f"```sh\n{command}\n```"] if command else []
    parts += [f"![]({link})" for link in links]
    return "\n\n".join([*parts, _heading("Assumptions", bullets), tables]) + "\n"


def _over_rank(dataset: xr.Dataset, cell: Cell) -> str:
    at = dataset["loss_floor"].sel(init=cell.init, size=cell.size)
    good = _usable(dataset)
    time = dataset["time_level"].where(good).sel(init=cell.init).min("size")
    least = dataset["time_level"].where(good).min(["init", "size"])
    share = dataset["share"]
    rows = []
    for rank in dataset["rank"].values.tolist():
        held = float((dataset["held"].sel(rank=rank) * share).sum())
        floor = float((dataset["floor"].sel(rank=rank) * share).sum())
        own = float(at.sel(rank=rank))
        numbers = [
            _percent(held),
            _percent(floor),
            _percent(own),
            _time(time.sel(rank=rank)),
            _time(least.sel(rank=rank)),
        ]
        rows.append([f"**{rank}**" if rank == cell.rank else rank, *numbers])
    header = ["rank", "gradient's energy held", "loss it leaves", f"leaves from {cell.init}"]
    header += [f"time of {cell.init}, best size", "time of the best start"]
    mean = "A rank is the mean over layers. " if dataset.sizes["layer"] > 1 else ""
    about = f"{mean}Times are to {dataset.attrs['level']:g} of the loss, over sizes that may be recommended."
    return _heading("Over the rank", f"{about}\n\n{table(header, rows)}")


def _over_init(dataset: xr.Dataset, cell: Cell) -> str:
    good = _usable(dataset)
    rows = []
    for init in dataset["init"].values.tolist():
        here = dataset.sel(init=init, rank=cell.rank)
        time = here["time_level"].where(good.sel(init=init, rank=cell.rank), np.inf)
        known = bool(np.isfinite(here["alpha"]).any())
        if not known:
            rows.append([init, "needs what this layer has not, or another rank", *[""] * (len(_header(dataset)) - 1)])
            continue
        size = str(here["size"].values[int(np.argmin(time.values))]) if np.isfinite(time).any() else cell.size
        rows.append([f"**{init}**" if init == cell.init else init, *_numbers(here.sel(size=size), size)])
    header = ["start", *_header(dataset)]
    about = f"At rank {cell.rank}, each start at its best size that may be recommended."
    return _heading("Over the start", f"{about}\n\n{table(header, rows)}")


def _over_size(dataset: xr.Dataset, cell: Cell) -> str:
    here = dataset.sel(init=cell.init, rank=cell.rank)
    soonest = float(here["time_begins"].min())
    rows = []
    for size in here["size"].values.tolist():
        one = here.sel(size=size)
        waited, tail = float(one["time_begins"]) - soonest, float(one["time_level"]) - float(one["time_begins"])
        marked = f"**{size}**" if size == cell.size else size
        spent = [_time(waited), _time(tail)] if np.isfinite(one["alpha"]) else ["", ""]
        rows.append([marked, *_numbers(one, size)[1:BEFORE], *spent, *_numbers(one, size)[BEFORE:]])
    header = _header(dataset)
    header = [*header[:BEFORE], "lost before learning begins", "from there to the level", *header[BEFORE:]]
    about = (
        f"{cell.init} at rank {cell.rank}. A size is Z's norm over a solution's; own is peft init's. "
        "A small start loses time before it begins to learn, a large one on its plateau or slow tail."
    )
    return _heading("Over alpha", f"{about}\n\n{table(header, rows)}")


_HEADER = ["size", "alpha", "size is", "norm of Z", "time to 0.9", "time to the level", "least to most", "closed form"]
_HEADER += ["loss at t = 0", "loss it leaves", "dead directions"]
BEFORE = _HEADER.index("time to the level")  # to which the times that make it up come


def _header(dataset: xr.Dataset) -> list[str]:
    return [*_HEADER, *(["loss after the steps"] if "loss_end" in dataset else [])]


def _numbers(one: xr.Dataset, size: str) -> list[Any]:
    if not np.isfinite(one["alpha"]):
        return [size, *["-"] * (len(_header(one)) - 1)]
    least, most = float(one["time_least"]), float(one["time_most"])
    closed = float(one["time_closed"])
    return [
        size,
        show(float(one["alpha"])),
        show(float(one["relative_size"])),
        show(float(one["norm"])),
        _time(one["time_begins"]),
        _time(one["time_level"]),
        f"{_time(least)} to {_time(most)}" if least < most else "",
        "" if np.isnan(closed) else _time(closed),
        _percent(float(one["loss_start"])),
        _percent(float(one["loss_floor"])),
        int(one["dead_directions"]) if np.isfinite(one["dead_directions"]) else "-",
        *([_percent(float(one["loss_end"]))] if "loss_end" in one else []),
    ]


def _over_layers(dataset: xr.Dataset, cell: Cell, most: int | None) -> str:
    here = dataset.sel(rank=cell.rank)
    phases = [name for name in ("t_align", "t1") if name in dataset and not dataset[name].isnull().all()]
    rows = [
        [
            name,
            _percent(float(here["share"][i])),
            show(float(here["sigma_1"][i])),
            int(here["ranks"][i]),
            _percent(float(here["held"][i])),
            _percent(float(here["floor"][i])),
            *(_time(here[phase][i]) for phase in phases),
        ]
        for i, name in enumerate(dataset["layer"].values.tolist())
    ]
    shown = rows if most is None else rows[:most]
    header = ["layer", "share of the loss", "sigma_1", "rank", "gradient's energy held", "loss it leaves"]
    header += [PHASES[name] for name in phases]
    more = f"\n\nThe first {len(shown)} of {len(rows)} layers." if len(shown) < len(rows) else ""
    return _heading("Layer by layer", f"{table(header, shown)}{more}")


def _usable(dataset: xr.Dataset) -> xr.DataArray:
    return dataset["admissible"].astype(bool)


def _any(dataset: xr.Dataset) -> Cell:
    """A cell to tell of, where none is recommended."""
    known = [init for init in dataset["init"].values.tolist() if np.isfinite(dataset["alpha"].sel(init=init)).any()]
    return Cell(known[0], str(dataset["size"].values[0]), int(dataset["rank"].values[-1]))


def _heading(name: str, content: str) -> str:
    return f"## {name}\n\n{content}"


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.3g} %"


def _time(value: Any) -> str:
    time = float(value)
    return "-" if np.isnan(time) else "not reached" if np.isinf(time) else show(time)

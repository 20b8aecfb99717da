"""The final values of a run as tables for people: `report.md`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from lora_flow.labels import LANE_DIMS, layers_of
from lora_flow.levels import told
from lora_flow.rounding import rounding_floors

LOG_FLOOR = 1e-40  # stands in for an exact zero where a logarithm is taken


def log10(values: xr.DataArray) -> xr.DataArray:
    """log10, with exact zeros at the floor; NaN, the mark of a lane that failed, stays NaN."""
    return xr.apply_ufunc(np.log10, values.where(~(values < LOG_FLOOR), LOG_FLOOR))


def mean_and_std(values: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Mean and one standard deviation over seeds, lanes that failed left out."""
    return values.mean("seed", skipna=True), values.std("seed", skipna=True)


def cells(dataset: xr.Dataset) -> Iterator[tuple[dict[str, Any], xr.Dataset]]:
    """Every combination of initialisation, side, alpha and rank, with its dataset over seed and time."""
    dims = [str(dim) for dim in dataset["status"].dims if dim != "seed"]
    for index in np.ndindex(*(dataset.sizes[dim] for dim in dims)):
        where = dict(zip(dims, index, strict=True))
        yield {dim: dataset[dim].values[i].item() for dim, i in where.items()}, dataset.isel(where)


def final_values(dataset: xr.Dataset) -> str:
    """A Markdown table of the values at the last time: means over seeds, plus or minus one standard deviation.

    Losses below their rounding floor are not numbers: "at rounding".
    """
    varied = problem_dims(dataset)
    header = [*varied, "init", "side", "alpha", "rank", "log10 loss", "log10 alignment error"]
    layers = range(1, 3 if "norm_z2" in dataset else 2)
    header += [*(f"norm Z{i}" for i in layers), "steps", "done"]
    floors = bool(dataset["loss_floor"].notnull().any())
    header += (["lowest possible loss"] if floors else []) + (["distance"] if "distance" in dataset else [])
    rows = []
    for coordinates, cell in cells(dataset):
        last = cell.isel(time=-1)
        rows.append(
            [
                *(show(coordinates[dim]) for dim in varied),
                coordinates["init"],
                coordinates.get("side", dataset.attrs.get("side")),
                f"{coordinates['alpha']:g}",
                coordinates["rank"],
                told(last["loss"], rounding_floors(cell)),
                _spread(log10(last["alignment_error"]), 2),
                *(_spread(last[f"norm_z{i}"], 3) for i in layers),
                f"{int(cell['steps'].min())}-{int(cell['steps'].max())}",
                f"{int((cell['status'] == 0).sum())} of {cell.sizes['seed']}",
                *([_floor(cell["loss_floor"])] if floors else []),
                *([_mantissa(last["distance"])] if "distance" in last else []),
            ]
        )
    return table(header, rows)


def warnings(dataset: xr.Dataset) -> str:
    """What a start makes impossible, a line each: directions that never move, and losses that cannot be reached."""
    lines = []
    for coordinates, cell in cells(dataset):
        where = ", ".join(f"{name} {show(value)}" for name, value in coordinates.items() if dataset.sizes[name] > 1)
        where = where or str(coordinates["init"])
        dead, floor = int(cell["dead_directions"].max()), float(cell["loss_floor"].mean())
        layers = len(layers_of(dataset))
        if dead:
            of = f"{layers * coordinates['rank']} directions" + (f" of the {layers} layers" if layers > 1 else "")
            lines.append(f"- {where}: {dead} of {of} are dead: zero in both factors, they never move.")
        if floor > 0:
            lines.append(f"- {where}: no loss below {floor:.3g} can be reached at this rank from this start.")
    return "\n".join(lines)


def problem_dims(dataset: xr.Dataset) -> list[str]:
    """The dimensions along which the problem differs."""
    return [str(dim) for dim in dataset["status"].dims if dim not in LANE_DIMS]


def show(value: Any) -> str:
    """A coordinate as people write it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(runs: Mapping[str, Sequence[str]], pictures: Sequence[str], notes: str = "") -> str:
    """The text of `report.md`: the parts that tell of each run, then the notes and the pictures."""
    parts = ["# Gradient flow of LoRA: final values"]
    for name, lines in runs.items():
        parts += [f"## {name}"] if name else []
        parts += lines
    parts += [notes, *(f"![{picture}]({picture})" for picture in pictures)]
    return "\n\n".join(part for part in parts if part) + "\n"


def about(dataset: xr.Dataset) -> str:
    """One paragraph: the problem, the flow, its accuracy."""
    attrs = dataset.attrs
    problem = f"Layers {' and '.join(f'{out} x {into}' for out, into in layers_of(dataset))}"
    if varied := problem_dims(dataset):
        problem += f"; {' x '.join(str(dataset.sizes[dim]) for dim in varied)} problems over {', '.join(varied)}"
    elif "sigma_shift" in attrs:
        aligned = "aligned" if attrs["aligned"] else "not aligned"
        problem += f"; shift of rank {np.size(attrs['sigma_shift'])}, {aligned} with the weights"
        problem += f"; delta_w = {attrs['delta_w']:.4g}"
    name, largest = attrs.get("flow", "plain"), float(dataset["drift"].max())
    flow = "Flow" if name == "plain" else f"Flow {name}"
    drift = " Largest drift of the conserved quantities, relative to the adapters' squared norm: "
    drift = "" if np.isnan(largest) else f"{drift}{largest:.1g}."
    return (
        f"{problem}. {flow} to t = {attrs['t1']:g} by {attrs['solver']} at rtol = {attrs['rtol']:g} "
        f"({attrs['dtype']}); {dataset.sizes['seed']} seeds, mean and one standard deviation over seeds.{drift}"
    )


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def failed(datasets: Iterable[xr.Dataset]) -> Mapping[str, int]:
    """How many lanes ended with each status other than success."""
    counts: dict[str, int] = {}
    for dataset in datasets:
        attrs = dataset["status"].attrs
        for code, meaning in zip(attrs["flag_values"], attrs["flag_meanings"].split(), strict=True):
            count = int((dataset["status"] == code).sum())
            if code != 0 and count:
                counts[meaning] = counts.get(meaning, 0) + count
    return counts


def _floor(floors: xr.DataArray) -> str:
    mean = float(floors.mean())
    return "" if np.isnan(mean) else f"{mean:.2g}"


def _mantissa(values: xr.DataArray) -> str:
    mean, std = mean_and_std(values)
    return f"{float(mean):.3g} ± {float(std):.1g}"


def _spread(values: xr.DataArray, digits: int) -> str:
    mean, std = mean_and_std(values)
    return f"{float(mean):.{digits}f} ± {float(std):.{digits}f}"

"""`report.md`: its parts in order, its tables, and the description of a run."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from lora_flow.initialization import INITIALIZATIONS
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.clock import at_the_end, is_descent, over_time
from lora_flow.results.levels import spread, told
from lora_flow.results.phases import aligning, leading
from lora_flow.storage.blocks import blocks, blockwise
from lora_flow.storage.lanes import waiting
from lora_flow.sweeps.schema import DESCENT_DIMS, LANE_DIMS, layers_of

LOG_FLOOR = 1e-40  # stands in for an exact zero where a logarithm is taken
SOLVED_BY = {"Automatic": "Tsit5 and RKC (auto)", "RungeKuttaChebyshev": "RKC"}  # as --solver has them
OPTIMISERS = {"gd": "Gradient descent", "sign": "Sign descent", "adam": "Adam"}
LONG, HEAD = 30, 10  # rows of a table beyond which it goes to a file, and those that are shown then


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a report under its heading, with an explanation; a long table goes to `report-NAME.csv`."""

    name: str
    heading: str
    about: str
    header: Sequence[Any]
    rows: Sequence[Sequence[Any]]


def log10(values: xr.DataArray) -> xr.DataArray:
    """log10, with exact zeros at the floor; NaN, the mark of a lane that failed, stays NaN."""
    return xr.apply_ufunc(np.log10, values.where(~(values < LOG_FLOOR), LOG_FLOOR))


def mean_and_std(values: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Mean and one standard deviation over seeds, lanes that failed left out."""
    return values.mean("seed", skipna=True), values.std("seed", skipna=True)


def cells(
    dataset: xr.Dataset, of_lanes: Callable[[xr.Dataset], xr.Dataset] = lambda dataset: dataset
) -> Iterator[tuple[dict[str, Any], xr.Dataset]]:
    """Every combination of problem, initialisation, side, alpha and rank, with its dataset over seed, read into memory.

    Give it the variables that are needed, and of values over time what is told of each lane, as a function (see
    `lora_flow.storage.blocks.blockwise`).
    """
    dims = [str(dim) for dim in dataset["status"].dims if dim != "seed"]
    for place in blocks(dataset, set(map(str, dataset.dims)) - set(dims)):
        block = blockwise(of_lanes, dataset.isel(place))
        for index in np.ndindex(*(block.sizes[dim] for dim in dims)):
            where = dict(zip(dims, index, strict=True))
            yield {dim: block[dim].values[i].item() for dim, i in where.items()}, block.isel(where)


def final_values(dataset: xr.Dataset) -> Table:
    """The values at the last time: means over seeds, plus or minus one standard deviation where there are several."""
    dataset = over_time(dataset)
    varied, by = problem_dims(dataset), [dim for dim in DESCENT_DIMS if dim in dataset.dims]
    header = [*varied, "init", "side", *by, "alpha", "rank", "log10 loss", "log10 alignment error"]
    layers = range(1, 1 + len(layers_of(dataset)))
    header += [*(f"norm Z{i}" for i in layers), "steps", "done"]
    until = {name: f"A{i} shrunk until" for i in layers if (name := f"shrunk_until{i}") in dataset}
    header += until.values()
    lowest = bool(dataset["loss_floor"].notnull().any())
    header += (["lowest possible loss"] if lowest else []) + (["distance"] if "distance" in dataset else [])
    rows = []
    names = ["status", "loss", "steps", "loss_floor", *(f"norm_z{i}" for i in layers), *until]
    names += ["distance"] if "distance" in dataset else []
    error = leading(dataset.isel(time=-1), "alignment_error", "alignment_error_2")
    ended = dataset[names].isel(time=-1).assign(floor=rounding_floors(dataset), error=error)
    for coordinates, last in cells(ended):
        rows.append(
            [
                *(show(coordinates[dim]) for dim in varied),
                coordinates["init"],
                side_of(coordinates, dataset),
                *(show(coordinates[dim]) for dim in by),
                f"{coordinates['alpha']:g}",
                coordinates["rank"],
                told(last["loss"], last["floor"]),
                spread(log10(last["error"])),
                *(spread(last[f"norm_z{i}"], 3) for i in layers),
                _steps(last),
                f"{int((last['status'] == 0).sum())} of {last.sizes['seed']}",
                *(spread(last[name], 3) for name in until),
                *([_floor(last["loss_floor"])] if lowest else []),
                *([_mantissa(last["distance"])] if "distance" in last else []),
            ]
        )
    several = "Means over seeds, ± one standard deviation." if dataset.sizes["seed"] > 1 else ""
    of = f" The alignment error is that of {aligning(dataset)}." if len(layers_of(dataset)) > 1 else ""
    return Table("final", "Final values", f"{several}{of}".strip(), header, rows)


def _steps(cell: xr.Dataset) -> str:
    steps = cell["steps"].values[~waiting(cell["status"])]
    if not steps.size:
        return "-"
    return f"{steps.min()}-{steps.max()}" if steps.min() < steps.max() else str(steps.max())


def warnings(dataset: xr.Dataset) -> str:
    """The limits of each start, a line each: directions that never move, and losses that cannot be reached."""
    lines = []
    for coordinates, cell in cells(dataset[["status", "dead_directions", "loss_floor"]]):
        where = ", ".join(f"{name} {show(value)}" for name, value in coordinates.items() if dataset.sizes[name] > 1)
        where = where or str(coordinates["init"])
        dead, floor = int(cell["dead_directions"].max()), float(cell["loss_floor"].mean())
        layers = len(layers_of(dataset))
        if dead > 0:  # -1 where no lane has run yet
            of = f"{layers * coordinates['rank']} directions" + (f" of the {layers} layers" if layers > 1 else "")
            lines.append(f"- {where}: {dead} of {of} are dead: zero in both factors, they never move.")
        if floor > 0:
            lines.append(f"- {where}: no loss below {floor:.3g} can be reached at this rank from this start.")
    return "\n".join(lines)


def problem_dims(dataset: xr.Dataset) -> list[str]:
    """The dimensions along which the problem differs."""
    return [str(dim) for dim in dataset["status"].dims if dim not in (*LANE_DIMS, *DESCENT_DIMS)]


def side_of(coordinates: Mapping[str, Any], dataset: xr.Dataset) -> str:
    """The side that a cell's start was drawn by; "-" for a start that knows none, unless cells differ by it."""
    if "side" in coordinates:
        return str(coordinates["side"])
    return str(dataset.attrs.get("side")) if _is_sided(coordinates["init"]) else "-"


def _is_sided(init: str) -> bool:
    """Whether an initialisation draws the factor that `side` names; own ones are taken to."""
    known = INITIALIZATIONS.get(init.partition(":")[0])
    return known is None or known.sided


def show(value: Any) -> str:
    """A coordinate as people write it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def unfinished(datasets: Iterable[xr.Dataset]) -> str:
    """ "unfinished: 40 of 240 lanes", or "" where every lane has run."""
    wait = np.concatenate([waiting(dataset["status"]).ravel() for dataset in datasets] or [np.zeros(0, bool)])
    return f"unfinished: {np.sum(~wait)} of {wait.size} lanes" if wait.any() else ""


def report(
    runs: Mapping[str, Sequence[str | Table]], pictures: Sequence[str], notes: str = "", state: str = ""
) -> tuple[str, dict[str, str]]:
    """The text of `report.md`, and the files beside it, name -> text, that hold its long tables.

    The text has first `state`, unless empty, then the notes of a figure, then the parts of each run, and the pictures.
    """
    parts = ["# LoRA: when it aligns, and where the loss stops", state and f"**{state}**"]
    files: dict[str, str] = {}
    parts += [f"![{picture}]({picture})" for picture in pictures[:1]] + [notes]
    for name, run_parts in runs.items():
        parts += [f"# {name}"] if name else []
        for part in run_parts:
            parts += _shown(part, name, files) if isinstance(part, Table) else [part]
    parts += [f"![{picture}]({picture})" for picture in pictures[1:]]
    return "\n\n".join(part for part in parts if part) + "\n", files


def _shown(part: Table, run: str, files: dict[str, str]) -> Iterator[str]:
    yield f"## {part.heading}"
    yield part.about
    if len(part.rows) <= LONG:
        yield table(part.header, part.rows)
        return
    file = f"report-{run}-{part.name}.csv" if run else f"report-{part.name}.csv"
    files[file] = _csv(part)
    yield table(part.header, part.rows[:HEAD])
    yield f"The first {HEAD} of {len(part.rows)} rows; all of them are in [{file}]({file})."


def _csv(part: Table) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([part.header, *part.rows])
    return text.getvalue()


def about(dataset: xr.Dataset) -> str:
    """One paragraph: the problem, the flow and its accuracy, or the descent."""
    dataset, attrs = over_time(dataset), dataset.attrs
    problem = f"{kind_of(dataset).capitalize()}, {' and '.join(f'{out} x {into}' for out, into in layers_of(dataset))}"
    if varied := problem_dims(dataset):
        problem += f"; {' x '.join(str(dataset.sizes[dim]) for dim in varied)} problems over {', '.join(varied)}"
    elif "sigma_shift" in attrs:
        aligned = "aligned" if attrs["aligned"] else "not aligned"
        problem += f"; shift of rank {np.size(attrs['sigma_shift'])}, {aligned} with the weights"
        problem += f"; delta_w = {attrs['delta_w']:.4g}" + ("" if attrs["aligned"] else " along the shift's top pair")
    same = [
        f"{dim} {show(dataset[dim].values.tolist()[0])}" for dim in ("init", "alpha", "rank") if dataset.sizes[dim] == 1
    ]
    sided = any(map(_is_sided, dataset["init"].values.tolist()))
    same += [f"side {attrs['side']}"] if "side" in attrs and sided else []
    seeds = f"{dataset.sizes['seed']} seeds" if dataset.sizes["seed"] > 1 else "one seed"
    if is_descent(dataset):
        return f"{problem}. {_descent(dataset)} ({attrs['dtype']}); {', '.join([*same, seeds])}."
    drifts = blockwise(lambda one: one.max("time"), dataset[["drift"]])["drift"]
    name, largest = attrs.get("flow", "plain"), float(drifts.max())
    flow = "Flow" if name == "plain" else f"Flow {name}"
    drift = " Integration error (drift of the conserved quantities, relative to the adapters' squared norm; "
    drift = f"{drift}should be far below 1e-2): {largest:.1g}."
    if np.isnan(largest):
        drift = " The run conserves nothing whose drift would tell an integration error."
    finished = bool(dataset["loss"].isel(time=-1).notnull().any())
    solver = SOLVED_BY.get(attrs["solver"], attrs["solver"])
    return (
        f"{problem}. {flow} to {at_the_end(dataset)} by {solver} at rtol = {attrs['rtol']:g} "
        f"({attrs['dtype']}); {', '.join([*same, seeds])}.{drift if finished else ''}"
    )


def _descent(dataset: xr.Dataset) -> str:
    """Who takes steps, of which size."""
    values = {dim: np.ravel(dataset[dim] if dim in dataset.coords else dataset.attrs[dim]) for dim in DESCENT_DIMS}
    names, steps = values["optimizer"].tolist(), values["step"]
    by = f"{' and '.join(OPTIMISERS.get(name, name) for name in names)}, step size {show(float(steps.min()))}"
    by += f" to {show(float(steps.max()))}" if steps.size > 1 else ""
    noises = [show(float(noise)) for noise in values["gradient_noise"]]
    noise = f", noise {' and '.join(noises)} in the gradient" if values["gradient_noise"].any() else ""
    return f"{by}{noise}, {dataset.attrs['steps']:g} iterations"


def kind_of(dataset: xr.Dataset) -> str:
    """The kind of a result's problem, for a sentence."""
    layers = len(layers_of(dataset))
    if "sigma_w1" in dataset.coords:
        return "a factorisation of two layers"
    if "least_loss" in dataset.coords:
        return "a linear network trained from scratch"
    return "one adapted layer" if layers == 1 else f"a problem of {layers} adapted layers"


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _floor(lowest: xr.DataArray) -> str:
    mean = float(lowest.mean())
    return "" if np.isnan(mean) else f"{mean:.2g}"


def _mantissa(values: xr.DataArray) -> str:
    (mean, std), several = mean_and_std(values), int(values.notnull().sum()) > 1
    return f"{float(mean):.3g}" + (f" ± {float(std):.1g}" if several else "")

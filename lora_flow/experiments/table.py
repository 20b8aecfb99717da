"""The named figures: the runs, pictures and table of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from lora_flow.experiments import paper
from lora_flow.experiments.comparison import INITS, KAPPA_RUNS, draw_inits, draw_kappa, inits_notes, kappa_notes
from lora_flow.problems.rounding import rounding_floors
from lora_flow.results.levels import told
from lora_flow.results.phases import phases
from lora_flow.results.report import log10, show, table
from lora_flow.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Datasets = Mapping[str, xr.Dataset]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A figure made of one run, named "", whose folder is the figure's own, or of several, each in its own folder."""

    about: str
    runs: Mapping[str, Settings]
    draw: Callable[[Datasets], dict[str, Figure]]  # what to add to the picture's name -> picture
    notes: Callable[[Datasets], str]


def _panels(rows: Mapping[str, paper.Row]) -> Callable[[Datasets], dict[str, Figure]]:
    def draw(datasets: Datasets) -> dict[str, Figure]:
        from lora_flow.figures.over_time import panels, single_cases

        cases = {name: dict(single_cases(dataset)) for name, dataset in datasets.items()}
        until = [row.alignment_until for row in rows.values()]
        suffixes = next(iter(cases.values()))
        return {
            "" if suffix == "-B" else suffix: panels([cases[name][suffix] for name in rows], until)
            for suffix in suffixes
        }

    return draw


def _paper(about: str, rows: Mapping[str, paper.Row]) -> Experiment:
    settings = {name: row.settings for name, row in rows.items()}
    return Experiment(about, settings, _panels(rows), lambda datasets: paper.comparison(rows, datasets))


PHASE_ALPHAS = tuple(float(f"{alpha:.3g}") for alpha in np.geomspace(1e-6, 1e-2, 9))
PHASE = Settings(
    side=("B",),
    alpha=PHASE_ALPHAS,
    rank=(1, 2, 4, 6, 8, 10),
    delta_w=(0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 1 / 1.05**2),
    seeds=3,
    t1=5.0,
    saves=101,
    spacing="log",
)


def _phase_notes(datasets: Datasets) -> str:
    from lora_flow.figures.maps import phase_values

    dataset = datasets[""].assign(rounding_floor=rounding_floors(datasets[""])).squeeze("init")
    values, last = phase_values(datasets[""]).squeeze("init"), dataset.isel(time=-1)
    rows = []
    for delta_w, rank in [(1 / 1.05**2, 1), (1 / 1.05**2, 4), (1 / 1.05**2, 10), (0.25, 4), (0.01, 4)]:
        for alpha in (1e-6, 1e-4, 1e-2):
            cell = values.sel(delta_w=delta_w, alpha=alpha, method="nearest").sel(rank=rank)
            here = last.sel(delta_w=delta_w, alpha=alpha, method="nearest").sel(rank=rank)
            found = [told(here["loss"], here["rounding_floor"]), f"{float(cell['alignment_error']):.2f}"]
            t1 = f"{float(cell['t1']):.3g}" if np.isfinite(cell["t1"]) else "not reached"
            rows.append([f"{delta_w:.3g}", rank, f"{alpha:g}", *found, t1])
    header = ["delta_w", "rank", "alpha", "log10 loss at t = 5", "log10 (1 - cos)", "T1"]
    return "Some cells of the maps, side B, means over seeds:\n\n" + table(header, rows)


BEYOND = Settings(
    init=("gaussian", "spectral"), side=("B",), alpha=(1e-3, 1e-5), seeds=10, t1=20.0, saves=121, spacing="log"
)
SHIFT_RANKS = {
    k: dataclasses.replace(BEYOND, component=tuple(map(str, range(k))), shift_scale=(5.0, 4.0, 3.0, 2.0)[:k])
    for k in (1, 2, 4)
}
BEYOND_RUNS = {
    "angle": dataclasses.replace(BEYOND, angle=(0.0, 5.0, 15.0, 45.0, 90.0)),
    "noise": dataclasses.replace(BEYOND, init=("gaussian",), noise=(0.0, 1e-4, 1e-3, 1e-2, 1e-1)),
} | {f"shift-rank-{k}": settings for k, settings in SHIFT_RANKS.items()}


def _families(datasets: Datasets) -> list[tuple[str, str, xr.Dataset]]:
    ranks = xr.concat(
        [datasets[f"shift-rank-{k}"].drop_attrs() for k in SHIFT_RANKS],
        xr.Variable("shift rank", list(SHIFT_RANKS)),
        coords="minimal",
        compat="override",
    )
    return [
        ("Shift turned by an angle (degrees)", "angle", datasets["angle"]),
        ("Shift of higher rank", "shift rank", ranks),
        ("Noise in the pretrained weights", "noise", datasets["noise"]),
    ]


def _draw_beyond(datasets: Datasets) -> dict[str, Figure]:
    from lora_flow.figures.maps import families

    return {"": families([(title, dim, one.isel(alpha=-1, rank=0)) for title, dim, one in _families(datasets)])}


def _beyond_notes(datasets: Datasets) -> str:
    rows = []
    for _, dim, dataset in _families(datasets):
        spans = phases(dataset)
        last = dataset.isel(time=-1).assign(rounding_floor=rounding_floors(dataset))
        for value in dataset[dim].values:
            for init in dataset["init"].values:
                for alpha in dataset["alpha"].values:
                    where = {dim: value, "init": init, "alpha": alpha}
                    ratio = (spans["t1"] / spans["t1_predicted"]).sel(where)
                    rows.append(
                        [
                            f"{dim} {show(value.item())}",
                            init,
                            f"{alpha:g}",
                            told(last["loss"].sel(where), last["rounding_floor"].sel(where)),
                            f"{float(log10(last['alignment_error'].sel(where)).mean()):.2f}",
                            f"{float(ratio.mean()):.2f}" if np.isfinite(ratio).all() else "not reached",
                        ]
                    )
    header = ["problem", "init", "alpha", "log10 loss at t = 20", "log10 (1 - cos)", "T1 measured / predicted"]
    return "Side B, r = 4, means over seeds; cos is with the linearised task's top direction:\n\n" + table(header, rows)


def _draw_phase(datasets: Datasets) -> dict[str, Figure]:
    from lora_flow.figures.maps import phase_diagram

    return {"": phase_diagram(datasets[""], rank=4, delta_w=1 / 1.05**2)}


EXPERIMENTS = {
    "1": _paper("loss, alignment and phases at delta_w = 1/1.05^2", {"": paper.FIGURE_1}),
    "3": _paper("the same for three delta_w, shift along the top pair of the pretrained weights", paper.FIGURE_3),
    "4": _paper("the same, shift along the bottom pair", paper.FIGURE_4),
    "phase": Experiment("maps over alpha x rank and alpha x delta_w", {"": PHASE}, _draw_phase, _phase_notes),
    "beyond": Experiment("misaligned, higher-rank and noisy tasks", BEYOND_RUNS, _draw_beyond, _beyond_notes),
    "inits": Experiment("all the initialisations on one layer", {"": INITS}, draw_inits, inits_notes),
    "kappa": Experiment("rates against the condition number", KAPPA_RUNS, draw_kappa, kappa_notes),
}

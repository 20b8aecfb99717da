"""`lora-flow fit`: the parameters of a run from its loss curve."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lora_flow.cli.groups import Draws
from lora_flow.recipes import kinds
from lora_flow.runtime.interrupts import whole
from lora_flow.runtime.start import start_jax
from lora_flow.settings import Settings, to_table, with_absolute_path
from lora_flow.storage.locks import locked
from lora_flow.storage.remote import below, run_path
from lora_flow.storage.swap import write_atomically

if TYPE_CHECKING:
    import xarray as xr


@dataclasses.dataclass(frozen=True)
class Curve:
    """The columns of the file, and what to find from them."""

    clock: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: time, step or t)")] = None
    """The column of times or steps: by default time, step or t, whichever there is, or the first."""
    columns: tuple[str, ...] = ()
    """The columns of losses, one a run; the runs differ in their draws alone. By default those whose names begin with
    loss, or the only other one."""
    seed: tuple[int, ...] = ()
    """Seeds of the draws, one for each curve, where they are known. By default they are not: then two numbers a curve
    are found as well (for gaussian starts on aligned problems whose shift has rank one)."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What to find, the start of the run, and how it is solved."""

    unknown: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: alpha delta_w)")] = ()
    """What to find: alpha, rate, shift_scale (the shift's largest singular value), delta_w (of two layers)."""
    alpha: float = 1e-3
    """Initialisation scale. If unknown, a guess that may be wrong by a factor of 100."""
    rate: float = 1.0
    """Gradient-flow time of one unit of the clock: the learning rate where it counts steps. If unknown, a guess that
    may be wrong by a factor of 10."""
    init: str = "gaussian"
    """Initialisation, as for sweep."""
    side: str = "A"
    """The factor that gaussian draws, A or B."""
    rank: int = 4
    """LoRA rank."""
    error: Annotated[float | None, tyro.conf.arg(metavar="NUMBER", help_behavior_hint="(default: as scattered)")] = None
    """Relative error of a loss, 0.01 for one per cent. By default the scatter about the fit tells it."""
    level: float = 0.9
    """Probability that an interval holds the true value."""
    flow: str = "plain"
    """The flow, as for sweep."""
    solver: str = "Tsit5"
    """The solver, as for sweep; auto for long stiff runs."""
    rtol: float = 1e-5
    """Tolerance."""


@dataclasses.dataclass(frozen=True)
class Fit(Draws):
    """Find alpha, delta_w, the shift's size or the learning rate from an observed loss curve, with intervals.

    The curve is a CSV file whose first line names its columns: times or steps, and a loss for each run. The flags of
    the start and of the problem say what is known; of what is unknown they are first guesses. A folder gets
    settings.toml, results.zarr (open it with xarray.open_zarr), report.md, and figures/fit.png with the curve, the fit
    and the profile likelihoods. The answer says which parameters the curve does not tell apart.

    A run of rank 4 on the problem of Figure 1, whose alpha and delta_w nobody wrote down:

    lora-flow fit curve.csv --rank 4 --unknown alpha delta_w --out runs/fit

    Losses over steps of gradient descent, of which the learning rate is unknown too, in a column of its own:

    lora-flow fit log.csv --clock iteration --columns train --unknown alpha delta_w rate --rate 1e-3 --out runs/fit
    """

    curve: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CSV")]
    """The file with the curve. Losses must be positive and finite, and times must increase."""
    out: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """The folder."""
    overwrite: bool = False
    """Replace the folder if it holds a fit."""
    columns: Curve = dataclasses.field(default_factory=Curve)
    start: Start = dataclasses.field(default_factory=Start)
    problem: kinds.Trained = dataclasses.field(default_factory=kinds.Trained)
    aligned: kinds.Aligned = dataclasses.field(default_factory=kinds.Aligned)
    pretrained: kinds.Pretrained = dataclasses.field(default_factory=kinds.Pretrained)
    regression: kinds.Regression = dataclasses.field(default_factory=kinds.Regression)
    network: kinds.Network = dataclasses.field(default_factory=kinds.Network)
    symmetric: kinds.Symmetric = dataclasses.field(default_factory=kinds.Symmetric)

    def run(self) -> int:
        from lora_flow.design.curves import read_curves
        from lora_flow.design.fit_folder import FIT, store

        FIT.check_free(self.out, self.overwrite)
        asked = self.columns
        curves = read_curves(self.curve, clock=asked.clock, columns=asked.columns)
        groups = self.problem, self.aligned, self.pretrained, self.regression, self.network, self.symmetric
        told = {name: value for group in groups for name, value in vars(group).items()}
        settings = with_absolute_path(Settings(**told))
        own = {"curve": os.path.abspath(self.curve), "clock": curves.clock, "columns": curves.names, "seed": asked.seed}
        table = {name: value for name, value in to_table(settings).items() if name in told}
        table |= {name: list(one) if isinstance(one, tuple) else one for name, one in (own | vars(self.start)).items()}
        table = {name: one for name, one in table.items() if one is not None}
        with locked(self.out):  # or find out that the folder cannot be made before anything is computed
            FIT.check_free(self.out, self.overwrite)  # nobody can have made it since
            start_jax()
            dataset = self._fitted(curves, settings)
            with whole():
                store(self.out, table, dataset)
        return tell(self.out)

    def _fitted(self, curves: Any, settings: Settings) -> xr.Dataset:
        from lora_flow.design.fit import fit

        family, values = kinds.family(settings)
        asked = vars(self.start) | {"unknown": self.start.unknown or ("alpha", "delta_w")}
        return fit(curves.times, curves.losses, family(**values), seed=self.columns.seed or None, **asked)


def tell(out: str) -> int:
    """Draws a folder's picture, writes its report, and says what was found."""
    import matplotlib as mpl

    mpl.use("Agg")
    from lora_flow.design.fit_folder import load
    from lora_flow.design.fit_told import fit_told, report
    from lora_flow.figures.fits import fit_figure
    from lora_flow.figures.over_time import save_with_numbers
    from lora_flow.figures.written import picture_lines

    dataset, folder = load(out), run_path("the run folder", out)
    pictures = save_with_numbers({"fit": fit_figure(dataset)}, folder / "figures")
    write_atomically(folder / "report.md", report(dataset, [below(folder, picture) for picture in pictures]))
    print(*fit_told(dataset), *picture_lines(pictures), sep="\n")
    print(f"report: {folder / 'report.md'}")
    return 0

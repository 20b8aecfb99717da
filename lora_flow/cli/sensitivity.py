"""`lora-flow sensitivity`: what the result of a run depends on most."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lora_flow.cli.groups import Draws, OnGrid, OnProblem
from lora_flow.recipes import kinds
from lora_flow.runtime.interrupts import whole
from lora_flow.runtime.start import start_jax
from lora_flow.settings import Settings, to_table, with_absolute_path
from lora_flow.sizes import check_sizes
from lora_flow.storage.locks import locked
from lora_flow.storage.remote import below, run_path
from lora_flow.storage.swap import write_atomically

if TYPE_CHECKING:
    import xarray as xr


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity(Draws, OnProblem, OnGrid):
    """Say how much the loss, the alignment and the times of a run depend on alpha and on the problem.

    For every combination of initialisation, side, alpha, rank and seed, derivatives by automatic differentiation go to
    a folder: settings.toml, results.zarr (open it with xarray.open_zarr), report.md, and figures/ with a chart of the
    elasticities, the per cent of a quantity for one per cent of a parameter.

    Which of alpha, delta_w and the shift's size decides where the loss of Figure 1 is at t = 2, and how fast it falls?

    lora-flow sensitivity --at 2 --observable "log10 loss" "time to 1e-6" --out runs/sensitivity

    For a problem of your own:

    lora-flow sensitivity --problem target.npz --with-respect-to alpha shift_scale w1 --t1 10 --out runs/mine
    """

    out: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """The folder."""
    observable: tuple[str, ...] = ()
    """Quantities: "log10 loss" and "log10 alignment_error" at the time --at; and the times "time to LEVEL" at which the
    loss has come down to a level, "t_align" (end of alignment) and "t1" (end of growth, of two layers). By default
    log10 loss, and t1 of two layers."""
    with_respect_to: tuple[str, ...] = ()
    """Parameters: alpha; shift_scale, a factor on the shift; delta_w, angle and noise (--problem aligned), kappa and
    angle (regression); numbers and arrays of the problem, such as scaling, w1, w2 or shift. By default alpha,
    shift_scale, and of the others those that are not 0."""
    at: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: --t1)")] = None
    """The time at which loss and alignment are taken."""
    t1: float = 5.0
    """End of the flow, in gradient-flow time."""
    flow: str = "plain"
    """The flow, as for sweep."""
    solver: str = "auto"
    """The solver, as for sweep."""
    rtol: float = 2e-4
    """Tolerance. At the default, derivatives are right to about a part in a thousand."""
    overwrite: bool = False
    """Replace the folder if it holds a sensitivity."""

    def run(self) -> int:
        from lora_flow.sensitivities.folder import SENSITIVITY, store

        SENSITIVITY.check_free(self.out, self.overwrite)
        own = {name: getattr(self, name) for name in ("t1", "flow", "solver", "rtol")}
        settings = with_absolute_path(Settings(**self.grouped, **own))
        asked = {name: getattr(self, name) for name in ("observable", "with_respect_to", "at")}
        table = {name: list(one) if isinstance(one, tuple) else one for name, one in asked.items() if one is not None}
        table |= {name: value for name, value in to_table(settings).items() if name in (*self.grouped, *own)}
        check_sizes(dataclasses.replace(settings, saves=2), 1, run_path("out", self.out))
        with locked(self.out):  # or find out that the folder cannot be made before anything is computed
            SENSITIVITY.check_free(self.out, self.overwrite)  # nobody can have made it since
            start_jax()
            dataset = self._solved(settings)
            with whole():
                store(self.out, table, dataset)
        return tell(self.out)

    def _solved(self, settings: Settings) -> xr.Dataset:
        from lora_flow.sensitivities.sensitivity import sensitivity

        family, values = kinds.family(settings)
        problem = family(**values)
        names = self.with_respect_to or ("alpha", *_shift(problem), *(one for one in values if values[one]))
        return sensitivity(
            family if values else problem,  # which may have been trained, and is not again
            parameters=values,
            with_respect_to=names,
            observable=self.observable or ("log10 loss", *_end_of_growth(problem)),
            at=self.at,
            t1=self.t1,
            flow=self.flow,
            solver=self.solver,
            rtol=self.rtol,
            **{name: getattr(settings, name) for name in ("init", "side", "alpha", "rank", "seeds")},
        )


def _shift(problem: Any) -> tuple[str, ...]:
    return ("shift_scale",) if hasattr(problem, "shift") else ()


def _end_of_growth(problem: Any) -> tuple[str, ...]:
    from lora_flow.problems.factorization import Factorization

    return ("t1",) if isinstance(problem, Factorization) else ()


def tell(out: str) -> int:
    """Draws a folder's pictures, writes its report, and says what matters most."""
    import matplotlib as mpl

    mpl.use("Agg")
    from lora_flow.figures.elasticities import elasticity_maps, tornado
    from lora_flow.figures.over_time import save_with_numbers
    from lora_flow.figures.written import picture_lines
    from lora_flow.pages.page import page
    from lora_flow.sensitivities.folder import load
    from lora_flow.sensitivities.told import lines, report
    from lora_flow.storage.folder import read_settings

    dataset, folder = load(out), run_path("the run folder", out)
    drawn = {"sensitivity": tornado(dataset), "sensitivity-map": elasticity_maps(dataset)}
    pictures = save_with_numbers({name: one for name, one in drawn.items() if one is not None}, folder / "figures")
    text = report(dataset, [below(folder, picture) for picture in pictures])
    write_atomically(folder / "report.md", text)
    write_atomically(folder / "report.html", page(text, folder, settings=read_settings(folder)["sensitivity"]))
    print(*lines(dataset), *picture_lines(pictures), sep="\n")
    print(f"report: {folder / 'report.md'}", f"page: {folder / 'report.html'}", sep="\n")
    return 0

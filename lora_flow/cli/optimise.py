"""`lora-flow optimise`: learn where to start."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lora_flow.checks import require, require_choice
from lora_flow.cli.groups import Draws, Pictures
from lora_flow.recipes import kinds
from lora_flow.runtime import interrupts
from lora_flow.runtime.start import start_jax
from lora_flow.settings import Settings, from_table, to_table, with_absolute_path
from lora_flow.storage.locks import locked
from lora_flow.storage.remote import below, local_path
from lora_flow.storage.swap import write_atomically

if TYPE_CHECKING:
    from lora_flow.design.optimise import Search


@dataclasses.dataclass(frozen=True)
class Optimise(Draws):
    """Learn a start of LoRA by gradient descent through the whole run: of one norm, so that only its direction counts.

    The folder gets settings.toml, results.zarr with every step, learned.safetensors with the winner, report.md, and a
    picture of the objective and of the angles to the gradient's singular vectors, along which spectral starts lie.

    From where, at the norm of Gaussian starts, is the loss of Figure 1 least at t = 1?

    lora-flow optimise --t1 1 --out runs/opt

    The winner is then an initialisation, in any sweep of the same layers:

    lora-flow sweep --init gaussian spectral learned:runs/opt --t1 1 --out runs/compared

    A rule of three numbers instead, which fits every problem, that serves the worst of four misaligned tasks:

    lora-flow optimise --parameters scheme --angle 45 --problem-seed 0 1 2 3 --over worst --t1 1 --out runs/rule

    After an interruption, with the same result to the last bit:

    lora-flow optimise --out runs/opt --resume
    """

    out: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """The folder."""
    parameters: str = "adapters"
    """What is learned: adapters (every entry of the factors), frames (factors with orthonormal rows and columns), or
    scheme (the mix of A and B along the gradient's singular vectors, the power of its singular values, and a weight for
    each layer)."""
    objective: str = "log10 loss"
    """What is to be small: "log10 loss" or "log10 alignment_error" at the time --at; or a time: "time to LEVEL",
    "t_align" or "t1"."""
    over: str = "mean"
    """With several problems: the mean of the objective, or the worst."""
    at: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: --t1)")] = None
    """The time at which loss and alignment are taken."""
    t1: float = 1.0
    """End of the flow, in gradient-flow time; up to then times are sought."""
    alpha: float = 1e-3
    """The norm: that of a Gaussian start of this scale, alpha sqrt(rank x sum of the layers' inputs)."""
    rank: int = 4
    """LoRA rank."""
    restarts: int = 8
    """Random starts that are optimised together."""
    seed: int = 0
    """Seed of their draws."""
    steps: int = 200
    """Steps of Adam."""
    rate: float = 0.1
    """Its step size at first, which falls to 0 along a cosine."""
    flow: str = "plain"
    """The flow, as for sweep."""
    solver: str = "Tsit5"
    """The solver, as for sweep. Derivatives through Tsit5 compile soonest; auto takes fewer steps on stiff runs."""
    rtol: float = 2e-4
    """Tolerance. At the default, derivatives are right to about a part in a thousand."""
    max_steps: int = 100_000
    """Solver steps after which a run is given up; its objective is then not finite."""
    resume: bool = False
    """Continue an unfinished search, with the settings that it was started with."""
    overwrite: bool = False
    """Replace the folder if it holds a search."""
    problem: kinds.Trained = dataclasses.field(default_factory=kinds.Trained)
    aligned: kinds.Aligned = dataclasses.field(default_factory=kinds.Aligned)
    pretrained: kinds.Pretrained = dataclasses.field(default_factory=kinds.Pretrained)
    regression: kinds.Regression = dataclasses.field(default_factory=kinds.Regression)
    network: kinds.Network = dataclasses.field(default_factory=kinds.Network)

    def from_file(self) -> Optimise | None:
        """The command with the settings of the folder that --resume names."""
        require(not (self.resume and self.overwrite), "resume and overwrite", "not be given together", "both")
        if not self.resume:
            return None
        from lora_flow.design.folder import settings_of

        table = settings_of(local_path("out", self.out))
        drawn = from_table({name: value for name, value in table.items() if name in _OF_PROBLEM}, self.out)
        groups = {
            name: kind(**{field.name: getattr(drawn, field.name) for field in dataclasses.fields(kind)})
            for name, kind in _GROUPS.items()
        }
        for name in (name for name in table if name not in _OF_PROBLEM):
            require_choice(f"a setting in '{self.out}'", name, _OWN)
        changed: Any = groups | {name: table.get(name) for name in _OWN}
        return dataclasses.replace(self, **changed)

    def run(self) -> int:
        from lora_flow.design.folder import SEARCH, finish, solve, template_of
        from lora_flow.storage.folder import is_started

        path = local_path("out", self.out)
        go_on = f"lora-flow optimise --out {self.out} --resume"
        if not self.resume:
            SEARCH.check_free(path, self.overwrite)
        start_jax()
        table, search = self._planned()
        template = template_of(table, search)
        if not (self.resume and is_started(path)):
            search.check_start()
        with locked(path):
            if not self.resume:
                SEARCH.check_free(path, self.overwrite)  # nobody can have made it since
                with interrupts.whole(f"nothing is stored yet, continue with: {go_on}"):
                    SEARCH.make(path, {"": template})
            folder = SEARCH.resume(path, template)
            if folder.damaged:
                print(f"damaged, and made again: {', '.join(folder.damaged)}")
            interrupts.tell(f"steps are stored in tens, continue with: {go_on}")
            solve(folder, search)
            with interrupts.whole():
                learned = finish(path, search)
        print(learned)
        return tell(self.out)

    def _planned(self) -> tuple[dict[str, Any], Search]:
        """The settings as they are stored, and the checked search."""
        from lora_flow.design.optimise import adam, plan_search

        told = {name: value for group in _GROUPS for name, value in vars(getattr(self, group)).items()}
        settings = with_absolute_path(Settings(**told))
        own = {name: getattr(self, name) for name in _OWN}
        stored = {name: value for name, value in to_table(settings).items() if name in told}
        table = {name: value for name, value in (own | stored).items() if value is not None}
        how = {name: value for name, value in own.items() if name != "rate"}
        require(self.steps >= 1, "steps", "be at least 1", self.steps)
        return table, plan_search(kinds.draw_all(settings), **how, optimizer=adam(self.rate, self.steps))


_GROUPS: dict[str, Any] = {
    field.name: field.default_factory
    for field in dataclasses.fields(Optimise)
    if field.default_factory not in (dataclasses.MISSING, Pictures)
}
_OF_PROBLEM = {field.name for kind in _GROUPS.values() for field in dataclasses.fields(kind)}
_NOT_STORED = (*_GROUPS, "pictures", "out", "resume", "overwrite")
_OWN = [field.name for field in dataclasses.fields(Optimise) if field.name not in _NOT_STORED]


def tell(out: str) -> int:
    """Draws a search's picture and writes its report."""
    import matplotlib as mpl

    mpl.use("Agg")
    from lora_flow.design.folder import stored
    from lora_flow.design.results import report, steps_of
    from lora_flow.figures.learned import learned_start
    from lora_flow.figures.over_time import save_with_numbers
    from lora_flow.figures.written import picture_lines

    folder = local_path("the run folder", out)
    dataset = steps_of(stored(folder))
    pictures = save_with_numbers({"optimise": learned_start(dataset)}, folder / "figures")
    write_atomically(folder / "report.md", report(dataset, [below(folder, picture) for picture in pictures]))
    print(*picture_lines(pictures), sep="\n")
    print(f"report: {folder / 'report.md'}\nstart from it with: --init learned:{out}")
    return 0

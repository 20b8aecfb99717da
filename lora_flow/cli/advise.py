"""`lora-flow advise`: which start, which size of it, and which rank."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lora_flow.checks import require
from lora_flow.cli.groups import Draws
from lora_flow.runtime.interrupts import whole
from lora_flow.runtime.start import start_jax
from lora_flow.storage.locks import locked
from lora_flow.storage.remote import below, local_path
from lora_flow.storage.swap import write_atomically

if TYPE_CHECKING:
    from lora_flow.advice.advise import Advice


@dataclasses.dataclass(frozen=True)
class Advise(Draws):
    """Say which start, which size of it and which rank a layer needs, from its gradient, and why.

    A small grid of starts is simulated as gradient flow, to a level of the loss. The answer is a recommended start with
    its reason, what that rests on and how far to trust it, and tables over the rank (how much of the gradient it holds,
    what loss it leaves), over the starts (times, floors, dead directions), over alpha (what a small start loses before
    it learns, and a large one on its slow tail), and between practice (lora_alpha, learning rate) and theory (s, t).

    One layer, from a file with weight and gradient, as for sweep --problem:

    lora-flow advise layer.npz --lr 0.1 --steps 2000

    The layers of a checkpoint together, with a rank for each, and the lora-flow peft init that makes the start:

    lora-flow advise --checkpoint llama/ --gradients grads.safetensors --targets 'q_proj|v_proj' --loss 2.1

    How to read it: time is the learning rate x steps of plain gradient descent. A size is that of Z = [B; A^T] over a
    solution's: the best is seldom far below 1. A level below what the rank leaves is never reached.
    """

    problem: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="LAYER", help_behavior_hint="")] = None
    """A file with one layer: weight, and gradient or shift; inputs or covariance where they are known."""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """Instead of a layer: a .safetensors file, or a folder with model.safetensors or its index."""
    gradients: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """With --checkpoint: a .safetensors file with dL/dW, or thin factors, as for peft init."""
    targets: Annotated[str | None, tyro.conf.arg(metavar="REGEX", help_behavior_hint="")] = None
    """With --checkpoint: its layers, as for peft init."""
    scaling: Annotated[float | None, tyro.conf.arg(metavar="NUMBER", help_behavior_hint="(default: 1)")] = None
    """With --checkpoint: LoRA's output multiplier s, lora_alpha over the rank. A layer's file has its own."""
    loss: Annotated[float | None, tyro.conf.arg(metavar="NUMBER", help_behavior_hint="")] = None
    """With --checkpoint: the network's loss there. A gradient is trusted while this falls by a tenth."""
    init: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """The starts, by their names in lora-flow inits. By default gaussian, spectral, lora-one and lora-ga; of one layer
    pissa too."""
    size: tuple[float, ...] = (0.003, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Sizes of the starts, ||Z||_2 over a solution's. The size that peft init chooses is looked at as well."""
    rank: Annotated[
        tuple[int, ...], tyro.conf.arg(help_behavior_hint="(default: 1 2 4 8 16, as far as there is room)")
    ] = ()
    """Ranks. Of a checkpoint their mean: layers with more to learn get more."""
    level: Annotated[
        float | None, tyro.conf.arg(metavar="NUMBER", help_behavior_hint="(default: 0.1 or what a rank reaches)")
    ] = None
    """The loss to come to, as a share of the linearised task's at the pretrained weights."""
    seeds: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 3; of a checkpoint 1)")] = (
        None
    )
    """Draws of random starts."""
    lr: Annotated[float | None, tyro.conf.arg(metavar="NUMBER", help_behavior_hint="")] = None
    """The learning rate: which starts are stable, and what --steps reach."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """The number of steps."""
    optimizer: str = "gd"
    """gd, sign or adam. Times are those of the flow, which is gd's in small steps; adam gets little confidence."""
    out: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """A new folder for report.md, report.html, the picture, and the numbers (results.zarr)."""
    overwrite: bool = False
    """Replace the folder if it holds a recommendation."""

    def run(self) -> int:
        from lora_flow.advice.folder import ADVICE, store

        self._check()
        if self.out is None:
            found = self._asked()
            print(f"{found}\n\n{found.table()}")
            return 0
        path = local_path("out", self.out)
        ADVICE.check_free(path, self.overwrite)
        with locked(path):  # or find out that the folder cannot be made before anything is computed
            ADVICE.check_free(path, self.overwrite)
            found = self._asked()
            with whole():
                store(path, self._told(), found)
                return tell(self.out)

    def _check(self) -> None:
        """Raises unless it is one layer, or a checkpoint with all that it takes."""
        require(self.overwrite is False or self.out is not None, "overwrite", "be left out without out", self.overwrite)
        of_checkpoint = {name: getattr(self, name) for name in ("gradients", "targets", "scaling", "loss")}
        if self.checkpoint is None:
            require(self.problem is not None, "the layer", "be given, or --checkpoint", "neither")
            for name, value in of_checkpoint.items():
                require(value is None, name, "be left out without checkpoint", value)
            return
        require(self.problem is None, "checkpoint", "be left out where a layer's file is given", self.checkpoint)
        for name in ("gradients", "targets"):
            require(of_checkpoint[name] is not None, name, "be given with checkpoint", "none")

    def _asked(self) -> Advice:
        start_jax()
        from lora_flow.advice.advise import advise, advise_checkpoint

        common = ("size", "level", "lr", "steps", "optimizer")
        told: dict[str, Any] = {name: getattr(self, name) for name in common}
        told |= {name: value for name in ("init", "rank") if (value := getattr(self, name))}
        told |= {} if self.seeds is None else {"seeds": self.seeds}
        if self.checkpoint is None or self.gradients is None or self.targets is None:
            return advise(str(self.problem), **told)
        scaling = 1.0 if self.scaling is None else self.scaling
        own: dict[str, Any] = {"targets": self.targets, "scaling": scaling, "loss": self.loss}
        return advise_checkpoint(self.checkpoint, self.gradients, **own, **told)

    def _told(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        left_out = ("out", "overwrite", "pictures")
        return {name: value for name, value in values.items() if name not in left_out and value not in (None, ())}


def tell(out: str) -> int:
    """Draws a folder's picture, writes its report and its page, and says what was found."""
    import matplotlib as mpl

    mpl.use("Agg")
    from lora_flow.advice.folder import load
    from lora_flow.figures.advice import advice_figure
    from lora_flow.figures.over_time import save_with_numbers
    from lora_flow.figures.written import picture_lines
    from lora_flow.pages.page import page

    folder = local_path("the run folder", out)
    found, settings = load(folder)
    pictures = save_with_numbers({"advice": advice_figure(found.dataset, found.recommended)}, folder / "figures")
    text = found.report([below(folder, picture) for picture in pictures])
    write_atomically(folder / "report.md", text)
    shown = page(text, folder, short=found.short, settings=settings, command=shlex.join(words_of(settings)))
    write_atomically(folder / "report.html", shown)
    print(f"{found}\n\n{found.table()}\n")
    print(*picture_lines(pictures), sep="\n")
    print(f"report: {folder / 'report.md'}\npage: {folder / 'report.html'}")
    return 0


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """The command that asks the same again."""
    words = ["lora-flow", "advise", *([settings["problem"]] if "problem" in settings else [])]
    for name, value in settings.items():
        if name != "problem":
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words

"""`lora-flow figure`: the named experiments."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import tyro

from lora_flow.checks import require, require_choice
from lora_flow.cli.groups import Draws
from lora_flow.cli.sweep import solve_runs
from lora_flow.runtime.interrupts import whole
from lora_flow.runtime.start import start_jax
from lora_flow.storage.remote import run_path

if TYPE_CHECKING:
    from lora_flow.experiments.base import Experiment, Function

MOST_DRAWS = 10_000  # of an experiment that runs as a whole


@dataclasses.dataclass(frozen=True)
class Figure(Draws):
    """Run and draw a named experiment, with a table of its values:

    - 1: loss, alignment and phases for three alphas, from random and spectral initialisations
    - 3: the same for three delta_w and both sides, with the shift along the top pair of the pretrained weights
    - 4: the same as 3, with the shift along the bottom pair
    - phase: final loss, alignment and T1 over alpha x rank and over alpha x delta_w
    - beyond: shifts turned away from the pretrained weights or of higher rank, and noise in the weights
    - inits: all the initialisations on one layer, with a task along the weight's top singular pairs and one across them
    - kappa: the rate of the plain and of the preconditioned flow against the condition number of the task
    - symmetric: one factor of a symmetric matrix: its loss and noise with fewer, as many and more columns than it needs
    - stable-lora: the loss over time with Stable-LoRA's shrinking of A, from four sizes of A(0)
    - attention: LoRA on a pre-trained attention head: overlap and test error beside theory, and the flow over time
    - pretraining: how the imbalance of pretraining becomes delta_w, and which adapter then wins
    - imbalance: how imbalance speeds up linear networks, and the bounds on their rate
    - width: how far wide linear networks end from the solution of least norm, and how well conditioned they begin
    - lora-one: alignment of A with the gradient and risk, for several alpha
    - preconditioner: risk with and without the preconditioner, LoRA-One's start and LoRA-GA's
    - adaptive-step: constant and adaptive steps of linear networks, with their proven bounds
    - growing-step: steps of linear networks that grow as the loss falls, and local rates
    - scaling: what lora_alpha and the learning rate do under Adam: the loss over the plane of both, for four ranks
    - continual: what plain, projected, exact and safely started LoRA forget of old tasks, and what they still learn
    - muon: singular values of B A over time under gradient flow, BaLoRA, Muon and LoRA-Muon
    - learned: a start that is learned, beside spectral, LoRA-One and GoRA at one norm, and a rule on unseen tasks
    - elasticities: which of alpha, scaling, rank and initialisation decides how long each phase lasts

    Figures 1, 3 and 4 are of Xu et al., "Understanding the Learning Dynamics of LoRA" (arXiv 2503.06982). Their tables
    have the published values beside the values of the runs. lora-one and preconditioner are Figures 2 and 4 of
    LoRA-One, arXiv 2502.01235. imbalance and width are of Min et al. 2021, arXiv 2105.06351. adaptive-step is of Xu et
    al. 2023, AISTATS, and growing-step of Xu et al. 2025, arXiv 2505.11664.

    The figures from pretraining on run as a whole, without --resume.

    For example: lora-flow figure 3 --out runs/figure3
    """

    name: Annotated[str, tyro.conf.Positional]
    """The figure, by its name above."""
    out: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """The run folder, or a folder of run folders for a figure of several runs."""
    seeds: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the figure's own)")] = None
    """Number of random initialisations or draws."""
    resume: bool = False
    """Continue an unfinished figure."""
    overwrite: bool = False
    """Replace the folder's runs if the folder has some."""

    def run(self) -> int:
        from lora_flow.experiments.table import EXPERIMENTS

        require(not (self.resume and self.overwrite), "resume and overwrite", "not be given together", "both")
        require_choice("figure", self.name, EXPERIMENTS)
        experiment = EXPERIMENTS[self.name]
        return self._sweeps(experiment) if experiment.function is None else self._whole(experiment, experiment.function)

    def _sweeps(self, experiment: Experiment) -> int:
        from lora_flow.storage.folder import is_started
        from lora_flow.sweeps.run import check_parts

        runs = experiment.runs(self.seeds)
        if list(runs) != [""]:
            check_parts(self.out, runs)
        started = any(is_started(run_path("out", self.out) / name) for name in runs)
        require(not self.resume or started, "the run folder", "exist", f"'{self.out}'")
        go_on = f"lora-flow figure {self.name} --out {self.out} --resume"
        return solve_runs(self.out, runs, self.resume, self.overwrite, {"figure": self.name}, go_on)

    def _whole(self, experiment: Experiment, function: Function) -> int:
        from lora_flow.cli.plot import draw
        from lora_flow.experiments.folder import STUDY, begin_study, store_study
        from lora_flow.runtime.progress import each
        from lora_flow.storage.locks import locked

        seeds = self.seeds if self.seeds is not None else experiment.seeds or 1
        require(1 <= seeds <= MOST_DRAWS, "seeds", f"lie between 1 and {MOST_DRAWS}", seeds)
        must = f"be left out with figure {self.name}, which runs as a whole"
        require(not self.resume, "resume", must, "--resume")
        STUDY.check_free(self.out, self.overwrite)
        with locked(self.out):
            STUDY.check_free(self.out, self.overwrite)  # nobody can have made it since
            begin_study(self.out, self.name, seeds)
            start_jax()
            dataset = experiment.label(function(seeds, lambda items: each(items, "parts")))
            with whole():
                store_study(self.out, self.name, seeds, dataset)
            return draw(self.out)

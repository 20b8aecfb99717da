"""`lora-flow figure`: the named experiments, sweeps and studies."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from lora_flow.checks import require, require_choice
from lora_flow.cli.sweep import solve_runs
from lora_flow.runtime.interrupts import whole
from lora_flow.runtime.start import start_jax

MOST_DRAWS = 10_000  # of an experiment that runs as a whole


@dataclasses.dataclass(frozen=True)
class Figure:
    """Run and draw a named experiment, with a table of its values.

    1: loss, alignment and phases for three alphas from random and spectral initialisations, as in Figure 1 of Xu et
    al., "Understanding the Learning Dynamics of LoRA" (arXiv 2503.06982).

    3 and 4: the same for three delta_w and both sides, with the shift along the top (3) or bottom (4) pair of the
    pretrained weights. The table has the published values beside those of the runs.

    phase: final loss, alignment and T1 over alpha x rank and over alpha x delta_w.

    beyond: shifts turned away from the pretrained weights or of higher rank, and noise in the weights.

    inits: all the initialisations on one layer, with a task along the weight's top singular pairs and one across them.

    kappa: the rate of the plain and of the preconditioned flow against the condition number of the task.

    lora-one and preconditioner: the toy experiments of LoRA-One (arXiv 2502.01235, Figures 2 and 4), by gradient
    descent. scaling: the best lora_alpha against the rank, for gradient descent and Adam.

    imbalance and width: gradient flow of linear networks trained from scratch, with bounds, and its implicit bias
    (Min et al. 2021, arXiv 2105.06351). adaptive-step and growing-step: gradient descent of the same networks, with
    the step sizes of Xu et al. 2023 (AISTATS) and Xu et al. 2025 (arXiv 2505.11664). pretraining: from pretraining
    such a network to fine-tuning it.

    The figures of the last two paragraphs run as a whole, without --resume.

    For example: lora-flow figure 3 --out runs/figure3
    """

    name: Annotated[str, tyro.conf.Positional]
    """The figure: 1, 3, 4, phase, beyond, inits, kappa, lora-one, preconditioner, scaling, imbalance, width,
    adaptive-step, growing-step or pretraining."""
    out: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """The run folder, or a folder of run folders for a figure of several runs."""
    seeds: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Number of random initialisations or draws; by default the paper's number."""
    resume: bool = False
    """Continue an unfinished figure."""
    overwrite: bool = False
    """Replace the folder's runs if the folder has some."""

    def run(self) -> int:
        from lora_flow.experiments.studies import STUDIES
        from lora_flow.experiments.table import EXPERIMENTS
        from lora_flow.sweeps.run import check_parts, is_started

        require(not (self.resume and self.overwrite), "resume and overwrite", "not be given together", "both")
        require_choice("figure", self.name, [*EXPERIMENTS, *STUDIES])
        if self.name in STUDIES:
            return self._study()
        runs = EXPERIMENTS[self.name].runs
        if self.seeds is not None:
            runs = {name: dataclasses.replace(settings, seeds=self.seeds) for name, settings in runs.items()}
        if list(runs) != [""]:
            check_parts(self.out, runs)
        started = any(is_started(Path(self.out) / name) for name in runs)
        require(not self.resume or started, "the run folder", "exist", f"'{self.out}'")
        go_on = f"lora-flow figure {self.name} --out {self.out} --resume"
        return solve_runs(self.out, runs, self.resume, self.overwrite, {"figure": self.name}, go_on)

    def _study(self) -> int:
        from lora_flow.cli.plot import draw_study
        from lora_flow.experiments.folder import begin_study, check_study_folder, store_study
        from lora_flow.experiments.studies import STUDIES
        from lora_flow.runtime.progress import each
        from lora_flow.storage.folder import locked

        study = STUDIES[self.name]
        seeds = study.seeds if self.seeds is None else self.seeds
        require(1 <= seeds <= MOST_DRAWS, "seeds", f"lie between 1 and {MOST_DRAWS}", seeds)
        must = f"be left out with figure {self.name}, which runs as a whole"
        require(not self.resume, "resume", must, "--resume")
        check_study_folder(self.out, self.overwrite)
        with locked(self.out):
            check_study_folder(self.out, self.overwrite)  # nobody can have made it since
            begin_study(self.out, self.name, seeds)
            start_jax()
            dataset = study.run(seeds, lambda items: each(items, "parts"))
            with whole():
                store_study(self.out, self.name, seeds, dataset)
            return draw_study(self.out, self.name)

"""The experiments by name."""

from __future__ import annotations

from lora_flow.experiments import (
    adaptive_step,
    attention,
    beyond,
    continual,
    growing_step,
    imbalance,
    inits,
    kappa,
    learned,
    lora_one,
    muon,
    paper,
    phase,
    phase_elasticities,
    pretraining,
    scaling,
    stable_lora,
    symmetric,
    width,
)
from lora_flow.experiments.base import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    **paper.EXPERIMENTS,
    "phase": phase.EXPERIMENT,
    "beyond": beyond.EXPERIMENT,
    "inits": inits.EXPERIMENT,
    "kappa": kappa.EXPERIMENT,
    "symmetric": symmetric.EXPERIMENT,
    "stable-lora": stable_lora.EXPERIMENT,
    "attention": attention.EXPERIMENT,
    "pretraining": pretraining.EXPERIMENT,
    "imbalance": imbalance.EXPERIMENT,
    "width": width.EXPERIMENT,
    **lora_one.EXPERIMENTS,
    "adaptive-step": adaptive_step.EXPERIMENT,
    "growing-step": growing_step.EXPERIMENT,
    "scaling": scaling.EXPERIMENT,
    "continual": continual.EXPERIMENT,
    "muon": muon.EXPERIMENT,
    "learned": learned.EXPERIMENT,
    "elasticities": phase_elasticities.EXPERIMENT,
}

"""LoRA on an attention head with the softmax: where fine-tuning ends, beside the order parameters of theory."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from lora_flow.claims.attention import ALPHA, LEAST, MIDDLE, NOISE, SEEDS, SIZE, TOKENS, Ends, least, pretrained
from lora_flow.claims.frame import DERIVED, Cases, claim
from lora_flow.problems.attention import AttentionLoRA
from lora_flow.recipes import attention as recipe
from lora_flow.theory import softmax_attention as theory

CASES = ((3.0, 0.05), (5.0, 0.05), (3.0, 0.5))  # alpha' and lambda'
HELD_OUT = 1000
RUNS = (
    f"softmax, D = {SIZE}, T = {TOKENS}, Delta = {NOISE:g}, frozen maps by the law of linear attention, alpha = "
    f"{ALPHA:g}, lambda = {MIDDLE:g}; {SEEDS} draws, {LEAST}, {HELD_OUT} sequences held out"
)


def drawn(seed: int, ratio: float, ridge: float) -> AttentionLoRA:
    keys = jax.random.split(jax.random.key(seed), 5)
    s0 = recipe.teacher_map(keys[0], SIZE, 1.0)
    s, w = recipe.drawn_map(keys[1], s0, pretrained(MIDDLE)), np.asarray(jax.random.normal(keys[2], (SIZE, 1)))
    how: dict[str, Any] = {"ridge": ridge, "noise": NOISE, "activation": "softmax"}
    held_out = recipe.labelled(recipe.sequences(keys[4], HELD_OUT, TOKENS, SIZE), s0, s, w, **how)
    shown = recipe.sequences(keys[3], round(ratio * SIZE), TOKENS, SIZE)
    return recipe.labelled(shown, s0, s, w, held_out=held_out, **how)


@functools.cache
def ends(ratio: float, ridge: float) -> Ends:
    return least(drawn(seed, ratio, ridge) for seed in range(SEEDS))


@functools.cache
def told(ratio: float, ridge: float) -> tuple[float, float]:
    """Theory's overlap and test error."""
    tuned = theory.fine_tune(pretrained(MIDDLE), ratio, ridge)
    return tuned.overlap, theory.generalisation_error(pretrained(MIDDLE), tuned)


@claim(DERIVED, RUNS, within=0.01)
def softmax_overlap(seeds: int) -> Cases:
    """softmax attention: fine-tuning ends at the overlap of its order parameters, m/(q q0)^(1/2)"""
    for ratio, ridge in CASES:
        yield f"alpha' = {ratio:g}, lambda' = {ridge:g}", told(ratio, ridge)[0], np.mean(ends(ratio, ridge).overlap)


@claim(DERIVED, RUNS, within=0.05, relative=True)
def softmax_test_error(seeds: int) -> Cases:
    """softmax attention: and at their test error"""
    for ratio, ridge in CASES:
        yield f"alpha' = {ratio:g}, lambda' = {ridge:g}", told(ratio, ridge)[1], np.mean(ends(ratio, ridge).test_error)

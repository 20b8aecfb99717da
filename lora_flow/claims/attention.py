"""LoRA on an attention head: theory for large D against flows at a few hundred, and what pre-training leaves."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import Adapter
from lora_flow.claims.frame import DERIVED, Cases, claim
from lora_flow.dynamics.lanes import finished, solve_lanes, stack
from lora_flow.initialization.of_networks import tied_init
from lora_flow.problems.attention import AttentionLoRA
from lora_flow.recipes import attention as recipe
from lora_flow.recipes.attention import attention_problem
from lora_flow.runtime.compiling import compiled
from lora_flow.theory import attention as theory

PAPER = "Duranthon et al. 2026"
SECOND_HAND = "second hand; derived here"
SIZE, TOKENS, ALPHA, RIDGE, NOISE = 200, 3, 0.1, 0.5, 0.5  # D, T, alpha, lambda' and Delta
MIDDLE = 0.1  # lambda
RATIOS = (1.0, 2.0, 3.0, 5.0)
SEEDS, FEW = 6, 3
LARGEST = (1000, 3)  # sequences and tokens of most problems with that D, which so share a program
RUNS = f"D = {SIZE}, T = {TOKENS}, lambda' = {RIDGE:g}, Delta = {NOISE:g}, alpha = {ALPHA:g}"
LEAST = "at the least loss of tied adapters, by L-BFGS from two starts"
LARGE = 800
MAPS = (  # alpha, lambda, T, kappa0
    *((0.1, 0.1, 3, 1.0), (0.2, 0.03, 2, 0.5), (0.1, 0.1, 4, 2.0)),
)
ELSEWHERE = ((2, 0.3), (5, 2.0))  # T, kappa0
RESCALED = (0.01, 1.0)  # lambda
KEPT, POOL_SIZE = (1.0, 0.04, 0.015), 100
SHORT, WIDTH, FITTED_ALPHA, FITTED_RATIO = 2, 0.5, 0.2, 3.0  # T, kappa0, alpha and alpha' where sequences are reused
COMPARED, FITTED_SIZE, RIDGES = (120, 0.03), 100, (0.01, 0.1, 0.4)  # D and lambda
MAPS_TRAINED, SUBSETS = 2, 4  # and sets of sequences for each
FLOWING = 150
FLOWS = f"D = {FLOWING}, T = {TOKENS}, alpha' = 3, lambda = {MIDDLE:g}, tied starts N(0, .01^2), {FEW} draws"
REUSED = f"T = {SHORT}, kappa0 = .5, alpha = .2, alpha' = 3, maps trained by descent"


class Ends(NamedTuple):
    """Where fine-tuning ends, one value for each problem."""

    overlap: np.ndarray
    test_error: np.ndarray


def least(problems: Iterable[AttentionLoRA]) -> Ends:
    """At the lower of the minima that L-BFGS comes to from two starts of size .3."""
    found = []
    for seed, problem in enumerate(problems):
        if problem.layers[0][0] == SIZE and problem.tokens.shape[1] <= LARGEST[1]:
            problem = problem.padded(*LARGEST)
        starts = 0.3 * np.random.default_rng(seed).normal(size=(2, problem.layers[0][0], 1))
        tried = [observed(problem, recipe.least_tied(problem, start)) for start in starts]
        found.append(list(map(float, min(tried)[1:])))
    return Ends(*np.array(found).T)


@compiled(quickly=True)
def observed(problem: AttentionLoRA, w: Array) -> tuple[Array, Array, Array]:
    """The loss, overlap and test error of tied adapters."""
    adapters = (Adapter(w.T, w),)
    seen = problem.observe(adapters)
    return problem.loss(adapters), seen["overlap"], seen["test_error"]


@functools.cache
def drawn(ratio: float, ridge: float, beta: float, seeds: int) -> tuple[AttentionLoRA, ...]:
    common: dict[str, Any] = {"m": SIZE, "sample_ratio": ratio, "pretraining_ridge": ridge, "beta": beta}
    return tuple(attention_problem(jax.random.key(seed), **common) for seed in range(seeds))


@functools.cache
def ends(ratio: float, ridge: float = MIDDLE, beta: float = 1.0, seeds: int = SEEDS) -> Ends:
    return least(drawn(ratio, ridge, beta, seeds))


@functools.cache
def pretrained(ridge: float, noise: float = NOISE) -> theory.Pretraining:
    return theory.pretrain(ALPHA, ridge, tokens=TOKENS, noise=noise)


@functools.cache
def told(ridge: float, ratio: float, beta: float = 1.0) -> tuple[float, float]:
    """Theory's overlap and test error."""
    missed = pretrained(ridge).effective_noise(beta)
    tuned = theory.fine_tune(missed, ratio, RIDGE, tokens=TOKENS)
    return tuned.overlap, theory.generalisation_error(missed, tuned, TOKENS)


@claim(DERIVED, f"maps S of D = {LARGE}, drawn by one eigendecomposition each", within=0.01, relative=True)
def attention_map(seeds: int) -> Cases:
    """pre-training's law S = eta max(S0 + delta Z - eps, 0) has the order parameters Q = tr S^2/D and M = tr S S0/D"""
    for i, (alpha, ridge, tokens, kappa0) in enumerate(MAPS):
        law = theory.pretrain(alpha, ridge, tokens=tokens, noise=NOISE, kappa0=kappa0)
        keys = jax.random.split(jax.random.key(i))
        s0 = recipe.teacher_map(keys[0], LARGE, kappa0)
        s = recipe.drawn_map(keys[1], s0, law)
        where = f"T = {tokens}, kappa0 = {kappa0:g}, lambda = {ridge:g}"
        yield f"Q, {where}", law.q, np.sum(s**2) / LARGE
        yield f"M, {where}", law.m, np.sum(s * s0) / LARGE


@claim(DERIVED, f"{RUNS}, lambda = {MIDDLE:g}, {SEEDS} draws, {LEAST}", within=0.01)
def attention_overlap(seeds: int) -> Cases:
    """fine-tuning ends at the overlap of the order parameters (q, m): w.w*/(|w| |w*|) = m/(q q0)^(1/2)"""
    for ratio in RATIOS:
        yield f"alpha' = {ratio:g}", told(MIDDLE, ratio)[0], np.mean(ends(ratio).overlap)


@claim(DERIVED, f"{RUNS}, lambda = {MIDDLE:g}, {SEEDS} draws, {LEAST}", within=0.05, relative=True)
def attention_test_error(seeds: int) -> Cases:
    """and at the test error (T + 1)/T (De + q0^2 - 2 m^2 + q^2)"""
    for ratio in RATIOS:
        yield f"alpha' = {ratio:g}", told(MIDDLE, ratio)[1], np.mean(ends(ratio).test_error)


@claim(DERIVED, f"D = {SIZE}, alpha' = 3, lambda = {MIDDLE:g}, alpha = .1, {FEW} draws, {LEAST}", within=0.01)
def attention_elsewhere(seeds: int) -> Cases:
    """the overlap for other numbers of tokens and ranks of the teacher's map"""
    for tokens, kappa0 in ELSEWHERE:
        missed = theory.pretrain(ALPHA, MIDDLE, tokens=tokens, noise=NOISE, kappa0=kappa0).effective_noise()
        common: dict[str, Any] = {"m": SIZE, "tokens": tokens, "teacher_width": kappa0}
        found = least(attention_problem(jax.random.key(seed), **common) for seed in range(FEW))
        tuned = theory.fine_tune(missed, 3.0, RIDGE, tokens=tokens)
        yield f"T = {tokens}, kappa0 = {kappa0:g}", tuned.overlap, np.mean(found.overlap)


@claim(f"{PAPER}, Eq. 25, {SECOND_HAND}", f"{RUNS}, lambda = {MIDDLE:g}, {SEEDS} draws, {LEAST}", within=0.005)
def attention_noise(seeds: int) -> Cases:
    """
    pre-training enters as noise alone: the overlap less that with noise of the variance De = Delta/2 + Q0 - 2 M + Q in
    place of what the frozen map misses
    """
    problems = []
    for seed, problem in enumerate(drawn(2.0, MIDDLE, 1.0, SEEDS)):
        rng, x = np.random.default_rng(seed), np.asarray(problem.tokens)
        chi, noise = x @ np.asarray(problem.direction), rng.normal(size=problem.labels.shape)
        missed = np.sqrt(problem.characteristics()["effective_noise"] / 2) * (noise + noise.mT)
        known = missed + (chi @ chi.mT - np.sum(np.asarray(problem.direction) ** 2) * np.eye(TOKENS)) / SIZE
        labels = (np.asarray(problem.frozen) + known) / TOKENS
        problems.append(eqx.tree_at(lambda one: one.labels, problem, labels))
    yield "alpha' = 2", 0, np.mean(ends(2.0).overlap - least(problems).overlap)


@claim(f"{PAPER}, Eq. 26, {SECOND_HAND}", f"{RUNS}, alpha' = 3, {FEW} draws, {LEAST}", "<=")
def attention_rescaling(seeds: int) -> Cases:
    """the frozen map times beta = M/Q leaves less noise than as it is, and a smaller test error: ratios to beta = 1"""
    for ridge in RESCALED:
        beta = pretrained(ridge).best_beta()
        noises = [[one.characteristics()["effective_noise"] for one in drawn(3.0, ridge, b, FEW)] for b in (beta, 1.0)]
        yield f"De, lambda = {ridge:g}, beta = {beta:.3g}", 1, np.max(np.array(noises[0]) / noises[1])
        errors = [ends(3.0, ridge, b, FEW).test_error for b in (beta, 1.0)]
        yield f"test error, lambda = {ridge:g}, beta = {beta:.3g}", 1, np.max(errors[0] / errors[1])


@claim(f"{PAPER}, Eq. 26, {SECOND_HAND}", f"{RUNS}, alpha' = 3, {FEW} draws, {LEAST}", within=0.05, relative=True)
def attention_rescaled(seeds: int) -> Cases:
    """the noise that is left is De(beta) = Delta/2 + Q0 + beta^2 Q - 2 beta M: the test error at beta = M/Q and 1"""
    for ridge in RESCALED:
        for beta in (pretrained(ridge).best_beta(), 1.0):
            where = f"lambda = {ridge:g}, beta = {beta:.3g}"
            yield where, told(ridge, 3.0, beta)[1], np.mean(ends(3.0, ridge, beta, FEW).test_error)


@claim(
    f"{PAPER}, Eq. 28, {SECOND_HAND}",
    f"D = {POOL_SIZE}, T = {TOKENS}, Delta = 0, 3 D sequences of a pool, {FEW} draws",
    within=0.05,
    relative=True,
)
def attention_selected(seeds: int) -> Cases:
    """sequences with the smallest frozen pre-activations have less noise: towards Delta/2 + Q0 - M^2/Q"""
    law = pretrained(MIDDLE, noise=0.0)
    for kept in KEPT:
        left = []
        for seed in range(FEW):
            keys = jax.random.split(jax.random.key(seed), 3)
            s0 = recipe.teacher_map(keys[0], POOL_SIZE, 1.0)
            s = recipe.drawn_map(keys[1], s0, law)
            chosen = recipe.selected(keys[2], 3 * POOL_SIZE, TOKENS, s, kept)
            missed = recipe.preactivations(chosen.tokens, s0 - s)
            left.append(np.sum(missed**2) / (len(missed) * TOKENS * (TOKENS + 1)))
        yield f"kept {kept:g}", law.selected_noise(kept), np.mean(left)


# sequences that pre-training has seen


@functools.cache
def fitted(size: int, ridge: float) -> dict[bool, Ends]:
    """On sequences of pre-training, and on new ones: several sets of both for each map."""
    problems: dict[bool, list[AttentionLoRA]] = {True: [], False: []}
    count = round(FITTED_RATIO * size)
    for seed in range(MAPS_TRAINED):
        keys = jax.random.split(jax.random.key(seed), 5)
        s0 = recipe.teacher_map(keys[0], size, WIDTH)
        shown = recipe.sequences(keys[1], round(FITTED_ALPHA * size**2), SHORT, size)
        s = recipe.trained_map(keys[2], s0, shown, ridge, NOISE, "linear")
        w = np.asarray(jax.random.normal(keys[3], (size, 1)))
        fresh = recipe.sequences(keys[4], SUBSETS * count, SHORT, size)
        for again, whole in ((True, shown), (False, fresh)):
            for i in range(SUBSETS):
                part = recipe.Drawn(*(one[i * count : (i + 1) * count] for one in whole))
                one = recipe.labelled(part, s0, s, w, ridge=RIDGE, noise=NOISE, activation="linear")
                problems[again].append(one)
    return {again: least(listed) for again, listed in problems.items()}


@functools.cache
def told_of_fitted(again: bool, ridge: float) -> tuple[float, float]:
    """Theory's overlap and test error."""
    law = theory.pretrain(FITTED_ALPHA, ridge, tokens=SHORT, noise=NOISE, kappa0=WIDTH)
    noise = law.reused_noise() if again else law.effective_noise()
    tuned = theory.fine_tune(noise, FITTED_RATIO, RIDGE, tokens=SHORT)
    return tuned.overlap, theory.generalisation_error(law.effective_noise(), tuned, SHORT)


@claim(f"{PAPER}, Eq. 27, {SECOND_HAND}", f"D = {COMPARED[0]}, {REUSED}, lambda = {COMPARED[1]:g}", within=0.003)
def attention_reused(seeds: int) -> Cases:
    """sequences of pre-training, with the noise De/(1 + 4 V/T^2)^2, have a higher overlap than new ones: by how much"""
    again, new = (told_of_fitted(which, COMPARED[1])[0] for which in (True, False))
    found = fitted(*COMPARED)
    yield f"lambda = {COMPARED[1]:g}", again - new, np.mean(found[True].overlap) - np.mean(found[False].overlap)


@claim(f"{PAPER}, abstract; derived here", f"D = {FITTED_SIZE}, {REUSED}, lambda = .01, .1 and .4")
def attention_mismatch(seeds: int) -> Cases:
    """the lambda of the best overlap is not that of the least test error on reused sequences, and is on new ones"""
    for again in (True, False):
        theirs = [told_of_fitted(again, ridge) for ridge in RIDGES]
        ours = [[float(np.mean(values)) for values in fitted(FITTED_SIZE, ridge)[again]] for ridge in RIDGES]
        best, seen = (
            (np.argmax([o for o, _ in all_of]), np.argmin([e for _, e in all_of])) for all_of in (theirs, ours)
        )
        where = "reused" if again else "new"
        also = (seen[0] != seen[1]) == again
        yield f"overlap, {where}", RIDGES[best[0]], RIDGES[seen[0]], True, also
        yield f"test error, {where}", RIDGES[best[1]], RIDGES[seen[1]], True, also


def best_of(values: np.ndarray) -> tuple[int, int]:
    """The places of the largest overlap and of the least test error, the two columns."""
    return int(np.argmax(values[:, 0])), int(np.argmin(values[:, 1]))


# the flow


class Flow(NamedTuple):
    """From small tied starts, `(draw, time)`, and the overlap at the least loss."""

    loss: np.ndarray
    overlap: np.ndarray
    least: np.ndarray


@functools.cache
def flow() -> Flow:
    problems = [attention_problem(jax.random.key(seed), m=FLOWING) for seed in range(FEW)]
    starts = [tied_init(jax.random.key(seed), problem, rank=1, alpha=0.01) for seed, problem in enumerate(problems)]
    times, names = np.append(np.linspace(0.0, 2.0, 201), 4.0), ("loss", "overlap")
    run = finished(solve_lanes(stack(problems), stack(starts), times, each=True, keep=names, solver="Tsit5"))
    loss, overlap = (np.asarray(run.observables[name]) for name in names)
    return Flow(loss, overlap, least(problems).overlap)


@claim(DERIVED, FLOWS, within=1e-3)
def attention_flow(seeds: int) -> Cases:
    """the flow from a small start ends at the least loss: at the overlap there"""
    for seed, (overlap, there) in enumerate(zip(flow().overlap, flow().least, strict=True)):
        yield f"draw {seed}", there, overlap[-1]


@claim(DERIVED, FLOWS, "<=")
def attention_phases(seeds: int) -> Cases:
    """alignment comes first: how much of its whole fall the loss has behind it when the overlap comes to .6"""
    for seed, (loss, overlap) in enumerate(zip(flow().loss, flow().overlap, strict=True)):
        reached = int(np.argmax(overlap > 0.6))
        fallen = (loss[0] - loss[reached]) / (loss[0] - loss[-1])
        yield f"draw {seed}", 0.01, fallen, True, overlap[0] < 0.2 and overlap[-1] > 0.95

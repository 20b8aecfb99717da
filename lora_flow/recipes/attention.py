"""Draws of LoRA on an attention head: a teacher, a map that is pre-trained on it, and sequences to fine-tune on."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import optimize

from lora_flow.arrays import require_key
from lora_flow.checks import require, require_choice, require_flag, require_integer, require_number
from lora_flow.problems.attention import ACTIVATIONS, AttentionLoRA
from lora_flow.runtime.compiling import compiled
from lora_flow.theory import attention as linear_theory
from lora_flow.theory import softmax_attention as softmax_theory

PRETRAINED_BY = ("law", "descent")
HELD_OUT = 1000  # sequences for the test error of softmax attention
CHUNK = 4096  # sequences of a pool that are drawn at a time
STEPS, FLAT = 2000, 1e-7  # of L-BFGS, and the relative change of the loss at which it ends


class Drawn(NamedTuple):
    """Sequences: their tokens `(N, T, D)`, and the noise in the teacher's pre-activations, `(N, T, T)`, of variance 1/2
    off the diagonal and 1 on it."""

    tokens: np.ndarray
    noise: np.ndarray


def attention_problem(
    key: Array,
    *,
    m: int = 100,
    tokens: int = 3,
    sample_ratio: float = 3.0,
    ridge: float = 0.5,
    label_noise: float = 0.5,
    task_rank: int = 1,
    pretraining_ratio: float = 0.1,
    pretraining_ridge: float = 0.1,
    teacher_width: float = 1.0,
    pretrained_by: str = "law",
    beta: float = 1.0,
    kept: float = 1.0,
    reused: bool = False,
    activation: str = "linear",
) -> AttentionLoRA:
    r"""Fine-tuning of a pre-trained attention head, of Duranthon, Boncoraglio and Zdeborová (arXiv 2606.05899).

    The teacher has a map `S0 = W* W*^T/sqrt(P0 D)` and w*, with entries N(0, 1). Pre-training has learned a map S from
    sequences that are labelled without w*, and fine-tuning learns w* from others. `lora_flow.theory.attention` has the
    errors and the overlap as D grows.

    **Arguments:**

    - `m`: D, the dimension of a token. `tokens`: T, the number of tokens in a sequence.
    - `sample_ratio`: alpha', the number of sequences over D. `ridge`: lambda'.
    - `label_noise`: Delta, for pre-training and fine-tuning. `task_rank`: the columns of w*.
    - `pretraining_ratio`: alpha, the number of sequences of pre-training over D^2. `pretraining_ridge`: lambda, where W
      has D columns; with more, say P, it stands for lambda sqrt(P/D). `teacher_width`: kappa0 = P0/D.
    - `pretrained_by`: "law", a draw of S from the law that pre-training obeys as D grows, by one eigendecomposition, or
      "descent", by L-BFGS on the loss of pre-training from a random W.
    - `beta`: the frozen map is beta S.
    - `kept`: the share of sequences that are kept of a pool: those whose frozen pre-activations are smallest.
    - `reused`: whether the sequences, and their noise, are some of those of pre-training; by descent only.
    - `activation`: "linear" or "softmax".

    **Returns:** an `AttentionLoRA` with the teacher known; the test error of softmax attention is that on 1000 further
    sequences.

    **Raises:** `InputError` where an argument is out of its range, and for more reused sequences than there are.
    """
    require_key(key)
    for name, size in (("m", m), ("tokens", tokens), ("task_rank", task_rank)):
        require_integer(name, size, "be at least 1", 1)
    positive = {"sample_ratio": sample_ratio, "pretraining_ratio": pretraining_ratio, "teacher_width": teacher_width}
    for name, number in (positive | {"pretraining_ridge": pretraining_ridge}).items():
        require_number(name, number, "be positive and finite", lambda known: known > 0)
    for name, number in {"ridge": ridge, "label_noise": label_noise, "beta": beta}.items():
        require_number(name, number, "be at least 0 and finite", lambda known: known >= 0)
    require_number("kept", kept, "be above 0 and at most 1", lambda known: 0 < known <= 1)
    require_choice("pretrained_by", pretrained_by, PRETRAINED_BY)
    require_choice("activation", activation, ACTIVATIONS)
    require_flag("reused", reused)
    count, seen = max(round(sample_ratio * m), 1), max(round(pretraining_ratio * m**2), 1)
    if reused:
        require(pretrained_by == "descent", "reused", "come with pretrained_by 'descent'", f"'{pretrained_by}'")
        require(kept == 1, "reused", "be left out where kept is below 1", "both")
        most = f"be at most {seen / m:g}, the sequences of pre-training over m, to reuse them"
        require(count <= seen, "sample_ratio", most, sample_ratio)

    keys = jax.random.split(key, 6)
    s0 = teacher_map(keys[0], m, teacher_width)
    direction = np.asarray(jax.random.normal(keys[1], (m, task_rank)))
    shown = None
    if pretrained_by == "law":
        known = float(pretraining_ratio), float(pretraining_ridge), tokens, float(label_noise), float(teacher_width)
        s = drawn_map(keys[2], s0, law_of(activation, *known))
    else:
        shown = sequences(keys[3], seen, tokens, m)
        s = trained_map(keys[2], s0, shown, pretraining_ridge, label_noise, activation)
    s = beta * s
    if reused and shown is not None:
        own = Drawn(shown.tokens[:count], shown.noise[:count])
    else:
        own = selected(keys[4], count, tokens, s, kept)

    def problem(drawn: Drawn, held_out: AttentionLoRA | None) -> AttentionLoRA:
        return labelled(
            drawn, s0, s, direction, ridge=ridge, noise=label_noise, activation=activation, held_out=held_out
        )

    held_out = problem(sequences(keys[5], HELD_OUT, tokens, m), None) if activation == "softmax" else None
    return problem(own, held_out)


@functools.lru_cache(maxsize=64)
def law_of(
    activation: str, alpha: float, ridge: float, tokens: int, noise: float, kappa0: float
) -> linear_theory.Pretraining:
    """The order parameters of pre-training, which problems of several seeds share."""
    theory = linear_theory if activation == "linear" else softmax_theory
    return theory.pretrain(alpha, ridge, tokens=tokens, noise=noise, kappa0=kappa0)


def teacher_map(key: Array, m: int, width: float) -> Float[np.ndarray, "D D"]:
    """S0 = W* W*^T/sqrt(P0 D), with P0 = width D columns of entries N(0, 1)."""
    columns = max(round(width * m), 1)
    factor = np.asarray(jax.random.normal(key, (m, columns)))
    return factor @ factor.T / np.sqrt(columns * m)


def drawn_map(key: Array, s0: np.ndarray, law: linear_theory.Pretraining) -> Float[np.ndarray, "D D"]:
    """S = eta max(S0 + delta Z - eps, 0), eigenvalue by eigenvalue: the law of pre-trained maps as D grows."""
    noise = np.asarray(jax.random.normal(key, s0.shape))
    values, vectors = np.linalg.eigh(s0 + law.delta * (noise + noise.T) / np.sqrt(2 * len(s0)))
    return law.eta * (vectors * np.maximum(values - law.eps, 0.0)) @ vectors.T


def trained_map(
    key: Array, s0: np.ndarray, shown: Drawn, ridge: float, noise: float, activation: str
) -> Float[np.ndarray, "D D"]:
    """S = W W^T/D at the least loss of pre-training on the sequences, by L-BFGS from a random W `(D, D)`.

    This is the loss of an `AttentionLoRA` with tied adapters, B = A^T = W D^(-1/4), and the ridge D^(1/2) lambda.
    """
    size, nothing = len(s0), np.zeros((len(s0), 1))
    goal = labelled(shown, s0, 0 * s0, nothing, ridge=np.sqrt(size) * ridge, noise=noise, activation=activation)
    w = least_tied(goal, np.asarray(jax.random.normal(key, s0.shape)) / size**0.25)
    return w @ w.T / np.sqrt(size)


def least_tied(problem: AttentionLoRA, start: Float[np.ndarray, "D r"]) -> Float[np.ndarray, "D r"]:
    """w at a minimum of the loss of tied adapters, B = A^T = w, by L-BFGS from a start."""

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        loss, slope = loss_of_tied(problem, flat.reshape(start.shape))
        return float(loss), np.asarray(slope, float).ravel()

    limits = {"maxiter": STEPS, "maxfun": 2 * STEPS, "ftol": FLAT, "gtol": 0.0}
    flat = np.asarray(start, float).ravel()
    return optimize.minimize(value, flat, jac=True, method="L-BFGS-B", options=limits).x.reshape(start.shape)


@compiled()
def loss_of_tied(problem: AttentionLoRA, w: Array) -> tuple[Array, Array]:
    """The loss of adapters B = A^T = w, and its gradient: in half the time that it takes for any adapters."""
    count, length, size = problem.tokens.shape

    def loss(w: Array) -> Array:
        chi = (problem.tokens.reshape(-1, size) @ w).reshape(count, length, -1)
        return problem.misfit_of(chi, chi, jnp.sum(w**2)) + problem.ridge * jnp.sum(w**2)

    return jax.value_and_grad(loss)(w)


def sequences(key: Array, count: int, tokens: int, m: int) -> Drawn:
    """White tokens, and noise."""
    first, second = jax.random.split(key)
    drawn = np.asarray(jax.random.normal(second, (count, tokens, tokens)))
    return Drawn(np.asarray(jax.random.normal(first, (count, tokens, m))), (drawn + drawn.mT) / 2)


def selected(key: Array, count: int, tokens: int, s: np.ndarray, kept: float) -> Drawn:
    """Of a pool of count/kept sequences the `count` ones whose pre-activations by the map s are smallest, in norm."""
    pool = max(round(count / kept), count)
    if pool == count:
        return sequences(key, count, tokens, len(s))
    best, sizes = None, np.empty(0)
    for index, start in enumerate(range(0, pool, CHUNK)):
        drawn = sequences(jax.random.fold_in(key, index), min(CHUNK, pool - start), tokens, len(s))
        best = drawn if best is None else Drawn(*map(np.concatenate, zip(best, drawn, strict=True)))
        sizes = np.concatenate([sizes, np.sum(preactivations(drawn.tokens, s) ** 2, axis=(1, 2))])
        order = np.argsort(sizes)[:count]
        best, sizes = Drawn(best.tokens[order], best.noise[order]), sizes[order]
    assert best is not None
    return best


def preactivations(tokens: np.ndarray, s: np.ndarray) -> Float[np.ndarray, "N T T"]:
    """(X S X^T - tr S I)/sqrt(D)."""
    _, length, size = tokens.shape
    mapped = (tokens.reshape(-1, size) @ s).reshape(tokens.shape)
    return (mapped @ tokens.mT - np.trace(s) * np.eye(length)) / np.sqrt(size)


def labelled(
    drawn: Drawn,
    s0: np.ndarray,
    s: np.ndarray,
    direction: np.ndarray,
    *,
    ridge: float,
    noise: float,
    activation: str,
    held_out: AttentionLoRA | None = None,
) -> AttentionLoRA:
    """The sequences with the teacher's labels, and the pre-activations of the frozen map s."""
    size, length = len(s0), drawn.tokens.shape[1]
    chi = drawn.tokens @ direction
    centring = np.sum(direction**2) / size * np.eye(length)
    known = preactivations(drawn.tokens, s0) + chi @ chi.mT / size - centring + np.sqrt(noise) * drawn.noise
    given = known / length if activation == "linear" else np.asarray(jax.nn.softmax(jnp.asarray(known)))
    return AttentionLoRA(
        drawn.tokens,
        given,
        preactivations(drawn.tokens, s),
        ridge=ridge,
        activation=activation,
        direction=direction,
        missing=s0 - s,
        noise=noise,
        held_out=held_out,
    )

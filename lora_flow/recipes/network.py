"""Draws of linear networks to train from scratch, and of LoRA problems whose weights come from such a training."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array

from lora_flow.arrays import require_key
from lora_flow.checks import kind, require, require_integer, require_number
from lora_flow.dynamics.integrator import RTOL
from lora_flow.dynamics.solve import STATUS, solve
from lora_flow.initialization import check_alpha, find_scheme, initialize
from lora_flow.problems.factorization import Factorization
from lora_flow.problems.network import LinearNetwork
from lora_flow.recipes.aligned import PAPER_SPECTRUM, Component, aligned_problem

LEFT_OVER = 1e-18  # of the pretraining's first loss: the weights' product is then the target to nine digits
MOST_STEPS = 1_000_000


def network_problem(
    key: Array,
    *,
    m: int = 10,
    n: int = 10,
    samples: int = 0,
    input_rank: int = 0,
    input_kappa: float = 1.0,
    target_noise: float = 0.0,
) -> LinearNetwork:
    r"""A linear network with n inputs and m outputs that must learn `Y = X Theta + noise`.

    Theta has entries N(0, 1/n). With `samples` N the rows of X are drawn from N(0, C/N), so X^T X goes to C as N grows.
    With 0, for infinitely many samples, X is C^{1/2}, and no inputs are given where C = I. C has `input_rank`
    eigenvalues, equally spaced in their logarithm from 1 to 1/input_kappa, along random directions.

    **Arguments:**

    - `m`, `n`: outputs and inputs.
    - `samples`: N; 0 stands for infinitely many.
    - `input_rank`, `input_kappa`: the rank of C, 0 for n, and its condition number.
    - `target_noise`: norm of the noise in Y, relative to that of X Theta. The part of the noise outside X's columns
      cannot be learned, and makes `least_loss`.

    **Returns:** a `LinearNetwork` with targets `(N, m)` and inputs `(N, n)`; for `samples=0`, N is the rank of C.

    **Raises:** `InputError` where an argument is out of its range.
    """
    require_key(key)
    for name, size in (("m", m), ("n", n)):
        require_integer(name, size, "be at least 1", 1)
    require_integer("samples", samples, "be at least 0, for infinitely many", 0)
    require_integer("input_rank", input_rank, f"lie between 0, for all, and {n}, the number of inputs", 0, n)
    require_number("input_kappa", input_kappa, "be at least 1", lambda known: known >= 1)
    require_number("target_noise", target_noise, "be at least 0", lambda known: known >= 0)
    rank = input_rank or n

    keys = jax.random.split(key, 4)
    theta = np.asarray(jax.random.normal(keys[0], (n, m))) / np.sqrt(n)
    white = samples == 0 and rank == n and input_kappa == 1
    if white:
        x = np.eye(n)
    else:
        frame, _ = np.linalg.qr(np.asarray(jax.random.normal(keys[1], (n, n))))
        root = np.geomspace(1.0, input_kappa**-0.5, rank)[:, None] * frame[:, :rank].T
        drawn = (
            np.eye(rank) if samples == 0 else np.asarray(jax.random.normal(keys[2], (samples, rank))) / np.sqrt(samples)
        )
        x = drawn @ root
    clean = x @ theta
    noise = np.asarray(jax.random.normal(keys[3], clean.shape))
    y = clean + target_noise * np.linalg.norm(clean) / np.linalg.norm(noise) * noise
    return LinearNetwork(y) if white else LinearNetwork(y, x)


def pretrained_problem(
    key: Array,
    *,
    m: int = 10,
    n: int = 10,
    h: int = 100,
    init: str = "gaussian-both",
    alpha: float = 0.1,
    shift_scale: float | Sequence[float] = 5.0,
    component: Component | Sequence[Component] = "top",
    spectrum: tuple[float, float] | None = PAPER_SPECTRUM,
    pretraining_t1: float = 1000.0,
) -> Factorization:
    r"""LoRA on a network that has been trained from scratch: `aligned_problem` with its weights from a pretraining.

    Ypre and the shift are those of `aligned_problem` at the same key, whatever `delta_w` is there. Gradient flow on
    `1/2 ||Ypre - W2 W1||_F^2` makes the weights from a start, whose imbalance decides delta_w
    (`lora_flow.theory.linear_flow.trained_gains`). From a start along the singular vectors, "spectral-both:RATIO", the
    weights are aligned with the shift (Assumptions 2.1 and 2.2 of arXiv 2503.06982); from a wide or a small random
    start they are nearly aligned.

    **Arguments:**

    - `m`, `n`, `h`, `shift_scale`, `component`, `spectrum`: as for `aligned_problem`.
    - `init`, `alpha`: the pretraining's start, an initialisation of `LinearNetwork` by name, and its scale. In
      "gaussian-both:4", entries of W1 are 4 times the size of those of W2.
    - `pretraining_t1`: the end of pretraining; by then the loss must have fallen to 1e-18 of its start (in single
      precision, to 1e-11).

    **Returns:** a `Factorization` with W1 `(h, n)`, W2 `(m, h)` and a shift `(m, n)`.

    **Raises:** `InputError` where an argument is out of its range, and where the pretraining does not converge in time.
    """
    require(isinstance(init, str), "init", "be the name of an initialisation", kind(init))
    find_scheme(init)
    check_alpha(alpha)
    require_number("pretraining_t1", pretraining_t1, "be positive and finite", lambda end: end > 0)
    aligned = aligned_problem(key, m=m, n=n, h=h, shift_scale=shift_scale, component=component, spectrum=spectrum)
    network = LinearNetwork((aligned.w2 @ aligned.w1).T)
    start = initialize(init, jax.random.fold_in(key, 3), network, rank=h, alpha=alpha, side="A")
    double = network.solution.dtype == np.float64
    left_over, rtol = LEFT_OVER if double else 1e-11, 1e-6 if double else RTOL
    trained = solve(network, start, t1=pretraining_t1, saves=2, rtol=rtol, max_steps=MOST_STEPS)
    first, last = map(float, trained.observables["loss"])
    must = f"come to a loss of {left_over:g} of its first within pretraining_t1 = {pretraining_t1:g}"
    got = f"{last / first:.2g} ({STATUS[int(trained.status)]}): take a larger scale, or longer"
    require(int(trained.status) == 0 and last <= left_over * first, f"pretraining from {init}", must, got)
    return network.for_lora(trained.adapters, shift=aligned.shift)

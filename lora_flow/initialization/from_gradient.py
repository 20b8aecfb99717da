"""Initialisations from the gradient at the pretrained weights, `-dL/dW_i = U S V^T`, the linearised task."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters
from lora_flow.algebra.diagonal import Matrix, dense
from lora_flow.algebra.spectra import positive, root
from lora_flow.initialization.checks import check, check_reaches_task, check_twice, is_concrete
from lora_flow.initialization.directions import triplets
from lora_flow.problems.base import Problem, as_problem, linearised_task


def spectral_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    r"""A_i along the right singular vectors of layer i's linearised task, B_i = 0 (arXiv 2503.06982, section 4).

    Row j of A_i is `alpha z_ij` times the j-th right singular vector of layer i's linearised task, with z_ij iid
    standard normal: S_A and G12, G22 of the paper, with the arbitrary orthogonal G11 = G21 = I. On an aligned problem
    this is the paper's scheme, elsewhere its closest counterpart. The coordinate axes choose the vectors that the task
    leaves open, beyond its rank or for equal singular values.

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` unless the rank is at least that of every layer's task (of the shift, where the problem has
    one), or for a bad rank or alpha.
    """
    check(key, problem, rank, alpha)
    if is_concrete(problem):
        with jax.ensure_compile_time_eval():  # for the rest may be traced
            check_reaches_task(rank, [problem], "spectral_init")

    def draw(layer_key: Array, task: Matrix) -> Adapter:
        scale = alpha * jax.random.normal(layer_key, (rank, 1))
        return Adapter(scale * triplets(task, rank)[2], jnp.zeros((task.shape[0], rank)))

    keys = jax.random.split(key, len(problem.layers))
    return tuple(map(draw, keys, linearised_task(problem)))


def lora_one_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    r"""Balanced factors of one step of full gradient descent (LoRA-One, arXiv 2502.01235v3, Algorithm 1).

    `B_i = alpha U_r (S_r/S_1)^{1/2}` and `A_i = alpha (S_r/S_1)^{1/2} V_r^T`, so that `B_i A_i` is alpha^2 (the paper's
    gamma) times the best approximation of rank r, relative to its largest singular value. The frozen weights are not
    shifted: the function changes at t = 0. Nothing is drawn; `key` is an argument because every scheme has one.
    Directions beyond the gradient's rank are zero in both factors and stay zero.

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for a bad rank or alpha.
    """
    return _balanced(key, problem, rank, alpha, relative=True)


def lora_one_theory_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    r"""LoRA-One in the form of its theorems (arXiv 2502.01235v3, section 3.2).

    `B_i = alpha U_r S_r^{1/2}` and `A_i = alpha S_r^{1/2} V_r^T`, so that `B_i A_i` is alpha^2 = gamma times the best
    approximation of rank r of the gradient itself. With one layer, white inputs and a scaling of 1, alpha = 1 solves
    the task at t = 0. With two layers the start adds both layers' corrections and a cross term;
    `alpha^2 = 1/(sigma_W1^2 + sigma_W2^2)` is then about right.

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for a bad rank or alpha.
    """
    return _balanced(key, problem, rank, alpha, relative=False)


def lora_ga_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    r"""Both factors along the gradient, in different directions (LoRA-GA, arXiv 2407.05000):

        A = alpha out^{1/4} V_{1:r}^T,   B = alpha out^{1/4} U_{r+1:2r},

    with alpha = gamma^{-1/2} in the source's notation. Meant for `Offset(problem, adapters)`: `B A` is not zero and is
    subtracted from the frozen weights. A gradient of rank below 2 r leaves `U_{r+1:2r}` open. The source takes whatever
    rounding gives; here the coordinate axes choose an orthonormal basis of the remaining space, the same on every
    machine and in every program (`lora_flow.initialization.directions`).

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for a rank above half the smallest layer dimension, or a bad alpha.
    """
    return tuple(
        Adapter(alpha * len(u) ** 0.25 * vt, alpha * len(u) ** 0.25 * u)
        for u, _, vt in _twice(key, problem, rank, alpha, "lora-ga")
    )


def lora_ga_peft_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    r"""LoRA-GA in PEFT's form (direction "ArB2r", scale "stable"), which weights B by the singular values:

        A = alpha V_{1:r}^T,   B = alpha out^{1/4} U_{r+1:2r} S_{r+1:2r}.

    PEFT has alpha = 1 with `stable_gamma=1`. Meant for `Offset(problem, adapters)`. Where the gradient's rank is r or
    less, B is zero. Directions that the gradient leaves open are chosen as for `lora_ga_init`.

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for a rank above half the smallest layer dimension, or a bad alpha.
    """
    return tuple(
        Adapter(alpha * vt, alpha * len(u) ** 0.25 * u * s[None])
        for u, s, vt in _twice(key, problem, rank, alpha, "lora-ga-peft")
    )


def gora_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    r"""Random A, and the B with which B A is nearest to a gradient step (GoRA, arXiv 2502.12171, at a fixed rank).

    The source has A with entries uniform in `±1/sqrt(in)` and `B = -xi g A^T (A A^T)^{-1}`, `g = dL/dW`. Here xi is 1
    and alpha multiplies both factors: `B A` is alpha^2 times `-g` projected on the rows of A, and alpha^2 is the
    source's `xi = gamma sqrt(in)/lora_alpha`. The frozen weights are not shifted.

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for a bad rank or alpha.
    """
    check(key, problem, rank, alpha)

    def draw(layer_key: Array, descent: Matrix) -> Adapter:
        bound = 1 / jnp.sqrt(descent.shape[1])
        a = jax.random.uniform(layer_key, (rank, descent.shape[1]), minval=-bound, maxval=bound)
        b = jnp.linalg.solve(a @ a.T, a @ dense(descent).T).T
        return Adapter(alpha * a, alpha * b)

    keys = jax.random.split(key, len(problem.layers))
    return tuple(map(draw, keys, _descents(problem)))


def _balanced(key: Array, problem: Problem, rank: int, alpha: float | Array, relative: bool) -> Adapters:
    check(key, problem, rank, alpha)

    def split(descent: Matrix) -> Adapter:
        u, s, vt = triplets(descent, rank)
        size = alpha * root(s / positive(s[0]) if relative else s)
        return Adapter(size[:, None] * vt, u * size[None])

    return tuple(map(split, _descents(problem)))


def _twice(
    key: Array, problem: Problem, rank: int, alpha: float | Array, scheme: str
) -> Iterator[tuple[Array, Array, Array]]:
    """(U_{r+1:2r}, S_{r+1:2r}, V_{1:r}^T) of each layer."""
    check(key, problem, rank, alpha)
    check_twice(rank, problem.layers, scheme)
    for descent in _descents(problem):
        u, s, vt = triplets(descent, 2 * rank)
        yield u[:, rank:], s[rank:], vt[:rank]


def _descents(problem: Problem) -> tuple[Matrix, ...]:
    """-dL/dW_i at the pretrained weights; the linearised task is -dL/d(B_i A_i), which has the scaling in it."""
    asked = as_problem(problem)
    return tuple(task / asked.scaling for task in asked.linearised_task())

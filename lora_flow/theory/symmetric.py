r"""The symmetric factorisation X' = (M - X X^T) X: its equilibria, their stability, and how fast it comes to them.

Mohammadi, Tinati, Tu, Soltanolkotabi and Jovanović, "Stability properties of gradient flow dynamics for the symmetric
low-rank matrix factorization problem", arXiv 2411.15972, of which the abstract was read: the formulas are derived for
this project. M is symmetric `(n, n)`, with eigenvalues `values` in any order, f = 1/4 ||M - X X^T||_F^2, and X is
`(n, r)`, exactly parametrised where r is the number r+ of positive eigenvalues, and over-parametrised above.
Eigenvalues that are rounding beside the largest |lambda| are zero, and those that differ by no more are equal.

An equilibrium takes a set J of k <= min(r, r+) positive eigenvalues: X = V_J diag(lambda_J)^{1/2} Q^T with orthonormal
columns of Q `(r, k)`. `chosen` has the places of J among the values. The solution of the flow in time, in three stages,
is `lora_flow.oracles.cascade`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from lora_flow.algebra.spectra import eigenvalue_rounding


def positive_count(values: np.ndarray) -> int:
    """r+, the number of positive eigenvalues."""
    return int(np.sum(_resolved(values, values) > 0))


def equilibria(values: np.ndarray, rank: int) -> Iterator[tuple[int, ...]]:
    """Every J, as places among the values: one equilibrium in X X^T each, where the positive eigenvalues differ."""
    places = np.flatnonzero(_resolved(values, values) > 0).tolist()
    for k in range(min(rank, len(places)) + 1):
        yield from itertools.combinations(places, k)


def spectrum(values: np.ndarray, rank: int, chosen: Sequence[int]) -> np.ndarray:
    """The n r eigenvalues of the flow's Jacobian at an equilibrium, in increasing order.

    Within J -(lambda_a + lambda_b), a <= b, and 0 for the rotations of Q; from J's columns towards i outside J
    lambda_i - lambda_a; and lambda_i for each of the r - k columns that are not used.
    """
    inside, outside = _parts(values, chosen)
    k = len(inside)
    pairs = [-(inside[a] + inside[b]) for a in range(k) for b in range(a, k)]
    rotations = np.zeros(k * (k - 1) // 2 + k * (rank - k))
    across, unused = (outside[:, None] - inside[None]).ravel(), np.repeat(outside, rank - k)
    return np.sort(_resolved(np.concatenate([pairs, rotations, across, unused]), values))


def unstable_directions(values: np.ndarray, rank: int, chosen: Sequence[int]) -> int:
    """The number of positive eigenvalues of the Jacobian; 0 where J has the min(r, r+) largest, and else a saddle."""
    inside, outside = _parts(values, chosen)
    across = _resolved(outside[:, None] - inside[None], values)
    return int(np.sum(across > 0)) + (rank - len(inside)) * int(np.sum(outside > 0))


def least_loss(values: np.ndarray, chosen: Sequence[int]) -> float:
    """f at the equilibrium."""
    return float(np.sum(_parts(values, chosen)[1] ** 2)) / 4


def final_rate(values: np.ndarray, rank: int) -> float:
    """-d log(f - f*)/dt in the end, from almost every start: twice the Jacobian's smallest rate at the minimum.

    0 where f falls like 1/t^2, see `tail`. Exactly parametrised with a null space it is 2 lambda_{r+}; with a next
    different eigenvalue mu behind the r-th 2 (lambda_r - mu) at the most; over-parametrised 2 q at the most, with the
    negative eigenvalue nearest to 0, -q.
    """
    values = np.sort(np.asarray(values, float))[::-1]
    if tail(values, rank) > 0:
        return 0.0
    rates = -spectrum(values, rank, range(min(rank, positive_count(values))))
    return 2 * float(np.min(rates[rates > 0]))


def tail(values: np.ndarray, rank: int) -> float:
    """The limit of t^2 (f - f*): min(r - r+, dimension of the null space)/16 over-parametrised, and else 0."""
    null = int(np.sum(_resolved(values, values) == 0))
    return max(0, min(rank - positive_count(values), null)) / 16


def noise_limit() -> float:
    """The limit of t ||S||_2 over-parametrised with a null space, whatever the start and M are."""
    return 0.5


def balanced_tail(shape: tuple[int, int], task_rank: int, rank: int) -> float:
    """The limit of t^2 L for L = 1/2 ||Y - B A||_F^2, from balanced adapters, B^T B = A A^T, both of full rank.

    [A^T; B]/sqrt(2) is X of M = [[0, Y^T], [Y, 0]]. Y of `shape` (out, in) has rank r*, and r > r* leaves (r - r*)/8.
    From LoRA's start, B = 0, there is no such tail: B's columns stay in Y's column space.
    """
    return max(0, min(rank, *shape) - task_rank) / 8


def untying_rate(values: np.ndarray) -> float:
    """The rate of ||A - B^T||, one layer, 1/2 ||M - B A||_F^2, late and near tied adapters: l.

    M's most negative eigenvalue is -l. The rate is that of columns that X does not use; on columns of noise, which fall
    like 1/t, it is less by 1/(2 t).
    """
    return max(0.0, -float(np.min(_resolved(values, values))))


def _parts(values: np.ndarray, chosen: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues in J and outside."""
    values, taken = _resolved(values, values), np.zeros(len(values), bool)
    taken[list(chosen)] = True
    return values[taken], values[~taken]


def _resolved(numbers: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The numbers, with 0 for those that are rounding beside M's eigenvalues."""
    numbers = np.asarray(numbers, float)
    return np.where(np.abs(numbers) > eigenvalue_rounding(np.asarray(values, float)), numbers, 0.0)

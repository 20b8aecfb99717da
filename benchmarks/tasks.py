"""What the peers race on: lanes of one problem, the times to save at, and the true losses there."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_flow import Adapters, Factorization, aligned_problem, gaussian_init

FLOOR = 1e-20  # below it plain high-order references are not to be trusted
ENOUGH = 0.05  # decades of loss


class Task(NamedTuple):
    """Every lane starts at a `gaussian_init` of side "B"; lanes run over alphas, then seeds."""

    problem: Factorization
    rank: int
    alphas: tuple[float, ...]
    seeds: int
    times: np.ndarray

    @property
    def t1(self) -> float:
        return float(self.times[-1])

    @property
    def starts(self) -> Adapters:
        """Leaves `(lanes, ...)`, in NumPy."""

        def start(alpha: jax.Array, seed: jax.Array) -> Adapters:
            return gaussian_init(jax.random.key(seed), self.problem, rank=self.rank, alpha=alpha, side="B")

        alphas, seeds = np.repeat(self.alphas, self.seeds), np.tile(np.arange(self.seeds), len(self.alphas))
        return jax.tree.map(np.asarray, jax.jit(jax.vmap(start))(jnp.asarray(alphas), jnp.asarray(seeds)))


def figure1(seeds: int) -> Task:
    """Figure 1 of arXiv 2503.06982: three alphas, T = 5, 101 saves."""
    return Task(_figure1_problem(), 4, (1e-3, 1e-4, 1e-5), seeds, np.linspace(0.0, 5.0, 101))


@functools.cache  # each draw compiles
def _figure1_problem() -> Factorization:
    return aligned_problem(jax.random.key(0))


def stiff_tail(t1: float) -> Task:
    """A random problem, not aligned, that is stiff for a long time: one lane, 0 and 60 logarithmic times from 1.

    The shift keeps the four largest singular values of a random matrix, so that adapters of rank 4 can learn all of it.
    With a t1 below 1e4, the times up to there.
    """
    w1, w2, drawn = np.random.default_rng(0).standard_normal((3, 50, 50)) / np.sqrt(50)
    u, sigma, vt = np.linalg.svd(drawn)
    times = np.concatenate([[0.0], np.geomspace(1.0, 1e4, 60)])
    return Task(Factorization(w1, w2, u[:, :4] * sigma[:4] @ vt[:4]), 4, (1e-3,), 1, times[times <= t1])


def error(losses: np.ndarray, reference: np.ndarray) -> float:
    """The worst |log10 L - log10 reference| over lanes and times where the reference is above 1e-20, in decades.

    Infinite where such a loss is missing or not positive.
    """
    counted = reference > FLOOR
    if not np.all(np.isfinite(losses[counted]) & (losses[counted] > 0)):
        return float("inf")
    return float(np.max(np.abs(np.log10(losses[counted] / reference[counted]))))

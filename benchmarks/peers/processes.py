"""Lanes of a NumPy peer, split over one process a core, that are kept from call to call."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from benchmarks.peers.algebra import Weights

Start = tuple[np.ndarray, ...]  # A1, B1^T, A2, B2^T, lanes leading
SolveLanes = Callable[[Weights, Start, np.ndarray, float], np.ndarray]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def pool() -> ProcessPoolExecutor:
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # for the workers: NumPy and PyTorch have read theirs here
    return ProcessPoolExecutor(cores(), mp_context=multiprocessing.get_context("spawn"))


def split_lanes(solve: SolveLanes, weights: Weights, start: Start, times: np.ndarray, rung: float) -> np.ndarray:
    """`solve` of equal shares of the lanes, one a core; of a single lane here."""
    lanes = len(start[0])
    if lanes == 1:
        return solve(weights, start, times, rung)
    shares = [tuple(leaf[part] for leaf in start) for part in np.array_split(np.arange(lanes), min(lanes, cores()))]
    parts = [pool().submit(solve, weights, share, times, rung) for share in shares]
    return np.concatenate([part.result() for part in parts])

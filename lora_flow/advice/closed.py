"""The loss of a layer's task in closed form, from starts for which there is one."""

from __future__ import annotations

import numpy as np

from lora_flow.adapter import Adapter
from lora_flow.advice.tasks import Task
from lora_flow.oracles.modes import imbalanced_mode

APART = 0.1  # relative size of a random start, up to which its pairs grow apart
ALONG = 1e-6  # of a start's norm, up to which what is not along the singular pairs is rounding


def closed_shares(task: Task, start: Adapter, taken_off: bool, times: np.ndarray) -> np.ndarray:
    """The loss over that at the pretrained weight; NaN where no closed form is known.

    With white inputs, and a start along the gradient's singular pairs, each pair is a scalar mode of its own: exact.
    From a small random A and B = 0 each pair is taken for one as well, of the length that A has along it.
    """
    unknown = np.full(len(times), np.nan)
    if taken_off or task.known is not None:
        return unknown
    r = min(start.a.shape[0], len(task.sigma))
    a, b = start.a[:, :r], start.b[:r]
    total = float(np.sum(start.a**2) + np.sum(start.b**2))
    along = float(np.sum(np.diagonal(a) ** 2) + np.sum(np.diagonal(b) ** 2))
    if total - along <= ALONG**2 * total:
        of_a, of_b = np.diagonal(a), np.diagonal(b)
    elif not start.b.any() and task.size_of(start) <= APART:
        of_a, of_b = np.linalg.norm(a, axis=0), np.zeros(r)
    else:
        return unknown
    root, sigma = np.sqrt(task.scaling), task.sigma[:r]
    u, v = imbalanced_mode(sigma, root * of_b, root * of_a, task.scaling * np.asarray(times)[:, None])
    missing = 0.5 * np.sum((sigma - np.asarray(u) * np.asarray(v)) ** 2, axis=1)
    return (missing + task.loss - 0.5 * float(np.sum(sigma**2))) / task.loss

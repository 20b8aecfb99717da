"""The task of a problem: its rank, and the rate at which adapters grow towards it."""

from __future__ import annotations

import numpy as np

from lora_flow.algebra.spectra import singular_values
from lora_flow.problems.base import Problem, linearised_task, matrix_rank, on_host
from lora_flow.problems.factorization import Factorization
from lora_flow.problems.formulas import keeps_all, keeps_loss


def fastest_rate(problem: Problem) -> float:
    """The largest singular value of the linearised tasks: the rate at which small adapters grow."""
    known = on_host(problem) if keeps_all(problem, Factorization) else problem
    return max(float(singular_values(task)[0]) for task in linearised_task(known))


def task_rank(problem: Problem) -> tuple[int, str]:
    """The largest rank to be learned, and the matrix that has it: the shift, or else one of the linearised tasks."""
    if keeps_loss(problem, Factorization):
        return matrix_rank(singular_values(problem.shift), problem.shift.shape), "the shift"
    ranks = [matrix_rank(singular_values(task), task.shape) for task in linearised_task(problem)]
    return max(ranks), f"-dL/dW of layer {1 + int(np.argmax(ranks))} without adapters"

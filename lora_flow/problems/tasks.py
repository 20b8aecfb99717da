"""The task of a problem: its rank, and the rate at which adapters grow towards it."""

from __future__ import annotations

from lora_flow.problems.base import Problem, as_problem


def fastest_rate(problem: Problem) -> float:
    """The largest singular value of the linearised tasks: the rate at which small adapters grow."""
    return as_problem(problem).fastest_rate()


def task_rank(problem: Problem) -> tuple[int, str]:
    """The largest rank to be learned, and the matrix that has it: the shift, or else one of the linearised tasks."""
    return as_problem(problem).task_rank()

"""Which formulas of its own a problem has for its loss."""

import inspect

from lora_flow import AbstractProblem, as_problem
from lora_flow.problems.formulas import FORMULAS
from lora_flow.problems.formulas import formula as of_any_object


def formula(problem, name):
    """The problem's own formula, or None where the default is in use."""
    asked = as_problem(problem)
    if asked is not problem:
        return of_any_object(problem, name)
    if name in FORMULAS and inspect.getattr_static(problem, name) is vars(AbstractProblem)[name]:
        return None
    return getattr(problem, name)

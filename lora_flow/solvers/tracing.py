"""A step that is traced once: diffrax traces its loop over steps three times for each program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx

from lora_flow.solvers.automatic import Automatic
from lora_flow.solvers.chebyshev import RungeKuttaChebyshev


class TracedOnce(diffrax.AbstractAdaptiveSolver[Any]):
    """A solver with the steps of another one, which is asked for them once for each kind of arguments.

    It is made anew for each `diffeqsolve`, because what it remembers may hold tracers of the program around it.
    """

    term_structure: ClassVar = diffrax.ODETerm

    solver: Automatic | RungeKuttaChebyshev
    remembered: Callable[..., Any] = eqx.field(static=True)

    def __init__(self, solver: Automatic | RungeKuttaChebyshev) -> None:
        self.solver = solver
        self.remembered = eqx.filter_jit(lambda solver, *arguments: solver.step(*arguments))

    @property
    def interpolation_cls(self) -> Any:  # type: ignore[override]
        return self.solver.interpolation_cls

    def order(self, terms: Any) -> Any:
        return self.solver.order(terms)

    def error_order(self, terms: Any) -> Any:
        return self.solver.error_order(terms)

    def func(self, terms: Any, t0: Any, y0: Any, args: Any) -> Any:
        return self.solver.func(terms, t0, y0, args)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any) -> Any:
        return self.solver.init(terms, t0, t1, y0, args)

    def step(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any, solver_state: Any, made_jump: Any) -> Any:
        return self.remembered(self.solver, terms, t0, t1, y0, args, solver_state, made_jump)

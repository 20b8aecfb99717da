"""How to step: the checked arguments of `solve`, and the solvers that have names."""

from __future__ import annotations

import warnings
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from lora_flow.checks import (
    PrecisionWarning,
    as_real,
    require,
    require_choice,
    require_flag,
    require_instance,
    require_integer,
    require_number,
)
from lora_flow.dynamics.flows import Flow, Plain
from lora_flow.problems.base import Layers
from lora_flow.solvers.automatic import Automatic
from lora_flow.solvers.chebyshev import RungeKuttaChebyshev
from lora_flow.solvers.derivatives import loop_kind, require_derivatives
from lora_flow.solvers.recorded import can_be_replayed

RTOL = 5e-4
MAX_STEPS = 100_000
SOLVERS = ("auto", "RKC", "Tsit5", "Dopri5", "Dopri8", "Bosh3", "Heun")


class Integrator(eqx.Module):
    """Checked arguments of `solve`: how to step and what to keep. Arrays may change without recompiling.

    - `replayed`: whether steps are written down, and taken again for derivatives in reverse mode.
    - `layers`: the shapes of the problem as it was given, which a flow with a latch counts with; else None.
    """

    flow: Flow
    solver: diffrax.AbstractSolver
    rtol: Array
    stepsize_controller: diffrax.AbstractStepSizeController | None
    dt0: Array | None
    derivatives: str = eqx.field(static=True)
    replayed: bool = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    save_adapters: bool = eqx.field(static=True)
    layers: Layers | None = eqx.field(static=True)


def integrator(
    *,
    derivatives: str,
    flow: Flow = Plain(),  # noqa: B008  (it holds nothing that changes)
    solver: diffrax.AbstractSolver | str = "auto",
    rtol: float | Array = RTOL,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    dt0: float | Array | None = None,
    max_steps: int = MAX_STEPS,
    save_adapters: bool = False,
    layers: Layers,
) -> Integrator:
    """Checks the arguments of `solve` of the same names and fills in the defaults; `layers` are the problem's."""
    require_integer("max_steps", max_steps, "be at least 1", 1)
    require_flag("save_adapters", save_adapters)
    require_derivatives(derivatives)
    require_number("rtol", rtol, "lie between 0 and 1", lambda tolerance: 0 < tolerance < 1)
    if dt0 is not None:
        require_number("dt0", dt0, "be positive", lambda first: first > 0)
    if stepsize_controller is not None:
        must = "be a controller of diffrax, made, as PIDController(rtol=1e-6, atol=1e-9)"
        require_instance("stepsize_controller", stepsize_controller, diffrax.AbstractStepSizeController, must)
    if not isinstance(solver, diffrax.AbstractSolver):
        solver = _named(solver, own_control=stepsize_controller is None, symmetric=flow.symmetric)
    if isinstance(solver, RungeKuttaChebyshev | Automatic):
        must = f"be of another kind than RKC for {type(flow).__name__}, whose Jacobian need not have a real spectrum"
        require(flow.symmetric, "solver", must, "RKC")
    if stepsize_controller is None:
        require(
            isinstance(solver, diffrax.AbstractAdaptiveSolver),
            "solver",
            "estimate its error, or come with stepsize_controller=diffrax.ConstantStepSize() and a dt0",
            type(solver).__name__,
        )
    dtype = jnp.result_type(float)
    tolerance = as_real(rtol)
    if tolerance is not None and tolerance < 100 * jnp.finfo(dtype).eps:
        advice = '; turn on double precision with jax.config.update("jax_enable_x64", True)'
        warnings.warn(
            f"rtol must be at least {100 * float(jnp.finfo(dtype).eps):.0e} for {dtype} to carry it, got {rtol:g}"
            f"{advice if dtype == jnp.float32 else ''}",
            PrecisionWarning,
            stacklevel=3,
        )
    ours = stepsize_controller is None and not flow.latched
    replayed = derivatives == "reverse" and ours and can_be_replayed(solver)
    if isinstance(solver, RungeKuttaChebyshev | Automatic):
        solver = solver.with_loops("lax" if replayed else loop_kind(derivatives))
    start = None if dt0 is None else jnp.asarray(dt0)
    shapes = tuple((m, n) for m, n in layers) if flow.latched else None
    return Integrator(
        flow,
        solver,
        jnp.asarray(rtol, float),
        stepsize_controller,
        start,
        derivatives,
        replayed,
        max_steps,
        save_adapters,
        shapes,
    )


def _named(name: Any, own_control: bool, symmetric: bool) -> diffrax.AbstractSolver:
    require_choice("solver", name, SOLVERS, "or a diffrax solver")
    if name == "RKC":
        return RungeKuttaChebyshev(tell_rounding=own_control)
    if name != "auto":
        return getattr(diffrax, name)()
    return Automatic() if own_control and symmetric else diffrax.Tsit5()

"""`solver="auto"`: Tsit5 while accuracy limits the step, Runge-Kutta-Chebyshev while stability does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lora_flow.algebra.spectra import norm
from lora_flow.checks import require_instance
from lora_flow.solvers.chebyshev import (
    NOISE,
    ChebyshevState,
    RungeKuttaChebyshev,
    beyond_rounding,
    random_direction,
    rounding_of,
)
from lora_flow.solvers.control import StepError
from lora_flow.solvers.counted import Loop
from lora_flow.solvers.derivatives import LoopKind
from lora_flow.solvers.tableaus import tableau_slopes, weighted

TABLEAU = diffrax.Tsit5.tableau
STABLE = 3.5  # dt rho up to which Tsit5 is stable on the negative real axis; `control.MARGIN` is what steps keep off it
MIDDLE = (
    0.10741235230096871,
    0.01135625,
    0.39560903056045305,
    -0.34475214352593553,
    1.3161853649581645,
    -1.0170608542936508,
    0.031249999999999993,
)  # the weights of its interpolation (Tsitouras 2011) half way
NEAR = 0.7  # of the limit, from where on stability counts as what bounds a step
PATIENCE = 30  # more steps bound by stability than not, before a change: fewer are over before it pays
RETURN = 5  # more steps that Tsit5 could have made as well than not


class AutomaticState(NamedTuple):
    """Passed from one step to the next.

    - `stiff`: whether the stabilised method is in use.
    - `asking`: the steps for which the other method would have been better, less those for which it would not.
    - `chebyshev`: the field at the start of the step, and the Jacobian's dominant eigenvector and value.
    """

    stiff: Bool[Array, ""]
    asking: Int[Array, ""]
    chebyshev: ChebyshevState


class QuarticInterpolation(diffrax.AbstractLocalInterpolation):
    """The quartic through both ends of a step, with their slopes k/dt, and through `y0 + middle` half way."""

    t0: Any  # type: ignore[misc]
    t1: Any  # type: ignore[misc]
    y0: Float[Array, " d"]
    y1: Float[Array, " d"]
    k0: Float[Array, " d"]
    k1: Float[Array, " d"]
    middle: Float[Array, " d"]

    def evaluate(self, t0: Any, t1: Any | None = None, left: bool = True) -> Float[Array, " d"]:
        if t1 is not None:
            return self.evaluate(t1) - self.evaluate(t0)
        length = self.t1 - self.t0
        s = jnp.where(length > 0, (t0 - self.t0) / jnp.where(length > 0, length, 1), 0)
        # added to the cubic, whose weights in the middle are 1/8, -1/8 and 1/2
        bump = 16 * s**2 * (1 - s) ** 2
        slope0, slope1 = s * (1 - s) ** 2 - bump / 8, s**2 * (s - 1) + bump / 8
        return (
            self.y0
            + slope0 * self.k0
            + slope1 * self.k1
            + (s**2 * (3 - 2 * s) - bump / 2) * (self.y1 - self.y0)
            + bump * self.middle
        )


class Automatic(diffrax.AbstractAdaptiveSolver[AutomaticState]):
    """Changes from Tsit5 to `RungeKuttaChebyshev` when stability limits the step, and back when it does not.

    One power iteration a step estimates rho from below at the end of each Tsit5 step, also of modes too small
    for the error to show. Tsit5 takes a difference quotient of the field for it, one more evaluation a step, and RKC
    Jacobian-vector products. `ResidualController` keeps dt times the estimate below Tsit5's limit, and begins each step
    with at most 0.95 of it; RKC has stages for 1.05 times the estimate. The solver changes when the steps near that
    limit outnumber the others by thirty. It changes back when the steps that Tsit5 could have made outnumber the others
    by five. Only the method in use is evaluated; under `vmap` both are evaluated while lanes differ.

    The state must be a vector, and the field must have no jumps (`jump_ts`), because the slope at the end of a step is
    used at the start of the next one. The estimated error is a `StepError`: use `ResidualController`.
    """

    chebyshev: RungeKuttaChebyshev = RungeKuttaChebyshev()

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar = QuarticInterpolation

    def __check_init__(self) -> None:
        require_instance("chebyshev", self.chebyshev, RungeKuttaChebyshev, "be a RungeKuttaChebyshev")

    def with_loops(self, kind: LoopKind) -> Automatic:
        return Automatic(self.chebyshev.with_loops(kind))

    def order(self, terms: Any) -> int:
        return 5

    def error_order(self, terms: Any) -> int:
        return 5

    def func(self, terms: Any, t0: Any, y0: Array, args: Any) -> Array:
        return terms.vf(t0, y0, args)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any) -> AutomaticState:
        start = ChebyshevState(terms.vf(t0, y0, args), random_direction(y0), jnp.zeros((), y0.dtype))
        return AutomaticState(jnp.array(False), jnp.array(0), start)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any, solver_state: AutomaticState, made_jump: Any
    ) -> tuple[Array, StepError, dict[str, Any], AutomaticState, Any]:
        stiff, asking, before = solver_state
        dt = terms.contr(t0, t1)

        def tsit5(start: _Step) -> _Step:
            y, error, middle, slope = _tsit5(terms, t0, t1, start.y, args, start.state.field)
            vector, radius = _iterate(lambda y: terms.vf(t1, y, args), y, slope, start.state.vector)
            error = beyond_rounding(error, start.y, jnp.minimum(jnp.abs(dt) * radius, STABLE))
            return _Step(y, error, middle, ChebyshevState(slope, vector, radius))

        def chebyshev(start: _Step) -> _Step:
            y, error, ends, state, _ = self.chebyshev.step(terms, t0, t1, start.y, args, start.state, False)
            return _Step(y, error, (y - start.y) / 2 + (ends["k0"] - ends["k1"]) / 8, state)

        step = _Step(y0, jnp.zeros_like(y0), jnp.zeros_like(y0), before)
        step = self._once(~stiff, tsit5, step)
        step = self._once(stiff, chebyshev, step)

        reach = jnp.abs(dt) * step.state.radius
        asks = stiff ^ (reach > NEAR * STABLE)
        asking = jnp.where(asks, asking + 1, jnp.maximum(asking - 1, 0))
        change = asking >= jnp.where(stiff, RETURN, PATIENCE)
        state = AutomaticState(stiff ^ change, jnp.where(change, 0, asking), step.state)
        dense = {"y0": y0, "y1": step.y, "k0": dt * before.field, "k1": dt * step.state.field, "middle": step.middle}
        # of a Tsit5 step, it is no more than that of the state itself
        rounding = jnp.where(stiff, rounding_of(y0.dtype, reach), 0.0)
        stable = jnp.where(stiff, jnp.inf, STABLE / jnp.fmax(step.state.radius, jnp.finfo(y0.dtype).tiny))
        error = StepError(step.error, jnp.where(stiff, 3, 5), rounding, stable)
        return step.y, error, dense, state, diffrax.RESULTS.successful

    def _once(self, active: Bool[Array, ""], function: Callable[[_Step], _Step], step: _Step) -> _Step:
        """`lax.cond` as a loop: under `vmap` the function is not evaluated at all where no lane is active.

        The loop carries the function's input; XLA would move any part that does not depend on it out of the loop.
        """

        def body(carry: tuple[Array, _Step]) -> tuple[Array, _Step]:
            return jnp.array(False), function(carry[1])

        kind = self.chebyshev.scan_kind
        most = 2 if kind == "bounded" else 1  # a bounded loop of one turn makes it always
        return eqxi.while_loop(lambda carry: carry[0], body, (active, step), max_steps=most, kind=kind, base=2)[1]

    def again(
        self,
        field: Callable[[Array], Array],
        y0: Float[Array, " d"],
        dt: Float[Array, ""],
        stages: Int[Array, ""],
        loop: Loop,
    ) -> dict[str, Float[Array, " d"]]:
        """What a step that was taken leaves for its interpolation: with so many stages of RKC, or 0 by Tsit5."""
        stiff = stages > 0
        short, long = jnp.where(stiff, 0.0, dt), jnp.where(stiff, dt, 0.0)  # of the method in use the step, else 0
        slopes = tableau_slopes(TABLEAU, len(MIDDLE) - 1, field, y0, short)
        increment = self.chebyshev.increment(field, y0, long, slopes[0], stages, loop)
        y1 = y0 + short * weighted(TABLEAU.a_lower[-1], slopes) + increment
        k0, k1 = dt * slopes[0], dt * field(y1)
        explicit = dt * weighted(MIDDLE[:-1], slopes) + MIDDLE[-1] * k1
        middle = jnp.where(stiff, (y1 - y0) / 2 + (k0 - k1) / 8, explicit)
        return {"y0": y0, "y1": y1, "k0": k0, "k1": k1, "middle": middle}


class _Step(NamedTuple):
    """The end of a step, its error, the increment half way, and the state carried on; before the step, its start."""

    y: Float[Array, " d"]
    error: Float[Array, " d"]
    middle: Float[Array, " d"]
    state: ChebyshevState


def _tsit5(terms: Any, t0: Any, t1: Any, y0: Array, args: Any, f0: Array) -> tuple[Array, Array, Array, Array]:
    """y1, its error, the increment half way and the slope at y1."""
    dt = terms.contr(t0, t1)
    k, y, slope = [dt * f0], y0, f0
    for row, c in zip(TABLEAU.a_lower, TABLEAU.c, strict=True):
        y = y0 + _weighted(row, k)
        slope = terms.vf(t0 + float(c) * (t1 - t0), y, args)
        k.append(dt * slope)
    return y, _weighted(TABLEAU.b_error, k), _weighted(MIDDLE, k), slope


def _iterate(field: Callable[[Array], Array], y: Array, slope: Array, vector: Array) -> tuple[Array, Array]:
    """One power iteration on the Jacobian at y by a difference quotient: the next vector, and ||J v||, at most rho.

    The slope at y is known, so that the quotient costs one evaluation of the field, where the products of
    `chebyshev.spectral_radius` cost two, beside the six of a step. Its error is small beside the 5 % that steps keep
    off the limit, and a step that is unstable all the same shows in its estimated error.
    """
    y, slope, vector = jax.lax.stop_gradient((y, slope, vector + NOISE * random_direction(y)))
    vector = vector / norm(vector)
    distance = jnp.sqrt(jnp.finfo(y.dtype).eps) * norm(y)
    change = jax.lax.stop_gradient(field(y + distance * vector)) - slope
    image = change / jnp.where(distance > 0, distance, 1.0)
    size = norm(image)
    return jnp.where(size > 0, image / jnp.where(size > 0, size, 1.0), vector), size


def _weighted(weights: Any, vectors: list[Array]) -> Array:
    return sum(
        (float(w) * vector for w, vector in zip(weights[1:], vectors[1:], strict=True)), float(weights[0]) * vectors[0]
    )

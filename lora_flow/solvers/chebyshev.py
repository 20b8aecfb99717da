"""A stabilised explicit solver: long, stiff gradient flows at the price of field evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from lora_flow.algebra.spectra import norm
from lora_flow.checks import require_choice, require_flag, require_integer
from lora_flow.solvers.control import StepError
from lora_flow.solvers.counted import Loop
from lora_flow.solvers.derivatives import LoopKind, fixed

DAMPING = 2 / 13
FEW = 8  # stages, with fewer of which the error is estimated as in the paper
THIRD = 2 / 3  # of the stages' third difference, dt^3 y''' / 10, since the error is dt^3 y''' / 15
MARGIN = 1.05  # on the spectral radius, whose estimate errs on the low side
AHEAD = 1.5  # what is added for the growth during the step, as a multiple of that since the last step
CHANGE = 0.05  # relative; the power iteration ends when its estimate moves by less
NOISE = 0.01  # mixed into the eigenvector, which could otherwise never turn to one that it is orthogonal to
ITERATIONS = 50
ROUNDING = 3.0  # eps; see `rounding_of`

Field = Callable[[Array, Float[Array, " d"]], Float[Array, " d"]]


class ChebyshevState(NamedTuple):
    """Passed from one step of `RungeKuttaChebyshev` to the next, over the flattened state.

    - `field`: the right-hand side at the start of the step.
    - `vector`: the last iterate for the dominant eigenvector of the Jacobian, of length 1.
    - `radius`: the estimate of the Jacobian's spectral radius that came with it.
    """

    field: Float[Array, " d"]
    vector: Float[Array, " d"]
    radius: Float[Array, ""]


class RungeKuttaChebyshev(diffrax.AbstractAdaptiveSolver[ChebyshevState]):
    r"""RKC: second order, explicit, stable for about dt rho < 0.65 stages^2.

    For problems whose Jacobian has a real, mostly negative spectrum, as that of every gradient flow. Each step takes as
    many stages as its length needs for stability. Their number grows with the square root of the length, so a long
    stiff interval costs far fewer evaluations of the field than with a classical method. Power iteration on
    Jacobian-vector products, carried on from step to step, estimates the spectral radius rho from below. The stages are
    enough for 1.05 times the estimate, and for 1.5 times its growth since the last step besides.

    Derivatives are those of the steps taken, which are of second order. In `solve` they are wrong by 1e-2 at the
    default rtol of 5e-4, by 3e-3 at 5e-5 and by 5e-4 at 5e-6: take that where gradients are to be right to 1e-3.

    Sommeijer, Shampine and Verwer, J. Comput. Appl. Math. 88 (1997), 315-326, section 2: the formulas are those of
    van der Houwen and Sommeijer (1980) with damping eps = 2/13. With fewer than eight stages the error estimate is the
    paper's, 0.8 (y0 - y1) + 0.4 dt (f0 + f1), about dt^3 y''' / 15. Its slopes hold dt lambda times a component of rate
    lambda, which the stages damp. With more stages the estimate is therefore made of the third divided difference of y0
    and three stages, without slopes (derived here).

    **Arguments:**

    - `max_stages`: a step that needs more is rejected at the cost of two evaluations, and the step-size controller
      shortens it.
    - `scan_kind`: the loop over stages, as for diffrax's Runge-Kutta methods. "checkpointed" is for solving and
      for reverse mode; "lax" for forward mode (`diffrax.ForwardMode`); "bounded" for `diffrax.DirectAdjoint`. `solve`
      takes the one that its `derivatives` need.
    - `tell_rounding`: give the error as a `StepError`, which `ResidualController` understands and diffrax's do not.
    """

    max_stages: int = eqx.field(default=2000, static=True)
    scan_kind: LoopKind = eqx.field(default="checkpointed", static=True)
    tell_rounding: bool = eqx.field(default=False, static=True)

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar = diffrax.ThirdOrderHermitePolynomialInterpolation

    def __check_init__(self) -> None:
        require_integer("max_stages", self.max_stages, "be at least 2", 2)
        require_choice("scan_kind", self.scan_kind, ("checkpointed", "lax", "bounded"))
        require_flag("tell_rounding", self.tell_rounding)

    def with_loops(self, kind: LoopKind) -> RungeKuttaChebyshev:
        return dataclasses.replace(self, scan_kind=kind)

    def order(self, terms: Any) -> int:
        return 2

    def error_order(self, terms: Any) -> int:
        return 3

    def func(self, terms: Any, t0: Any, y0: PyTree, args: Any) -> PyTree:
        return terms.vf(t0, y0, args)

    def init(self, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any) -> ChebyshevState:
        field, y, _ = _flatten(terms, t0, y0, args)
        noise = random_direction(y)
        vector, radius = spectral_radius(field, t0, y, noise, jnp.zeros((), y.dtype))
        return ChebyshevState(field(t0, y), vector, radius)

    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: PyTree,
        args: Any,
        solver_state: ChebyshevState,
        made_jump: Any,
    ) -> tuple[PyTree, PyTree, dict[str, PyTree], ChebyshevState, Any]:
        field, y, unravel = _flatten(terms, t0, y0, args)
        f0, vector, before = solver_state
        if made_jump is not False:
            f0 = jax.lax.cond(made_jump, lambda: field(t0, y), lambda: f0)
        vector, radius = spectral_radius(field, t0, y, vector + NOISE * random_direction(y), before)

        dt = jnp.asarray(terms.contr(t0, t1), y.dtype)
        needed = self.stages_of(dt, before, radius)
        possible = needed <= self.max_stages
        stages = jnp.where(possible, needed, 2)
        increment, f1, third = self._stages(field, t0, t1, y, dt, f0, stages.astype(int))
        error = jnp.where(stages < FEW, 0.4 * dt * (f0 + f1) - 0.8 * increment, THIRD * third)
        reach = jnp.abs(dt) * radius
        told: PyTree = unravel(jnp.where(possible, beyond_rounding(error, y, reach), jnp.inf))
        if self.tell_rounding:
            told = StepError(told, jnp.array(3), rounding_of(y.dtype, reach))

        y1 = unravel(y + increment)
        dense = {"y0": y0, "y1": y1, "k0": unravel(dt * f0), "k1": unravel(dt * f1)}
        return y1, told, dense, ChebyshevState(f1, vector, radius), diffrax.RESULTS.successful

    def _stages(
        self, field: Field, t0: Any, t1: Any, y0: Float[Array, " d"], dt: Any, f0: Float[Array, " d"], stages: Any
    ) -> tuple[Float[Array, " d"], Float[Array, " d"], Float[Array, " d"]]:
        """y1 - y0, the slope at y1, and the third divided difference of y0 and three of the stages, in steps."""
        start, advance = _recurrence(field, t0, t1, y0, dt, f0, stages.astype(y0.dtype))
        compared, weights = _third_difference(jnp.maximum(stages, FEW).astype(y0.dtype))

        def stage(carry: Any) -> Any:
            j, now, _, _, third = carry
            after, moved, f = advance(j, now)
            third = third + jax.lax.stop_gradient(jnp.sum(jnp.where(j == compared, weights, 0.0)) * moved)
            return j + 1, after, moved, f, third

        *_, increment, f1, third = eqxi.while_loop(
            lambda carry: carry[0] <= stages,
            stage,
            (jnp.ones_like(stages), start, jnp.zeros_like(y0), f0, jnp.zeros_like(y0)),
            max_steps=self.max_stages,
            kind=self.scan_kind,
        )
        return increment, f1, third

    def stages_of(self, dt: Float[Array, ""], before: Float[Array, ""], now: Float[Array, ""]) -> Float[Array, ""]:
        """The stages that a step needs, from the estimates of the spectral radius at the last step and at this one."""
        largest = MARGIN * (now + AHEAD * jnp.maximum(now - before, 0))
        return stages_needed(jax.lax.stop_gradient(jnp.abs(dt) * largest))

    def again(
        self,
        field: Callable[[Array], Array],
        y0: Float[Array, " d"],
        dt: Float[Array, ""],
        stages: Int[Array, ""],
        loop: Loop,
    ) -> dict[str, Float[Array, " d"]]:
        """What a step that was taken leaves for its interpolation."""
        f0 = field(y0)
        y1 = y0 + self.increment(field, y0, dt, f0, stages, loop)
        return {"y0": y0, "y1": y1, "k0": dt * f0, "k1": dt * field(y1)}

    def increment(
        self,
        field: Callable[[Array], Array],
        y0: Float[Array, " d"],
        dt: Float[Array, ""],
        f0: Float[Array, " d"],
        stages: Int[Array, ""],
        loop: Loop,
    ) -> Float[Array, " d"]:
        """y1 - y0 of a step with so many stages that was taken, from the slope at y0; 0 for a step of length 0."""
        t = jnp.zeros_like(dt)
        s = jnp.maximum(stages, 2).astype(y0.dtype)
        start, advance = _recurrence(lambda _, y: field(y), t, t, y0, dt, f0, s)
        last = loop(lambda index, now: advance(index + 1, now)[0], start, stages - 1, self.max_stages)
        moved: Float[Array, " d"] = last.moved
        return moved


class _Stage(NamedTuple):
    """X_j and X_{j-1} of the recurrence; and T_j, T_j' and T_j'' at w0, for both."""

    x: Float[Array, " d"]
    x_before: Float[Array, " d"]
    polynomials: Float[Array, " 3"]
    polynomials_before: Float[Array, " 3"]

    @property
    def moved(self) -> Float[Array, " d"]:
        """Y_j - y0, for j of 2 and more."""
        _, first, second = self.polynomials
        return second / first**2 * self.x


Advance = Callable[[Int[Array, ""], _Stage], tuple[_Stage, Float[Array, " d"], Float[Array, " d"]]]


def _recurrence(
    field: Field,
    t0: Any,
    t1: Any,
    y0: Float[Array, " d"],
    dt: Float[Array, ""],
    f0: Float[Array, " d"],
    s: Float[Array, ""],
) -> tuple[_Stage, Advance]:
    """The first of s stages; and the way from stage j to the next one, with Y_j - y0 and the slope there.

    By the paper's three-term recurrence, rewritten for X_j = (Y_j - y0) / b_j:

        X_j = 2 w0 X_{j-1} - X_{j-2} + 2 w1 dt (F_{j-1} - a_{j-1} F_0) / b_{j-1},

    with b_j = T_j''(w0) / T_j'(w0)^2, about 1/3 for all j, and a_j = 1 - b_j T_j(w0). The Chebyshev polynomials and
    their derivatives grow no faster than j^4, and their recurrences lose no digits.
    """
    w0, w1 = _chebyshev_arguments(s)

    def advance(j: Int[Array, ""], now: _Stage) -> tuple[_Stage, Float[Array, " d"], Float[Array, " d"]]:
        value, first, second = now.polynomials
        second = jnp.where(j == 1, first**2 / (4 * w0**2), second)  # b_1 = b_2
        b = second / first**2
        a, c = 1 - b * value, w1 * jnp.where(j == 1, b, second / first)
        moved = b * now.x
        f = field(t0 + c * (t1 - t0), y0 + moved)
        x = 2 * w0 * now.x - now.x_before + (2 * w1 * dt / b) * (f - a * f0)
        inhomogeneous = jnp.stack([jnp.zeros_like(value), 2 * value, 4 * first])
        polynomials = 2 * w0 * now.polynomials - now.polynomials_before + inhomogeneous
        return _Stage(x, now.x, polynomials, now.polynomials), moved, f

    zero, one = jnp.zeros_like(w0), jnp.ones_like(w0)
    first = _Stage(w1 * dt * f0, jnp.zeros_like(y0), jnp.stack([w0, one, zero]), jnp.stack([one, zero, zero]))
    return first, advance


def stages_needed(reach: Float[Array, ""]) -> Float[Array, ""]:
    """The least number of stages, at least 2, that is stable for dt rho = `reach`; a whole number as a float.

    beta(s) = (1 + w0) / w1, where the polynomial's argument comes to -1; about 2/3 (s^2 - 1) (1 - 2/15 eps), from
    which the search starts one stage short.
    """
    s = jnp.maximum(2.0, jnp.floor(jnp.sqrt(1 + reach / (2 / 3 * (1 - 2 / 15 * DAMPING))) - 0.5))
    for _ in range(2):
        w0, w1 = _chebyshev_arguments(s)
        s = jnp.where((1 + w0) / w1 < reach, s + 1, s)
    return s


def rounding_of(dtype: Any, reach: Float[Array, ""]) -> Float[Array, ""]:
    """The effect of rounding on a step with dt rho = `reach`, relative to the state; it grows as the stages squared.

    Verwer, Hundsdorfer and Sommeijer, Numer. Math. 57 (1990), 157-178; the constant is measured.
    """
    return ROUNDING * jnp.finfo(dtype).eps * reach


def beyond_rounding(error: Float[Array, " d"], y: Float[Array, " d"], reach: Float[Array, ""]) -> Float[Array, " d"]:
    """A step's estimated error, minus the part that rounding makes.

    The state is known to eps, hence its slope to rho eps: an estimate of dt rho eps says nothing about the step.
    Compared with a tolerance, such an estimate would hold the step at its present length.
    """
    unknown = rounding_of(y.dtype, reach) * norm(y)
    size = norm(error)
    return jnp.where(size <= unknown, 0, (1 - unknown / jnp.where(size > 0, size, 1)) * error)  # NaN stays NaN


def _third_difference(s: Float[Array, ""]) -> tuple[Float[Array, " 3"], Float[Array, " 3"]]:
    """Three of s stages, the last among them, about equally spaced in time, and the weights of their Y_j - y0."""
    _, w1 = _chebyshev_arguments(s)
    compared = jnp.round(jnp.sqrt(jnp.array([1 / 3, 2 / 3, 1.0], s.dtype)) * s)
    at = jnp.stack([w1 / _slope_over_curvature(j, DAMPING / s**2) for j in compared])
    return compared, 1 / (at * jnp.prod(at[:, None] - at[None] + jnp.eye(3, dtype=s.dtype), axis=1))


def _chebyshev_arguments(s: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """w0 = 1 + eps / s^2 and w1 = T_s'(w0) / T_s''(w0)."""
    excess = DAMPING / s**2
    return 1 + excess, _slope_over_curvature(s, excess)


def _slope_over_curvature(j: Float[Array, ""], excess: Float[Array, ""]) -> Float[Array, ""]:
    """T_j' / T_j'' at w0 = 1 + `excess`, written without cancellation in w0 - 1."""
    w0, sinh = 1 + excess, jnp.sqrt(excess * (2 + excess))
    angle = j * jnp.log1p(excess + sinh)
    return jnp.sinh(angle) * sinh**2 / (j * jnp.cosh(angle) * sinh - w0 * jnp.sinh(angle))


def spectral_radius(
    field: Field, t: Any, y: Float[Array, " d"], vector: Float[Array, " d"], radius: Float[Array, ""]
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """A unit vector near the Jacobian's dominant eigenvector at y, and ||J v|| by the last iterate, at most rho.

    Power iteration from `vector`, until the estimate, `radius` before the first iteration, moves by less
    than `CHANGE`. Like a step's length, the result is not differentiated. The estimate is what keeps a step stable, and
    so has no error of a difference quotient, at the price of two evaluations for each product.
    """
    field, t, y, vector, radius = fixed((field, t, y, vector, radius))

    def unsettled(carry: Any) -> Bool[Array, ""]:
        iteration, _, before, now = carry
        moved = jnp.abs(now - before) > CHANGE * now
        return (iteration == 0) | ((iteration < ITERATIONS) & moved)

    def iterate(carry: Any) -> Any:
        iteration, vector, _, before = carry
        _, image = jax.jvp(lambda y: field(t, y), (y,), (vector,))
        size = norm(image)
        vector = jnp.where(size > 0, image / jnp.where(size > 0, size, 1), vector)
        return iteration + 1, vector, before, size

    vector = vector / norm(vector)
    _, vector, _, radius = jax.lax.while_loop(unsettled, iterate, (jnp.zeros((), int), vector, radius, radius))
    return vector, radius


def random_direction(y: Float[Array, " d"]) -> Float[Array, " d"]:
    """A fixed random direction of length 1."""
    noise = np.random.default_rng(0).standard_normal(y.shape)
    return jnp.asarray(noise / np.linalg.norm(noise), y.dtype)


def _flatten(
    terms: Any, t0: Any, y0: PyTree, args: Any
) -> tuple[Field, Float[Array, " d"], Callable[[Float[Array, " d"]], PyTree]]:
    """The vector field and the state as one vector; what the field closes over becomes leaves, for `stop_gradient`."""
    y, unravel = ravel_pytree(y0)

    def field(t: Array, flat: Array) -> Array:
        return ravel_pytree(terms.vf(t, unravel(flat), args))[0].astype(flat.dtype)

    return eqx.filter_closure_convert(field, t0, y), y, unravel

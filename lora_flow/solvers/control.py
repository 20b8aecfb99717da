"""Error control relative to the residual: the reason why a loss of 1e-26 means 1e-26."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jaxtyping import Array, Bool, Float, Int, PyTree

from lora_flow.algebra.spectra import norm
from lora_flow.checks import kind, require, require_instance, require_number

GROWTH = 0.14  # by which a small mode may grow in a step; at the 0.7 of it aimed at, 0.0007 of its logarithm is wrong

MARGIN = 0.95  # of the longest stable step, since stiffness may grow during a step

ROUNDING_SHARE = 0.03  # of the residual, that rounding may make of it
ROUNDING_FLOOR = 50.0  # in eps: below a relative residual of 3e-13, a relative loss of 1e-25, rounding may show

Norm = Callable[[PyTree], Array]


class StepError(NamedTuple):
    """The error of a step, from a solver that knows more of it than its size, to `ResidualController`.

    - `error`: the estimated error, of the order `order`.
    - `rounding`: what rounding alone may make of the step, relative to the state; 0 where a solver does not tell.
    - `stable`: the longest step for which the method is stable, by the solver's estimate; infinite where it gives none.
    """

    error: PyTree
    order: Int[Array, ""]
    rounding: Float[Array, ""] | float = 0.0
    stable: Float[Array, ""] | float = np.inf


class _ControlState(NamedTuple):
    """Passed from one step to the next.

    - `reached`: the least relative residual so far.
    - `defined`: whether there was a loss and a field at the start.
    - `shortest`: the step below which a run from the start is stuck.
    """

    pid: Any
    reached: Float[Array, ""]
    defined: Bool[Array, ""]
    shortest: Float[Array, ""]


class ResidualController(diffrax.AbstractAdaptiveStepSizeController[Any, Any]):
    r"""Adapts the step so that errors are small relative to the part that is still to be learned.

    The usual tolerance is relative to the weights, which stay of order 1 while the residual E = shift - update falls to
    1e-10. Such a tolerance lets the solver stop the loss ten decades too high. Here a step is accepted when, in each
    factor A_i and B_i (a leaf of the state),

        ||error|| <= max(rtol ||E|| / ||shift|| ||factor - origin||, eps ||factor||),

    with Frobenius norms, eps the spacing of the floating-point type, and ||E|| the smallest so far. Below eps an
    estimated error is rounding, and steps that chase it would number thousands. Norms of whole factors make the steps
    independent of the coordinates and of zero padding.

    **Arguments:**

    - `rtol`: the tolerance, relative to the factor and to the residual.
    - `relative_residual`: maps the state to `||E|| / ||shift||`, a scalar, 1 where nothing is learned.
    - `growth_bound`: maps the state to a bound on the growth rate of small modes. Modes too small to enter the norms
      would otherwise not limit the step. Methods of order 3 and less, stabilised methods among them, aim at
      steps below a tenth of 1/growth. Not evaluated for methods of higher order.
    - `origin`: the point that the factors are measured from, a PyTree like theirs; zero by default. Where both factors
      of a layer start large, they are measured from the start, because an error that is small beside the factors may be
      large beside the change that they learn.
    - `factors`: maps the state to the PyTree of its factors, where the state is not that PyTree itself.
    - `pid`: turns the scaled error, 1 at the limit, into the next step.
    - `atol`, `norm`: only for the root finder of an implicit solver, which takes its tolerances from here.

    Where a solver estimates in its `StepError` how long a stable step may be, no step is longer, whatever its error.
    The next one is at most 0.95 times as long, because stiffness may grow meanwhile.

    A run fails where loss or field are not finite at its start, and where a step is still too long that no longer moves
    the time.
    """

    rtol: float | Array
    relative_residual: Callable[[PyTree], Array] = eqx.field(kw_only=True)
    growth_bound: Callable[[PyTree], Array] = lambda state: jnp.zeros(())
    factors: Callable[[PyTree], PyTree] = lambda state: state
    origin: PyTree | None = None
    atol: float = 1e-16
    norm: Norm = optimistix.rms_norm
    pid: diffrax.PIDController = diffrax.PIDController(rtol=1.0, atol=0.0, pcoeff=0.4, icoeff=0.3)

    def __check_init__(self) -> None:
        require_number("rtol", self.rtol, "lie between 0 and 1", lambda known: 0 < known < 1)
        require_number("atol", self.atol, "be at least 0", lambda known: known >= 0)
        for name in ("relative_residual", "growth_bound", "factors", "norm"):
            require(callable(getattr(self, name)), name, "be a function", kind(getattr(self, name)))
        require_instance("pid", self.pid, diffrax.PIDController, "be a PIDController of diffrax, made")

    def wrap(self, direction: Any) -> ResidualController:
        return self

    def init(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: PyTree,
        dt0: Any,
        args: Any,
        func: Callable[..., PyTree],
        error_order: Any,
    ) -> tuple[Any, Any]:
        f0 = func(terms, t0, y0, args)
        if dt0 is None:
            dt0 = jnp.minimum(t1 - t0, _first_step(y0, f0))
        first, pid_state = self.pid.init(terms, t0, t1, jnp.ones(()), dt0, args, func, error_order)
        leaves = [*jax.tree.leaves((y0, f0)), self.relative_residual(y0)]
        defined = jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))
        shortest = jnp.finfo(jnp.result_type(t1)).eps ** 2 * (t1 - t0)
        return first, _ControlState(pid_state, jnp.ones(()), defined, jax.lax.stop_gradient(shortest))

    def adapt_step_size(
        self,
        t0: Any,
        t1: Any,
        y0: PyTree,
        y1_candidate: PyTree,
        args: Any,
        y_error: PyTree,
        error_order: Any,
        controller_state: Any,
    ) -> tuple[Any, Any, Any, Any, Any, Any]:
        pid_state, reached, defined, shortest = controller_state
        told = y_error if isinstance(y_error, StepError) else StepError(y_error, error_order)
        y_error, error_order, rounding, stable = told
        y0, y1, y_error = jax.lax.stop_gradient((y0, y1_candidate, y_error))
        residual_of_candidate = self.relative_residual(y1)
        residual = jnp.fmin(residual_of_candidate, reached)
        eps = jnp.finfo(residual.dtype).eps
        tolerance = jnp.maximum(self.rtol * residual, eps)
        errors, before, after = map(self.factors, (y_error, y0, y1))
        error, moved = self._scaled_error(errors, before, after, self.rtol * residual)
        rounding = rounding / jnp.maximum(ROUNDING_SHARE * residual * moved, ROUNDING_FLOOR * eps)
        unstable = jnp.where(t1 - t0 > stable, (t1 - t0) / stable, 0.0)
        error = jnp.maximum(error, jnp.maximum(rounding, unstable) ** error_order)  # both in proportion to the step
        error = jnp.maximum(error, self._growth_error(y1, t1 - t0, error_order))
        # a step so long that its stages overflow has no error estimate; the next one must be shorter all the same
        error = jnp.where(jnp.isfinite(error) & jnp.isfinite(residual_of_candidate), error, 1 / tolerance)
        one = jnp.ones(())
        keep, t0, t1, jump, pid_state, result = self.pid.adapt_step_size(
            t0, t1, one, one, args, error, error_order, pid_state
        )
        t1 = jnp.where(keep, jnp.minimum(t1, t0 + MARGIN * stable), t1)
        stuck = ~keep & (t1 - t0 <= jnp.maximum(shortest, jnp.finfo(shortest.dtype).eps * t0))
        result = diffrax.RESULTS.where(defined & ~stuck, result, diffrax.RESULTS.dt_min_reached)
        return (
            keep,
            t0,
            t1,
            jump,
            _ControlState(pid_state, jnp.where(keep, residual, reached), defined, shortest),
            result,
        )

    def _scaled_error(self, error: PyTree, y0: PyTree, y1: PyTree, tolerance: Array) -> tuple[Array, Array]:
        """The largest ratio, over factors, of the error to the allowed error; a factor that stays zero is exact.

        Also the share of the factors' norm by which they have moved from their origin. What the residual is relative to
        is learned by this move, while rounding is relative to the factors.
        """
        origin = jax.tree.map(jnp.zeros_like, y0) if self.origin is None else self.origin
        leaves = zip(*map(jax.tree.leaves, (error, y0, y1, origin)), strict=True)
        # all norms of a factor at once: one after another they are many small operations at every step
        together = [jnp.stack([e, before, after, before - o, after - o]) for e, before, after, o in leaves]
        norms = jnp.stack([norm(one.reshape(len(one), -1), axis=1) for one in together], axis=1)
        errors, size, moved = norms[0], jnp.fmax(*norms[1:3]), jnp.fmax(*norms[3:])
        eps = jnp.finfo(size.dtype).eps
        # divided in turn: the product of a small size and eps would underflow
        scaled = errors / jnp.where(size > 0, size, 1.0) / jnp.fmax(tolerance * _ratio(moved, size), eps)
        return jnp.max(scaled), _ratio(norm(moved), norm(size))

    def _growth_error(self, state: PyTree, dt: Any, error_order: Any) -> Array:
        """0 for methods of high order; as a loop, so that under `vmap` lanes that all have one evaluate nothing."""

        def body(carry: tuple[Array, PyTree, Array]) -> tuple[Array, PyTree, Array]:
            return jnp.array(False), carry[1], jnp.asarray(self.growth_bound(carry[1]), dt.dtype)

        start = jnp.asarray(error_order) <= 3, state, jnp.zeros((), dt.dtype)
        rate = jax.lax.while_loop(lambda carry: carry[0], body, jax.lax.stop_gradient(start))[2]
        return (jax.lax.stop_gradient(dt) * rate / GROWTH) ** error_order


def _first_step(y0: PyTree, f0: PyTree) -> Array:
    """A hundredth of the time in which the state changes by its own size, at the initial speed."""
    size, speed = (norm(_norms(jax.tree.leaves(tree))) for tree in (y0, f0))
    return jax.lax.stop_gradient(jnp.where(speed > 0, 0.01 * size / jnp.where(speed > 0, speed, 1.0), jnp.inf))


def _norms(leaves: list[Any]) -> Float[Array, " leaf"]:
    return jnp.stack([norm(leaf) for leaf in leaves])


def _ratio(part: Array, whole: Array) -> Array:
    """1 where the whole is zero."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), 1.0)

"""Curves as functions of what is unknown, and least squares of their logarithms: many starts in one program."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jaxtyping import Array, Float, Int

from lora_flow.coordinates.base import Coordinates
from lora_flow.design.draws import start_along, unlikely
from lora_flow.design.moved import ALPHA, RATE, moved
from lora_flow.dynamics.flows import Flow
from lora_flow.dynamics.solve import solve
from lora_flow.initialization import Scheme, initialize
from lora_flow.runtime.compiling import compiled

STEPS = 40  # of Levenberg and Marquardt's method
FAR = 50.0  # stands in for the distance of a curve that cannot be solved
WIDE = 7.0  # standard deviation, in logarithms, of a parameter about its first guess: a factor of 1000
MAX_STEPS = 1000  # of the solver: a point that needs more is as far as can be


class Model(NamedTuple):
    """How curves follow from a point: the logarithms of the unknown parameters, then those of unknown sizes.

    - `problem`, `begun`: the problem, or its part along the task where the draw is unknown, and its own values.
    - `coordinates`: in which the problem is solved.
    - `values`, `unknown`: the values of all parameters, and the names of those that the point has in their place.
    - `scheme`, `side`, `rank`: of the start. `seeds` are of the curves' draws; None where a point has the sizes.
    """

    problem: Any
    coordinates: Coordinates
    begun: dict[str, Array]
    values: dict[str, Array]
    unknown: tuple[str, ...]
    scheme: Scheme
    side: str
    rank: int
    seeds: Int[Array, " curve"] | None
    flow: Flow
    solver: str
    rtol: float

    def at(self, point: Array) -> dict[str, Array]:
        """The values of all parameters at a point."""
        return {**self.values, **{name: jnp.exp(point[i]) for i, name in enumerate(self.unknown)}}

    def sizes(self, point: Array) -> Float[Array, "curve 2"]:
        """The sizes along the task of an unknown draw, layer 1 first."""
        return jnp.exp(point[len(self.unknown) :]).reshape(-1, 2)

    def curves(self, point: Array, clock: Array) -> tuple[Float[Array, "curve time"], Float[Array, " curve"]]:
        """The losses over times or steps, and the rounding floors."""
        values = self.at(point)
        problem, solved = (moved(one, self.begun, values) for one in (self.problem, self.coordinates.problem))
        times = values[RATE] * clock

        def one(own: Array) -> tuple[Array, Array]:
            if self.seeds is None:
                start = start_along(own, self.side)
            else:
                key = jax.random.key(own)
                drawn = initialize(self.scheme, key, problem, rank=self.rank, alpha=values[ALPHA], side=self.side)
                start, _ = self.coordinates.enter(drawn)
            run = solve(
                solved,
                start,
                t1=times[-1],
                saves=times,
                flow=self.flow,
                solver=self.solver,
                rtol=self.rtol,
                max_steps=MAX_STEPS,
                derivatives="forward",
            )
            return run.observables["loss"], run.rounding_floor

        return jax.vmap(one)(self.sizes(point) if self.seeds is None else self.seeds)


class Data(NamedTuple):
    """What is fitted: the logarithms of losses, less what the model leaves out on average, in units of their errors.

    `whiten` is `(curve, time, time)`, with zeros for what is not used. `guess` is a point.
    """

    clock: Float[Array, " time"]
    logs: Float[Array, "curve time"]
    mean: Float[Array, "curve time"]
    whiten: Float[Array, "curve time time"]
    guess: Float[Array, " unknown"]

    def residuals(self, model: Model, point: Array) -> Array:
        """What the squares are of: distances from the curves, unlikely draws, and great distances from the guess."""
        losses, _ = model.curves(point, self.clock)
        off = jnp.log(losses) - self.logs + self.mean
        off = jnp.where(jnp.isfinite(off), off, FAR)
        parts = [jnp.einsum("cij,cj->ci", self.whiten, off).ravel(), (point - self.guess) / WIDE]
        if model.seeds is None:
            ratios = jnp.log(model.sizes(point)) - jnp.log(model.at(point)[ALPHA])
            parts.append(unlikely(ratios, model.rank).ravel())
        return jnp.concatenate(parts)

    def linearised(self, model: Model, point: Array) -> tuple[Array, Array]:
        """The Jacobian of the residuals, and they themselves.

        A size moves the residuals of its own curve alone: all curves' sizes of a layer are moved at once, and what then
        moves is told apart by its curve.
        """
        count, size, curves = len(model.unknown), point.size, len(self.logs)
        along = np.eye(count + 2 if model.seeds is None else count, size)
        along[count:] = 0.0
        for layer in range(len(along) - count):
            along[count + layer, count + layer :: 2] = 1.0

        def push(tangent: Array) -> tuple[Array, Array]:
            return jax.jvp(lambda point: self.residuals(model, point), (point,), (tangent,))

        value, moved_by = jax.vmap(push, out_axes=(None, 1))(jnp.asarray(along))
        if model.seeds is not None:
            return moved_by, value
        of_sizes = np.arange(2 * curves) // 2
        owner = np.concatenate(
            [np.repeat(np.arange(curves), self.logs.shape[1]), np.full(count, -1), of_sizes, of_sizes]
        )
        own = owner[:, None, None] == np.arange(curves)[None, :, None]
        by_sizes = jnp.where(own, moved_by[:, None, count:], 0.0).reshape(len(owner), 2 * curves)
        return jnp.concatenate([moved_by[:, :count], by_sizes], axis=1), value


@compiled()
def curves(model: Model, clock: Array, points: Array) -> tuple[Array, Array]:
    """The losses at many points, `(point, curve, time)`, and their rounding floors."""
    return jax.vmap(lambda point: model.curves(point, clock))(points)


@compiled()
def minimise(model: Model, data: Data, points: Array, free: Array) -> tuple[Array, Array, Array]:
    """From each point the nearest minimum over its `free` entries: the points, sums of squares and Jacobians."""

    arrays, rest = eqx.partition((model, data), eqx.is_array)

    @jax.custom_jvp
    def residuals(moving: Array, args: Any) -> Array:
        return linearised(moving, args)[1]

    @residuals.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        # Optimistix linearises: here once with all of the Jacobian. JAX would solve again for each product with it.
        jacobian, value = linearised(*primals)
        return value, jacobian @ tangents[0]

    def linearised(moving: Array, args: Any) -> tuple[Array, Array]:
        """The Jacobian by all of the point, with zeros for what is not free, and the value."""
        given, point, free = args
        model, data = eqx.combine(given, rest)
        jacobian, value = data.linearised(model, jnp.where(free, moving, point))
        return jnp.where(free[None], jacobian, 0.0), value

    def one(point: Array, free: Array) -> tuple[Array, Array, Array]:
        args = arrays, point, free
        solver: Any = optimistix.LevenbergMarquardt(rtol=1e-4, atol=1e-4)
        found: Any = optimistix.least_squares(residuals, solver, point, args, max_steps=STEPS, throw=False)
        best = jnp.where(free, found.value, point)
        jacobian, value = linearised(best, (arrays, point, jnp.ones_like(free)))
        return best, jnp.sum(value**2), jacobian

    return jax.vmap(one)(points, free)

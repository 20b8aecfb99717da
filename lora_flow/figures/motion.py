"""The numbers of an animation: where the singular vectors of one run's adapters point, how large they are, the loss."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from lora_flow.adapter import Adapter
from lora_flow.checks import require, require_instance
from lora_flow.dynamics.descend import Descent
from lora_flow.dynamics.measurements import Direction, directions_of
from lora_flow.dynamics.solve import Trajectory
from lora_flow.figures.style import ZERO
from lora_flow.problems.base import Problem, on_host, require_problem
from lora_flow.problems.stale import check_problem
from lora_flow.results.clock import DESCENT, FLOW, Clock


@dataclasses.dataclass(frozen=True)
class Motion:
    """One run over time, as far as it came.

    - `times`: `(time,)`, or the iterations of a descent, as `clock` says.
    - `loss`: `(time,)`, not below `floor`, its rounding floor.
    - `sigma`: for each layer the singular values of Z = [B; A^T], the largest first, `(time, mode)`.
    - `angle`: for each layer the angles of its left singular vectors to the direction that the layer aligns with (to
      the space of several that tie), in radians from 0 to pi/2, `(time, mode)`; NaN without a direction.
    """

    times: Float[np.ndarray, " time"]
    loss: Float[np.ndarray, " time"]
    floor: float
    sigma: tuple[Float[np.ndarray, "time mode"], ...]
    angle: tuple[Float[np.ndarray, "time mode"], ...]
    clock: Clock = FLOW


def motion_of(problem: Problem, trajectory: Trajectory) -> Motion:
    """The motion of one run, solved with `save_adapters=True`.

    **Raises:** `InputError` for what is no problem, and for a trajectory of several lanes, or without its adapters.
    """
    require_problem(problem)
    check_problem(problem)
    require_instance("trajectory", trajectory, Trajectory, "be the result of solve")
    require(trajectory.times.ndim == 1, "trajectory", "be of one lane", f"{trajectory.status.size} lanes")
    asked = trajectory.history is not None
    require(asked, "trajectory", "have its adapters over time, as of solve(..., save_adapters=True)", "none")
    assert trajectory.history is not None
    loss, floor = np.asarray(trajectory.observables["loss"]), float(trajectory.rounding_floor)
    reached = np.isfinite(loss)
    require(reached.sum() > 1, "trajectory", "have come to two of its times", int(reached.sum()))
    layers = on_host(trajectory.history)
    seen = [_layer(Adapter(*(part[reached] for part in one)), to) for one, to in
            zip(layers, on_host(directions_of(problem)), strict=True)]  # fmt: skip
    clock, times = FLOW, trajectory.times
    if isinstance(trajectory, Descent):
        clock, times = DESCENT, trajectory.iterations
    sigma, angle = zip(*seen, strict=True)
    return Motion(np.asarray(times, float)[reached], np.maximum(loss[reached], floor), floor, sigma, angle, clock)


def frames_of(motion: Motion, count: int) -> np.ndarray:
    """At most `count` of its times, as places: about as much moves from one to the next.

    A quarter of what moves is the turning, another the growth, another the fall of the loss, and the rest time itself.
    """
    moved = [motion.times, np.log10(np.maximum(motion.loss, ZERO))]
    moved += [angle[:, 0] for angle in motion.angle] + [np.log10(np.maximum(one[:, 0], ZERO)) for one in motion.sigma]
    weights = [1.0, 1.0] + [1 / len(motion.angle)] * (2 * len(motion.angle))
    steps = [np.abs(np.diff(np.nan_to_num(one))) for one in moved]
    shares = [weight * one / one.sum() for weight, one in zip(weights, steps, strict=True) if one.sum() > 0]
    so_far = np.concatenate([[0.0], np.cumsum(np.sum(shares, axis=0))])
    wanted = np.linspace(0, so_far[-1], min(count, len(motion.times)))
    return np.unique(np.searchsorted(so_far, wanted * (1 - 1e-12)).clip(max=len(motion.times) - 1))


def _layer(adapter: Adapter, direction: Direction) -> tuple[np.ndarray, np.ndarray]:
    """Singular values of Z over time, and the angles of its left singular vectors."""
    left, sigma, _ = np.linalg.svd(
        np.concatenate([adapter.b, np.swapaxes(adapter.a, 1, 2)], axis=1), full_matrices=False
    )
    space = np.concatenate([np.asarray(one) for one in direction.pairs], axis=1) / np.sqrt(2)
    if not np.any(space):
        return sigma, np.full_like(sigma, np.nan)
    along = space @ left  # (time, pair, mode)
    across = left - space.T @ along
    return sigma, np.arctan2(np.linalg.norm(across, axis=1), np.linalg.norm(along, axis=1))

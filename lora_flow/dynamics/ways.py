"""The ways to solve a sweep's lanes: along a flow with a solver, or by gradient descent with an optimiser."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lora_flow.adapter import Adapters
from lora_flow.coordinates.base import Coordinates
from lora_flow.coordinates.shared import coordinates_of
from lora_flow.dynamics.descend import descend_lane
from lora_flow.dynamics.flows import Flow, Plain
from lora_flow.dynamics.integrator import Integrator
from lora_flow.dynamics.measurements import Direction
from lora_flow.dynamics.optimizers import OPTIMIZERS, gradient_noise, one_of
from lora_flow.dynamics.phases import Steps
from lora_flow.dynamics.solve import Trajectory, look_back, require_loss
from lora_flow.dynamics.steps import step_lane
from lora_flow.problems.base import Problem, as_problem
from lora_flow.problems.tasks import fastest_rate

NOISE = 2606  # folded into a lane's seed for its gradient noise, so that the noise is not the start's draw


class Way(eqx.Module):
    """How each lane is solved. Arrays may change without recompiling.

    - `axis`: the dimension of what is saved, and `saved`, its values.
    - `told`: the settings, by the names that `sweep` has for them.
    """

    axis: ClassVar[str]

    @property
    @abc.abstractmethod
    def saved(self) -> np.ndarray: ...

    @property
    @abc.abstractmethod
    def told(self) -> dict[str, Any]: ...

    @property
    @abc.abstractmethod
    def flow(self) -> Flow: ...

    @property
    @abc.abstractmethod
    def save_adapters(self) -> bool: ...

    @abc.abstractmethod
    def lane(self, problem: Problem, adapters: Adapters, directions: tuple[Direction, ...], own: Any) -> Any:
        """The steps of one lane, unchecked and not compiled; `own` is of this lane."""

    def look(self, problem: Problem, adapters: Adapters, directions: tuple[Direction, ...], run: Any) -> Trajectory:
        """The trajectory of what `lane` has returned: that itself."""
        return run

    @abc.abstractmethod
    def own(self, lanes: Sequence[Mapping[str, Any]]) -> Any:
        """What each lane has of its own, beside problem and start: arrays `(lane,)`, from the lanes' coordinates."""

    @abc.abstractmethod
    def coordinates(self, problems: Sequence[Problem], rank: int) -> tuple[Coordinates, ...]:
        """The coordinates that each problem is solved in."""

    @abc.abstractmethod
    def costs(self, problems: Sequence[Problem]) -> np.ndarray:
        """About in proportion to the steps of a lane, `(problem,)`."""

    def check(self, solved: Trajectory) -> None:
        """Raises where what is solved cannot be right."""


class Flowing(Way):
    """Along a flow, from 0 to `t1`."""

    axis: ClassVar[str] = "time"

    t1: Float[Array, ""]
    times: Float[Array, " time"]
    integrator: Integrator

    @property
    def saved(self) -> np.ndarray:
        return np.asarray(self.times)

    @property
    def told(self) -> dict[str, Any]:
        return {
            "t1": self._end,
            "flow": str(self.flow),
            "solver": type(self.integrator.solver).__name__,
            "rtol": float(self.integrator.rtol),
            "max_steps": int(self.integrator.max_steps),
        }

    @property
    def flow(self) -> Flow:
        return self.integrator.flow

    @property
    def save_adapters(self) -> bool:
        return self.integrator.save_adapters

    @property
    def _end(self) -> float:
        return float(str(np.asarray(self.t1)[()]))  # 0.1 in single precision too

    def __str__(self) -> str:
        return f"to t = {self._end:g}"

    def lane(self, problem: Problem, adapters: Adapters, directions: tuple[Direction, ...], own: Any) -> Steps:
        return step_lane(problem, adapters, directions, self.t1, self.times, self.integrator)

    def look(self, problem: Problem, adapters: Adapters, directions: tuple[Direction, ...], run: Steps) -> Trajectory:
        return look_back(problem, adapters, directions, self.times, self.integrator, run)

    def own(self, lanes: Sequence[Mapping[str, Any]]) -> None:
        return None

    def coordinates(self, problems: Sequence[Problem], rank: int) -> tuple[Coordinates, ...]:
        return coordinates_of(problems, rank=rank)

    def costs(self, problems: Sequence[Problem]) -> np.ndarray:
        return np.sqrt(1 + self._end * np.asarray([fastest_rate(one) for one in problems]))

    def check(self, solved: Trajectory) -> None:
        require_loss(solved.initial_loss, solved.rounding_floor)


class Descending(Way):
    """By so many `steps` of gradient descent, with the optimisers of these names, step sizes of each lane's own.

    Lanes are solved as they are given: Adam and sign descent are not the same in turned coordinates.
    """

    axis: ClassVar[str] = "iteration"

    optimizers: tuple[str, ...] = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    iterations: tuple[int, ...] = eqx.field(static=True)
    noisy: bool = eqx.field(static=True)
    keep: bool = eqx.field(static=True)

    @property
    def saved(self) -> np.ndarray:
        return np.asarray(self.iterations)

    @property
    def told(self) -> dict[str, Any]:
        return {"steps": self.steps}

    @property
    def flow(self) -> Flow:
        return Plain()

    @property
    def save_adapters(self) -> bool:
        return self.keep

    def __str__(self) -> str:
        return f"of {self.steps} iterations"

    def lane(self, problem: Problem, adapters: Adapters, directions: tuple[Direction, ...], own: Any) -> Trajectory:
        which, step, noise, seed = own
        parts = [one_of([OPTIMIZERS[name]() for name in self.optimizers], which), optax.scale_by_learning_rate(step)]
        if self.noisy:
            key = jax.random.fold_in(jax.random.key(seed), NOISE)
            parts = [gradient_noise(noise, key, as_problem(problem).scaling), *parts]
        stops = (*self.iterations, self.steps)
        how: Any = (optax.chain(*parts), self.flow, "simultaneous", stops, "lax", self.keep)
        run = descend_lane(problem, adapters, directions, *how)
        named = {name: values for name, values in run.observables.items() if name != "step_size"}
        return dataclasses.replace(run, observables=named)

    def own(self, lanes: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, ...]:
        real = jnp.result_type(float)
        return (
            np.asarray([self.optimizers.index(lane["optimizer"]) for lane in lanes], np.int32),
            np.asarray([lane["step"] for lane in lanes], real),
            np.asarray([lane["gradient_noise"] for lane in lanes], real),
            np.asarray([lane["seed"] for lane in lanes]),
        )

    def coordinates(self, problems: Sequence[Problem], rank: int) -> tuple[Coordinates, ...]:
        return Coordinates.of(problems, rank=rank)

    def costs(self, problems: Sequence[Problem]) -> np.ndarray:
        return np.full(len(problems), float(self.steps))

"""The axes of a sweep: which problems, and for each of them which initialisations, sides, scales, ranks and seeds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import Adapters
from lora_flow.checks import InputError, kind, require, require_choice, require_number
from lora_flow.dynamics.flows import Flow
from lora_flow.dynamics.optimizers import OPTIMIZERS
from lora_flow.initialization import (
    SIDES,
    Scheme,
    allows_any_width,
    as_scheme,
    check_alpha,
    check_rank,
    check_reaches_task,
    initialize,
)
from lora_flow.problems.base import Problem, require_problem
from lora_flow.problems.padding import check_padding
from lora_flow.problems.stale import check_problem
from lora_flow.storage.portable import check_labels
from lora_flow.sweeps.descents import parse_descents
from lora_flow.sweeps.limits import LARGEST
from lora_flow.sweeps.schema import DESCENT_DIMS, LANE_DIMS


@dataclasses.dataclass(frozen=True)
class Problems:
    """One problem, or the product of some axes with a problem for each point, in C order."""

    members: tuple[Problem, ...]
    axes: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, problem: Problem | Mapping[Any, Problem] | Problems) -> Problems:
        """One problem as it is, a mapping from labels to problems as the axis `problem`; checked."""
        if isinstance(problem, Mapping):
            require(len(problem) > 0, "problem", "hold at least one problem", "none")
            check_labels("problem", problem)
            problems = cls(tuple(problem.values()), {"problem": tuple(problem)})
        else:
            problems = problem if isinstance(problem, Problems) else cls((problem,))
        for member in problems.members:
            require_problem(member, ", or be a mapping from labels to such problems")
            check_problem(member)
        problems.check()
        return problems

    def check(self) -> None:
        """Raises unless the problems can share one program."""
        first, kinds = self.members[0], {_kind(member) for member in self.members}
        if self.axes and (len(kinds) > 1 or not jax.tree.leaves(eqx.filter(first, eqx.is_array))):
            classes = ", ".join(sorted({type(member).__name__ for member in self.members}))
            raise InputError(
                "problem must hold PyTrees of one class, with arrays of the same shapes and types, and what differs "
                f"between them in arrays, to be swept together, got {classes} of {len(kinds)} kinds"
            )

    @property
    def stacked(self) -> Any:
        """The only problem as it is, or all of them as one PyTree whose arrays have a leading axis."""
        return stack(self.members) if self.axes else self.members[0]


def stack(trees: Sequence[Any]) -> Any:
    """PyTrees of one structure as one, whose arrays have a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0], *trees)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The axes of a sweep, those of its problems first; their product is its lanes, numbered in C order."""

    problem_axes: Mapping[str, tuple[Any, ...]]
    init: tuple[str, ...]
    side: tuple[str, ...]
    alpha: tuple[float, ...]
    rank: tuple[int, ...]
    seed: Sequence[int]
    schemes: Mapping[str, Scheme]  # by the labels of `init`
    optimizer: tuple[str, ...] = ()  # these three are empty for flows
    step: tuple[float, ...] = ()
    gradient_noise: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        problems: Problems,
        *,
        init: Any,
        side: Any,
        alpha: Any,
        rank: Any,
        seeds: Any,
        descend: Any = None,
        gradient_noise: Any = 0.0,
    ) -> Grid:
        """The grid of these values, each one or several, checked against the problems.

        `descend` names optimisers with their step sizes; None for flows, which know no noise in the gradient.
        """
        schemes = tuple(map(as_scheme, _listed("init", init)))
        labels = tuple(scheme.name for scheme in schemes)
        twice = "name each value once, own ones as in Scheme(init, name='mine')"
        require(len(set(labels)) == len(labels), "init", twice, labels)
        grid = cls(
            problem_axes=problems.axes,
            init=labels,
            side=axis_of("side", side),
            alpha=axis_of("alpha", alpha),
            rank=axis_of("rank", rank),
            seed=_seeds(seeds),
            schemes=dict(zip(labels, schemes, strict=True)),
            **_descents(descend, gradient_noise),
        )
        for one in grid.side:
            require_choice("side", one, SIDES)
        for scale in grid.alpha:
            check_alpha(scale)
        grid = dataclasses.replace(grid, alpha=tuple(map(float, grid.alpha)))
        for r in grid.rank:
            check_rank(r, problems.members[0].layers, bounded=not allows_any_width(problems.members[0]))
        check_padding(problems.members[0], grid.rank)
        if "spectral" in grid.init:
            check_reaches_task(min(grid.rank), problems.members, "init spectral")
            check_rank(max(grid.rank), problems.members[0].layers)
        for name in [name for name in grid.init if name not in ("gaussian", "spectral")]:
            for r in grid.rank:  # what a scheme asks of the problem is refused while it is traced
                jax.eval_shape(functools.partial(grid._draw_one, problems.members[0], name, r), jax.random.key(0))
        return grid

    def check_starts(self, problems: Problems, flow: Flow) -> None:
        """Raises where the flow is not defined at a start: a draw of every problem, scheme, side and rank is tried."""
        if flow.always_defined:
            return
        for problem, name, side, r in itertools.product(problems.members, self.init, self.side, self.rank):
            try:
                flow.check_projected_start(self._draw_one(problem, name, r, jax.random.key(0), side))
            except InputError as error:
                raise InputError(f"{error} (init {name}, rank {r})") from None

    def _draw_one(self, problem: Problem, name: str, rank: int, key: Array, side: str = "") -> Adapters:
        of_side = side or self.side[0]
        return initialize(self.schemes[name], key, problem, rank=rank, alpha=self.alpha[0], side=of_side)

    @property
    def axes(self) -> dict[str, Sequence[Any]]:
        before, behind = ({dim: getattr(self, dim) for dim in dims} for dims in (LANE_DIMS[:2], LANE_DIMS[2:]))
        return {**self.problem_axes, **before, **self.descents, **behind}

    @property
    def descents(self) -> dict[str, Sequence[Any]]:
        """The axes of a descent; none for flows."""
        return {dim: getattr(self, dim) for dim in DESCENT_DIMS if getattr(self, dim)}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.axes.values()))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def lane(self, number: int | np.integer) -> dict[str, Any]:
        """The coordinates of one lane."""
        index = np.unravel_index(number, self.shape)
        return {dim: values[i] for (dim, values), i in zip(self.axes.items(), index, strict=True)}

    def problem_of(self, numbers: np.ndarray) -> np.ndarray:
        """The index into `Problems.members` for each lane number."""
        return np.asarray(numbers) // math.prod(self.shape[len(self.problem_axes) :])


def _kind(problem: Problem) -> Any:
    arrays, rest = eqx.partition(problem, eqx.is_array)
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(arrays))
    return jax.tree.structure(problem), shapes, tuple(jax.tree.leaves(rest))


def _listed(name: str, values: Any) -> tuple[Any, ...]:
    """One value, or the several of a list, a tuple, a range or an array of one dimension."""
    if isinstance(values, (list, tuple, range)) and not isinstance(values, Scheme):
        listed = tuple(value.item() if isinstance(value, np.generic) else value for value in values)
    elif hasattr(values, "__array__"):
        array = np.asarray(values)
        require(array.ndim <= 1, name, "be one value, or several in a flat list", kind(array))
        listed = tuple(np.atleast_1d(array).tolist())
    else:
        listed = (values,)
    require(len(listed) > 0, name, "hold at least one value", "none")
    for value in listed:
        flat = callable(value) or isinstance(value, Scheme) or not hasattr(value, "__len__") or isinstance(value, str)
        require(flat and not hasattr(value, "__next__"), name, "be one value, or several in a flat list", kind(value))
    return listed


def axis_of(name: str, values: Any) -> tuple[Any, ...]:
    """The values of an axis, one or several, each of them once."""
    listed = _listed(name, values)
    require(len(set(listed)) == len(listed), name, "name each value once", listed)
    return listed


def _descents(descend: Any, noise: Any) -> dict[str, Any]:
    """The values of these axes."""
    noises = axis_of("gradient_noise", noise)
    for std in noises:
        require_number("gradient_noise", std, "be at least 0", lambda known: known >= 0)
    if descend is None:
        require(noises in ((0,), (0.0,)), "gradient_noise", "be left out without descend", noise)
        return {}
    names, steps = parse_descents(_listed("descend", descend))
    for name in names:
        require_choice("the optimiser of descend", name, OPTIMIZERS)
    return {"optimizer": names, "step": steps, "gradient_noise": tuple(map(float, noises))}


def _seeds(seeds: Any) -> Sequence[int]:
    if isinstance(seeds, (int, np.integer)) and not isinstance(seeds, bool):
        require(seeds >= 1, "seeds", "be at least 1", seeds)
        require(seeds <= LARGEST, "seeds", f"be at most {LARGEST}", seeds)
        return range(int(seeds))
    listed = axis_of("seeds", seeds)
    largest = int(jnp.iinfo(jnp.result_type(int)).max)
    must = f"be integers from 0 to {largest}"
    for seed in listed:
        whole = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed <= largest
        require(whole, "seeds", must, kind(seed))
    return listed

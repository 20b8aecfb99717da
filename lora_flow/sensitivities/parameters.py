"""What a sensitivity is with respect to: continuous parameters of a problem and of its start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.algebra.diagonal import Diagonal
from lora_flow.checks import InputError, one_line, require, require_choice, require_number
from lora_flow.problems.base import AbstractProblem, Problem, kind_of, require_problem
from lora_flow.problems.stale import check_problem

ALPHA, SHIFT_SCALE = "alpha", "shift_scale"
Family = Callable[..., Problem]  # from continuous parameters, by name, to a problem


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The scalar parameters with their values, the problem there, and its derivatives; and the arrays taken whole.

    `values` has NaN for alpha, which every lane has of its own. `pushed` holds the derivatives of the problem's
    floating-point arrays by the scalars, `(parameter, ...)`.
    """

    values: Mapping[str, float]
    problem: Any
    pushed: Any
    arrays: tuple[str, ...]

    @property
    def alpha_pushed(self) -> Array:
        """The derivatives of alpha."""
        return jnp.asarray([float(name == ALPHA) for name in self.values])


def find_parameters(problem: Problem | Family, values: Mapping[str, float], names: Sequence[str]) -> Parameters:
    """The parameters of these names: alpha, those of a family, numbers and arrays of the problem, and its shift's size.

    **Raises:** `InputError` for a name that is none of them, and for a family that JAX cannot differentiate.
    """
    require(isinstance(values, Mapping), "parameters", "be a mapping from names to numbers", type(values).__name__)
    for name, given in values.items():
        require_number(f"parameters['{name}']", given, "be a finite number")
    at, by_family = _made(problem, values, [name for name in names if name in values])
    numbers, arrays = _fields(at)
    shift = {SHIFT_SCALE} if "shift" in arrays else set()
    known = [ALPHA, *values, *sorted({*numbers, *arrays, *shift} - set(values))]
    for name in names:
        require_choice("with_respect_to", name, known, f"for this {kind_of(at)}")
    require(len(names) > 0, "with_respect_to", "name at least one parameter", "none")
    require(len(set(names)) == len(names), "with_respect_to", "name each parameter once", list(names))
    moving = eqx.filter(at, eqx.is_inexact_array)
    still = jax.tree.map(jnp.zeros_like, moving)

    def along(name: str) -> Any:
        if name in by_family:
            return by_family[name]
        if name == SHIFT_SCALE:
            return eqx.tree_at(lambda tree: tree.shift, still, moving.shift)
        if name == ALPHA:
            return still
        return eqx.tree_at(lambda tree: getattr(tree, name), still, jnp.ones_like(getattr(at, name)))

    def value(name: str) -> float:
        if name in values:
            return float(values[name])
        return {ALPHA: np.nan, SHIFT_SCALE: 1.0}[name] if name in (ALPHA, SHIFT_SCALE) else float(getattr(at, name))

    scalars = [name for name in names if name in values or name not in arrays]
    whole = tuple(name for name in names if name not in scalars)
    none = jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape)), moving)
    pushed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(along, scalars)) if scalars else none
    return Parameters({name: value(name) for name in scalars}, at, pushed, whole)


def _made(problem: Any, values: Mapping[str, float], names: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The problem, and its derivatives by a family's parameters of these names."""
    if not callable(problem):
        require_problem(problem, ", or a function of continuous parameters that makes one")
        require(not values, "parameters", "be left out with a problem; a function takes them", sorted(values))
        return checked(problem), {}
    try:
        at = problem(**values)
    except TypeError as error:
        takes = ", ".join(values) or "no parameters"
        raise InputError(
            f"problem must be one, or a function of {takes} that makes one, got {one_line(error)}"
        ) from error
    at = checked(at)

    def derivative(name: str) -> Any:
        def made(value: Array) -> Any:
            return eqx.filter(problem(**{**values, name: value}), eqx.is_inexact_array)

        try:
            return jax.jvp(made, (jnp.asarray(float(values[name])),), (jnp.ones(()),))[1]
        except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
            raise InputError(f"problem must use {name} in jax.numpy alone, got {type(error).__name__}") from error

    return at, {name: derivative(name) for name in names}


def checked(problem: Any) -> Any:
    require(isinstance(problem, AbstractProblem), "problem", "derive from AbstractProblem", type(problem).__name__)
    check_problem(problem)
    large = any(isinstance(value, Diagonal) for value in vars(problem).values())
    require(not large, "problem", "have its matrices written out, up to a size of 1024", "a Diagonal")
    return problem


def _fields(problem: Any) -> tuple[set[str], set[str]]:
    """The names of the problem's floating-point numbers, and of its arrays."""
    found = {name: value for name, value in vars(problem).items() if eqx.is_inexact_array(value)}
    return {name for name, value in found.items() if value.ndim == 0}, {
        name for name, value in found.items() if value.ndim > 0
    }
